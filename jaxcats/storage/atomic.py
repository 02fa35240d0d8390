"""Files that are the old one or the new one, never half of it."""

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

OURS = re.compile(r"\..+\.\d+\.tmp(\.old)?")  # of write_bytes and of storage.artifact: .NAME.PROCESS.tmp
ASIDE = re.compile(
    r"\.(\d+)\.replaced"
)  # a checkpoint, until the one that replaces it is whole; see storage.checkpoint


def cut(name: str, most: int) -> str:
    """The beginning of a file's name, of so many bytes: file systems count these, of 255, and not letters."""
    return os.fsencode(name)[:most].decode(errors="ignore")


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
    temporary = path.with_name(f".{cut(path.name, 200)}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sweep(folder: Path, *, older: float = 24 * 3600) -> None:
    """Removes what killed processes left half-written, once it is so many seconds old; what can't be removed stays."""
    for left in folder.glob(".*.tmp*"):
        with contextlib.suppress(OSError):
            if OURS.fullmatch(left.name) and time.time() - left.stat().st_mtime > older:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def write_text(path: Path, text: str) -> None:
    """Likewise, in UTF-8; file names that are not UTF-8 keep their bytes."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, tree: Any, *, indent: int | None = 1) -> None:
    """Likewise, as JSON."""
    write_text(path, json.dumps(tree, indent=indent) + "\n")
