"""Files that are the old one or the new one, never half of it."""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from jaxcats.common.cli import one_line
from jaxcats.common.errors import UserError

TEMPORARY = re.compile(r"\..+\.\d+\.tmp(\.old)?")  # what `temporary` gives, and what storage.artifact moves away
# A checkpoint until the one that replaces it is whole; here, since storage.checkpoint loads Orbax.
REPLACED_CHECKPOINT = re.compile(r"\.(\d+)\.replaced")


def shorten_bytes(name: str, most: int) -> str:
    """The beginning of a file's name, of so many bytes: file systems count these, of 255, and not letters."""
    return os.fsencode(name)[:most].decode(errors="ignore")


def temporary(path: Path) -> Path:
    """Where this process makes a file or a folder that is to become `path`; `sweep` knows it by its name."""
    return path.with_name(f".{shorten_bytes(path.name, 200)}.{os.getpid()}.tmp")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, and its folder where missing; raises OSError and leaves nothing behind then.

    A link stays one: what it points to is replaced. A device or a pipe is written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)
        return
    fresh = temporary(path)
    try:
        fresh.write_bytes(data)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def remove_stale_temporaries(folder: Path, *, older: float = 24 * 3600) -> None:
    """Removes what killed processes left half-written, once it is so many seconds old; what can't be removed stays."""
    for left in folder.glob(".*.tmp*"):
        with contextlib.suppress(OSError):
            if TEMPORARY.fullmatch(left.name) and time.time() - left.stat().st_mtime > older:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def write_text(path: Path, text: str) -> None:
    """Likewise, in UTF-8; file names that are not UTF-8 keep their bytes."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, tree: Any, *, indent: int | None = 1) -> None:
    """Likewise, as JSON."""
    write_text(path, json.dumps(tree, indent=indent) + "\n")


NAME = ".lock"
_held: dict[Path, int] = {}  # open for the rest of the process


def lock_folder(folder: Path) -> None:
    """Locks a folder for this process until it ends (flock on a file in it; where the file system has no locks, nothing).

    Raises:
        UserError: another process holds it; says which.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    place = folder.resolve() / NAME
    if place in _held:
        return
    handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise UserError(
            f"--workdir {folder}: {holder} is training in it now. Wait for its end, or name another folder."
        ) from None
    except OSError:  # some network file systems: better without a lock than without a run
        os.close(handle)
        return
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {platform.node() or 'this machine'}\n".encode())
    _held[place] = handle


def unlock_folder(folder: Path) -> None:
    """Lets another process have the folder."""
    handle = _held.pop(folder.resolve() / NAME, None)
    if handle is not None:
        os.close(handle)


def cache_folder() -> Path:
    """Where jaxcats keeps what it can make again: JAXCATS_CACHE, else XDG_CACHE_HOME/jaxcats, else ~/.cache/jaxcats."""
    if given := os.environ.get("JAXCATS_CACHE"):
        return Path(os.path.expanduser(given))
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxcats"


def cache_name(root: Path, more: str = "") -> str:
    """What a file in the cache is called that is about the folder `root`, and of `more` that decides it."""
    key = hashlib.sha256(os.fsencode(root) + more.encode()).hexdigest()[:16]
    return f"{shorten_bytes(root.name, 230) or 'root'}-{key}.json"


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {one_line(message)}", file=sys.stderr)


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def progress_bar(**options: Any) -> Any:
    """A bar that counts images: on a terminal and in Jupyter, silent elsewhere; arguments are tqdm's."""
    if in_notebook():
        if importlib.util.find_spec("ipywidgets"):
            from tqdm.notebook import tqdm
        else:
            from tqdm import tqdm
        return tqdm(unit="img", leave=False, **options)
    from tqdm import tqdm

    return tqdm(unit="img", disable=None, leave=False, **options)
