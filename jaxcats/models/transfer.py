"""A file over a network that breaks: taken up where it broke, by one process at a time, with its progress shown."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120].rstrip(".")
