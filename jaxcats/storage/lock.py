"""One run folder, one process: a lock that the system releases however its holder ends."""

import os
import platform
from pathlib import Path

from jaxcats.errors import UserError

NAME = ".lock"
_held: dict[Path, int] = {}  # open for the rest of the process


def hold(folder: Path) -> None:
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


def release(folder: Path) -> None:
    """Lets another process have the folder."""
    handle = _held.pop(folder.resolve() / NAME, None)
    if handle is not None:
        os.close(handle)
