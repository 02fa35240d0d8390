"""Picture files on disk: find them, decode each one once, and remember what was learnt while the file is unchanged."""

import dataclasses
import hashlib
import json
import os
import stat
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL

from jaxcats.data.preprocess import PictureError, bad_reason, open_picture, remarks, upright
from jaxcats.errors import UserError
from jaxcats.storage.atomic import sweep, write_bytes

# HEIC is listed so that a folder of them is answered with a reason (Pillow reads it with a plug-in only).
IMAGE_EXTENSIONS = frozenset(
    "." + name
    for names in ("jpg jpeg jpe jfif png bmp gif webp tif tiff", "ppm pgm pbm pnm jp2 avif heic heif")
    for name in names.split()
)
CACHE_VERSION = 4
AT_ONCE = 4096  # files queued for the decoding threads: a queue of all would be larger than the index itself


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What one look at a file said; `bad` is the reason it can't be used, None for a good picture.

    `note` is what is unusual about a good one, and what becomes of it.
    """

    size: int
    mtime_ns: int
    sha256: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    format: str = ""
    bad: str | None = None
    note: str = ""


def cache_folder() -> Path:
    """Where jaxcats keeps what it can make again: JAXCATS_CACHE, else XDG_CACHE_HOME/jaxcats, else ~/.cache/jaxcats."""
    if given := os.environ.get("JAXCATS_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxcats"


def list_pictures(folder: Path, root: Path) -> list[str]:
    """Picture files at any depth below `folder`, sorted, as paths relative to `root`; hidden names are left out.

    A folder that is reached twice (through links) is entered once, so that loops end.
    """
    found, seen = [], set()

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: this folder can't be read ({error.strerror}); allow it, or move it away")

    for here, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(here, name).relative_to(root).as_posix()
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS
        ]
    return sorted(found)


def look_at(path: Path) -> FileRecord:
    """Read and fully decode one file; whatever is wrong with it ends up in the record's `bad`."""
    try:
        status = path.stat()
    except OSError as error:
        return FileRecord(0, 0, bad="broken link" if path.is_symlink() else bad_reason(error))
    record = FileRecord(status.st_size, status.st_mtime_ns)
    try:
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise PictureError("not an ordinary file")
        content = path.read_bytes()
        if not content:
            raise PictureError("empty file (zero bytes)")
        record = dataclasses.replace(record, sha256=hashlib.sha256(content).hexdigest())
        return dataclasses.replace(record, **_decode(content, path.suffix))
    except MemoryError:  # it may fit next time: without a hash the record is not kept
        return dataclasses.replace(record, sha256="", bad="too large for the memory that is free")
    except Exception as error:
        return dataclasses.replace(record, bad=bad_reason(error))


# Pillow's formats by ending, where the ending says one.
_ENDINGS = {
    ending: formats
    for endings, formats in (
        (("jpg", "jpeg", "jpe", "jfif"), ("JPEG", "MPO")),
        (("png",), ("PNG",)),
        (("gif",), ("GIF",)),
        (("bmp",), ("BMP", "DIB")),
        (("webp",), ("WEBP",)),
        (("tif", "tiff"), ("TIFF",)),
        (("jp2",), ("JPEG2000",)),
        (("avif",), ("AVIF",)),
        (("heic", "heif"), ("HEIF",)),
    )
    for ending in endings
}


def belied(kind: str, suffix: str) -> str:
    """What to say of a file whose content is of another format than its ending says; "" where they agree."""
    agree = kind in _ENDINGS.get(suffix.lower().removeprefix("."), (kind,))
    return "" if agree else f"{kind} by its content, whatever its name says"


def _decode(content: bytes, suffix: str) -> dict[str, Any]:
    with open_picture(content) as image:
        picture = upright(image)
        said = [*remarks(image), *filter(None, [belied(str(image.format), suffix)])]
        return {
            "width": picture.width,
            "height": picture.height,
            "mode": image.mode,
            "format": image.format,
            "note": "; ".join(said),
        }


def examine(
    root: Path,
    paths: Sequence[str],
    *,
    cache_dir: Path,
    rehash: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[list[FileRecord], int]:
    """One record per path (relative to `root`), and how many of them came from the cache.

    A file is looked at again when its size or its modification time (nanoseconds) differs from what is cached, or
    always with `rehash`. The cache is one file per root, the SHA-256 of its JSON and the JSON; damaged or unwritable, it costs a warning, not the run.
    """
    key = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    store = cache_dir / "index" / f"{root.name or 'root'}-{key}.json"
    sweep(store.parent)
    known = _load_records(store)
    records = {path: known[path] for path in paths if path in known and not rehash and _same(root / path, known[path])}
    todo = [path for path in paths if path not in records]
    reused = len(records)
    if todo:
        from tqdm import tqdm

        pool = ThreadPoolExecutor(workers or os.cpu_count())
        try:
            parts = (todo[at : at + AT_ONCE] for at in range(0, len(todo), AT_ONCE))
            looks = (seen for part in parts for seen in pool.map(look_at, [root / path for path in part]))
            bar = tqdm(
                looks,
                total=len(todo),
                desc="checking pictures",
                unit="file",
                disable=None if progress else True,
                delay=1.0,
            )
            records.update(zip(todo, bar, strict=True))
        finally:
            pool.shutdown(cancel_futures=True)  # so that Ctrl-C doesn't wait for the rest
        _save_records(store, root, known | records)
    return [records[path] for path in paths], reused


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def _same(path: Path, record: FileRecord) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (record.size, record.mtime_ns)


def _load_records(store: Path) -> dict[str, FileRecord]:
    try:
        checked, _, text = store.read_bytes().partition(b"\n")
        if checked.decode("ascii") != hashlib.sha256(text).hexdigest():
            raise ValueError("damaged")
        saved = json.loads(text)
        # Another Pillow may decode what this one can't, and the reverse.
        if (saved["version"], saved["pillow"]) != (CACHE_VERSION, PIL.__version__):
            return {}
        records = {path: FileRecord(*values) for path, values in saved["files"].items()}
        if not all(len(record.sha256) == 64 for record in records.values()):
            raise ValueError("fields out of range")
        return records
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warn(f"the index cache {store} can't be used ({type(error).__name__}): every picture is checked again")
        return {}


def _save_records(store: Path, root: Path, records: dict[str, FileRecord]) -> None:
    # Without a hash the content was never read (no permission, say), which can change while size and time don't.
    kept = {
        path: dataclasses.astuple(record)
        for path, record in sorted(records.items())
        if record.sha256 and os.path.lexists(root / path)
    }
    try:
        text = json.dumps({"version": CACHE_VERSION, "pillow": PIL.__version__, "files": kept}).encode()
        # A wrong digit in it would be believed for ever: the first line is the hash of the rest.
        write_bytes(store, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    except OSError as error:
        warn(
            f"the index cache {store} can't be written ({bad_reason(error)}): the pictures are checked again next time"
        )
