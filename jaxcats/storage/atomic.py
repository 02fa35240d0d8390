"""Files that are the old one or the new one, never half of it."""

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

OURS = re.compile(r"\..+\.\d+\.tmp(\.old)?")  # what `temporary` gives, and what storage.artifact moves away
# A checkpoint until the one that replaces it is whole; here, since storage.checkpoint loads Orbax.
ASIDE = re.compile(r"\.(\d+)\.replaced")


def cut(name: str, most: int) -> str:
    """The beginning of a file's name, of so many bytes: file systems count these, of 255, and not letters."""
    return os.fsencode(name)[:most].decode(errors="ignore")


def temporary(path: Path) -> Path:
    """Where this process makes a file or a folder that is to become `path`; `sweep` knows it by its name."""
    return path.with_name(f".{cut(path.name, 200)}.{os.getpid()}.tmp")


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
