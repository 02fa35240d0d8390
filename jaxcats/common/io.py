"""Atomic writes, the cache folder, the lock of a run folder, warnings and the progress bar."""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcats.common.errors import UserError, one_line

if TYPE_CHECKING:
    from filelock import FileLock

TEMPORARY = re.compile(r"\..+\.\d+\.tmp(\.old)?")  # names from `temporary`; export.artifact adds ".old"
# The name of a checkpoint until its replacement is complete. It is here because train.checkpoint loads Orbax.
REPLACED_CHECKPOINT = re.compile(r"\.(\d+)\.replaced")
LOCK = ".lock"
_locks: "dict[Path, FileLock]" = {}  # held by this process


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file or, when that fails, leaves the old one; creates its folder.

    A symbolic link stays a link and its target is replaced. A device or pipe is written to.

    Raises:
        OSError: the file can't be written.
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


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8; file names in the text that are not UTF-8 keep their bytes."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, tree: Any, *, indent: int | None = 1) -> None:
    """`write_text` of a tree as JSON."""
    write_text(path, json.dumps(tree, indent=indent) + "\n")


def temporary(path: Path) -> Path:
    """The path at which this process writes a file or folder before it is renamed to `path`."""
    return path.with_name(f".{shorten_bytes(path.name, 200)}.{os.getpid()}.tmp")


def shorten_bytes(name: str, limit: int) -> str:
    """The beginning of a file name, at most `limit` bytes long: file systems allow 255 bytes, not 255 characters."""
    return os.fsencode(name)[:limit].decode(errors="ignore")


def remove_stale_temporaries(folder: Path, *, older: float = 24 * 3600) -> None:
    """Removes files that a killed process left half-written, once they are `older` seconds old; ignores failures."""
    for path in folder.glob(".*.tmp*"):
        with contextlib.suppress(OSError):
            if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > older:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def lock_folder(folder: Path) -> None:
    """Locks a run folder for this process, until `unlock_folder` or the end of the process, however it ends.

    Does nothing on a file system without locks.

    Raises:
        UserError: another process holds the lock; the message says which.
        OSError: the folder can't be written.
    """
    from filelock import FileLock, Timeout

    path = folder.resolve() / LOCK
    if path in _locks:
        return
    # Read first: some versions of filelock empty the file when they try to lock it.
    holder = path.read_text(errors="replace").strip() if path.is_file() else ""
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        lock.acquire(timeout=0)
    except Timeout:
        problem = f"{holder or 'another process'} is training in it now"
        raise UserError(f"--workdir {folder}: {problem}. Wait until it ends, or name another folder.") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            raise
        return
    _locks[path] = lock
    with contextlib.suppress(OSError):
        path.write_text(f"process {os.getpid()} on {platform.node() or 'this machine'}\n")


def unlock_folder(folder: Path) -> None:
    """Lets other processes train in the folder."""
    if lock := _locks.pop(folder.resolve() / LOCK, None):
        lock.release()


def cache_folder() -> Path:
    """The folder for files that can be recomputed: JAXCATS_CACHE, else XDG_CACHE_HOME/jaxcats, else ~/.cache/jaxcats."""
    if given := os.environ.get("JAXCATS_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxcats"


def cache_name(root: Path, settings: str = "") -> str:
    """The name of the cache file for the dataset in `root`, under `settings` that change its content."""
    key = hashlib.sha256(os.fsencode(root) + settings.encode()).hexdigest()[:16]
    return f"{shorten_bytes(root.name, 230) or 'root'}-{key}.json"


def warn(message: str) -> None:
    """Prints one line on stderr."""
    print(f"warning: {one_line(message)}", file=sys.stderr)


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def progress_bar(**options: Any) -> Any:
    """A tqdm bar that counts images, on a terminal and in Jupyter; elsewhere it shows nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in Jupyter without ipywidgets tqdm warns before it falls back to text
        from tqdm.auto import tqdm
    return tqdm(unit="img", leave=False, disable=False if in_notebook() else None, **options)
