"""Image files on disk: find them, decode each one once, and remember what was learnt while the file is unchanged."""

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import PIL

from jaxcats.common.errors import UserError
from jaxcats.common.io import cache_name, remove_stale_temporaries, warn, write_bytes
from jaxcats.data.images import ImageError, bad_reason, open_image, upright_with_remarks

# HEIC is listed so that a folder of them is answered with a reason (Pillow reads it with a plug-in only).
IMAGE_EXTENSIONS = frozenset(
    "." + name
    for names in ("jpg jpeg jpe jfif png bmp gif webp tif tiff", "ppm pgm pbm pnm jp2 avif heic heif")
    for name in names.split()
)
CACHE_VERSION = 6
SAVE_SECONDS = 60.0  # what a killed process can lose
AT_ONCE = 4096  # files queued for the decoding threads: a queue of all would be larger than the index itself


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What one look at a file said; `bad` is the reason it can't be used, None for a good image.

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


def list_images(folder: Path, root: Path) -> list[str]:
    """Image files at any depth below `folder`, sorted, as paths relative to `root`; hidden names are left out.

    Links to folders are followed as `walk` follows them.
    """
    return sorted(
        Path(here, name).relative_to(root).as_posix()
        for here, names in walk(folder, root)
        for name in names
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS
    )


def walk(folder: Path, root: Path, *, hidden: bool = False) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) at any depth below `folder`, a folder of `root`; hidden ones only if asked.

    Links to folders are followed, except to one that the path has passed already, so that loops end. UserError where
    folders link to each other in so many ways that it would go on for ever all the same.
    """
    steps = folder.relative_to(root).parts
    above = {_identity(Path(root, *steps[:n])) for n in range(len(steps))}
    line, entered = [], set()
    once = again = 0  # names met in first visits of folders, and in later ones

    def refuse(error: OSError) -> None:
        if any(part.startswith(".") for part in Path(error.filename).relative_to(root).parts):
            return
        raise UserError(f"{error.filename}: this folder can't be read ({error.strerror}); allow it, or move it away")

    for here, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        this = _identity(here)
        while line and line[-1][0] != os.path.dirname(here):
            line.pop()
        if this in above or any(this == passed for _, passed in line):
            folders.clear()
            continue
        line.append((here, this))
        met = 1 + len(folders) + len(names)
        once, again = (once, again + met) if this in entered else (once + met, again)
        entered.add(this)
        if again > 10 * once + 10_000:
            raise UserError(f"{here}: links lead to the same folders over and over; remove those between folders")
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        yield here, names


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def inspect_file(path: Path) -> FileRecord:
    """Read and fully decode one file; whatever is wrong with it ends up in the record's `bad`."""
    try:
        status = path.stat()
    except OSError as error:
        return FileRecord(0, 0, bad="broken link" if os.path.islink(path) else bad_reason(error))
    record = FileRecord(status.st_size, status.st_mtime_ns)
    try:
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise ImageError("not an ordinary file")
        content = path.read_bytes()
        if not content:
            raise ImageError("empty file (zero bytes)")
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
        (("ppm", "pgm", "pbm", "pnm"), ("PPM",)),
    )
    for ending in endings
}


def wrong_extension_note(kind: str, suffix: str) -> str:
    """What to say of a file whose content is of another format than its ending says; "" where they agree."""
    agree = kind in _ENDINGS.get(suffix.lower().removeprefix("."), (kind,))
    return "" if agree else f"{kind} by its content, whatever its name says"


def _decode(content: bytes, suffix: str) -> dict[str, Any]:
    with open_image(content) as image:
        picture, said = upright_with_remarks(image, content)
        said += filter(None, [wrong_extension_note(str(image.format), suffix)])
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
    What was looked at before an exception (Ctrl-C, SIGTERM) is kept in it; before a SIGKILL, what was a minute before.
    """
    store = cache_dir / "index" / cache_name(root)
    remove_stale_temporaries(store.parent)
    known = _load_records(store)
    records = {path: known[path] for path in paths if path in known and not rehash and _same(root / path, known[path])}
    todo = [path for path in paths if path not in records]
    reused = len(records)
    if todo:
        from tqdm import tqdm

        pool = ThreadPoolExecutor(workers or os.cpu_count())
        try:
            parts = (todo[at : at + AT_ONCE] for at in range(0, len(todo), AT_ONCE))
            looks = (seen for part in parts for seen in pool.map(inspect_file, [root / path for path in part]))
            bar = tqdm(
                looks,
                total=len(todo),
                desc="checking images",
                unit="file",
                disable=None if progress else True,
                delay=1.0,
            )
            due = monotonic() + SAVE_SECONDS
            for path, record in zip(todo, bar, strict=True):
                records[path] = record
                if (now := monotonic()) > due:
                    _save_records(store, root, known | records)
                    end = monotonic()
                    due = end + max(SAVE_SECONDS, 9 * (end - now))  # of millions it takes long: a tenth of the time
        finally:
            # Without waiting for what the threads are at, which a second Ctrl-C would end before anything is saved.
            pool.shutdown(wait=False, cancel_futures=True)
            if len(records) > reused:
                _save_records(store, root, known | records)
    return [records[path] for path in paths], reused


def _same(path: Path, record: FileRecord) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (record.size, record.mtime_ns)


# Types of a FileRecord's values: of a good image, and of a bad one.
_FIELDS = [[int, int, str, int, int, str, str, bad, str] for bad in (type(None), str)]


def _load_records(store: Path) -> dict[str, FileRecord]:
    try:
        checked, _, text = store.read_bytes().partition(b"\n")
        if checked.decode("ascii") != hashlib.sha256(text).hexdigest():
            raise ValueError("damaged")
        saved = json.loads(text)
        # Another Pillow may decode what this one can't, and the reverse.
        if (saved["version"], saved["pillow"]) != (CACHE_VERSION, PIL.__version__):
            return {}
        for values in saved["files"].values():
            if list(map(type, values)) not in _FIELDS or not re.fullmatch("[0-9a-f]{64}", values[2]):
                raise ValueError("fields out of range")
            said = f"{values[7]}{values[8]}"
            said.encode("utf-8", "surrogateescape")  # ValueError where no report could hold it
            if len(said) > 400:  # twice what is ever said
                raise ValueError("fields out of range")
        return {path: FileRecord(*values) for path, values in saved["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        warn(f"the index cache {store} can't be used ({type(error).__name__}): every image is checked again")
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
        warn(f"the index cache {store} can't be written ({bad_reason(error)}): the images are checked again next time")


def check_targets(targets: dict[str, str | None], inputs: Sequence[str]) -> None:
    """UserError for a file that an output may not replace; better known before ten thousand images than after."""
    taken = {os.path.realpath(path) for path in inputs}
    for name, file in targets.items():
        if file is None or (file == "-" and name in ("csv", "jsonl")):
            continue
        wrong = Path(file).suffix.lower() != ".png" if name == "show" else Path(file).suffix.lower() in IMAGE_EXTENSIONS
        if wrong or file == "-":  # as in --csv *.jpg, where the shell puts a photo
            raise UserError(f"--{name} {file}: expected a {'.png' if name == 'show' else 'text'} file to write.")
        if os.path.realpath(file) in taken:
            raise UserError(f"--{name} {file}: is a file given already; name another.")
        taken.add(os.path.realpath(file))
        other = os.path.lexists(file) and not os.path.isfile(file)  # a folder, or a device that must not be replaced
        if other or not os.access(Path(file).absolute().parent, os.W_OK):
            raise UserError(f"--{name} {file}: can't be written; expected a file in a folder that is there.")
