"""Image files on disk: lists them, decodes each one once, and caches the result until the file changes.

`index` and `quality` use it; `check_targets` keeps the outputs of predict and doctor from replacing a user's file.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TypeVar

import PIL
from PIL import Image

from jaxcats.common.errors import UserError
from jaxcats.common.io import cache_name, remove_stale_temporaries, warn, write_bytes
from jaxcats.data.images import FORMATS, Decoded, ImageError, bad_reason, decode, open_image

T = TypeVar("T")
IMAGE_EXTENSIONS = frozenset(f".{extension}" for extensions in FORMATS.values() for extension in extensions)
CACHE_VERSION = 7
SAVE_SECONDS = 60.0  # the work that a killed process can lose
MOST_VISITS = 1000  # of one folder, by different paths of links
QUEUE = 4096  # files given to the decoding threads at a time: a queue of all would be larger than the index itself


@dataclass(frozen=True, slots=True)
class FileRecord:
    """The result of decoding a file.

    Attributes:
        bad: the reason why the file can't be used; None for a good image.
        note: what is unusual about a good image, and what jaxcats does about it; "" for nothing.
    """

    size: int
    mtime_ns: int
    sha256: str = ""
    bad: str | None = None
    note: str = ""


def list_images(folder: Path, root: Path) -> list[str]:
    """Image files at any depth below `folder`, sorted, as paths relative to `root`; hidden names are left out."""
    return sorted(
        Path(here, name).relative_to(root).as_posix()
        for here, names in walk(folder, root)
        for name in names
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS
    )


def subfolders(folder: Path) -> list[str]:
    """The names of the folders inside that aren't hidden, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def walk(folder: Path, root: Path, *, hidden: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yields (folder, names of its files) at any depth below `folder`, which lies in `root`; hidden folders only if asked.

    Links to folders are followed, except to a folder that the path already contains, so that loops end.

    Raises:
        UserError: a folder can't be read, or folders link to each other in so many ways that the walk would not end.
    """

    def fail(error: OSError) -> None:
        if not any(part.startswith(".") for part in Path(error.filename).relative_to(root).parts):
            problem = f"{error.filename}: can't be read ({error.strerror})"
            raise UserError(f"{problem}; allow it, or move the folder away") from None

    visits: Counter[tuple[int, int]] = Counter()
    above = [path for path in folder.parents if path.is_relative_to(root)]
    # The folders on the way to each folder, by device and inode.
    way_to = {os.path.dirname(folder): frozenset((status.st_dev, status.st_ino) for status in map(os.stat, above))}
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        status, way = os.stat(here), way_to[os.path.dirname(here)]
        identity = (status.st_dev, status.st_ino)
        if identity in way:
            folders.clear()
            continue
        visits[identity] += 1
        if visits[identity] > MOST_VISITS:
            raise UserError(f"{here}: links lead to the same folders over and over; remove those between folders")
        way_to[here] = way | {identity}
        yield here, names


def inspect_file(path: Path, check: Callable[[Image.Image, Decoded], None] | None = None) -> FileRecord:
    """Reads and fully decodes one file; whatever is wrong with it ends up in the record's `bad`.

    Args:
        check: called with the image as Pillow opened it and as it was decoded. Whatever it raises makes the file bad, as
            a damaged file may show only now.
    """
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
        # The pixels are used inside the block: closing a file of several frames also closes its image.
        with open_image(content) as image:
            decoded = decode(image, content)
            if check:
                check(image, decoded)
            notes = [*decoded.notes, wrong_extension_note(image, path)]
            return dataclasses.replace(record, note="; ".join(filter(None, notes)))
    except MemoryError:  # it may fit next time: without a hash the record is not cached
        return dataclasses.replace(record, sha256="", bad="too large for the memory that is free")
    except Exception as error:
        return dataclasses.replace(record, bad=bad_reason(error))


def wrong_extension_note(image: Image.Image, path: Path) -> str:
    """A note on an image whose content is of another format than its name's extension says; "" where they agree."""
    extension = path.suffix.lower()
    if extension not in IMAGE_EXTENSIONS or extension[1:] in FORMATS.get(image.format or "", ()):
        return ""
    return f"{image.format} by its content, whatever its name says"


def inspect_files(
    root: Path,
    paths: Sequence[str],
    *,
    cache_dir: Path,
    rehash: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[list[FileRecord], int]:
    """One record per path (relative to `root`), and how many of them came from the cache.

    A file is decoded again when its size or its modification time (nanoseconds) differs from the cached one, and always
    with `rehash`. The cache is one file per root, which starts with the SHA-256 of the rest; if it is
    damaged or can't be written, a warning appears and the run continues. Records made before an exception (Ctrl-C,
    SIGTERM) are saved; a SIGKILL loses those of the last minute.
    """
    cache_file = cache_dir / "index" / cache_name(root)
    remove_stale_temporaries(cache_file.parent)
    cached = _load_records(cache_file)
    records = {p: cached[p] for p in paths if p in cached and not rehash and _is_unchanged(root / p, cached[p])}
    todo = [path for path in paths if path not in records]
    reused, due = len(records), monotonic() + SAVE_SECONDS
    fresh = map_files(inspect_file, [root / path for path in todo], "checking images", workers, progress=progress)
    try:
        for path, record in zip(todo, fresh, strict=True):
            records[path] = record
            if monotonic() > due:
                _save_records(cache_file, root, cached | records)
                due = monotonic() + SAVE_SECONDS
    finally:
        if len(records) > reused:
            _save_records(cache_file, root, cached | records)
    return [records[path] for path in paths], reused


def map_files(
    function: Callable[[Path], T], files: Sequence[Path], title: str, workers: int | None = None, *, progress: bool
) -> Iterator[T]:
    """The function's result for each file, computed in threads (None: one per core), with a progress bar on a terminal."""
    from tqdm import tqdm

    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        parts = (files[start : start + QUEUE] for start in range(0, len(files), QUEUE))
        results = (result for part in parts for result in pool.map(function, part))
        disable = None if progress else True  # None: unless stderr is a terminal
        yield from tqdm(results, total=len(files), desc=title, unit="file", disable=disable, delay=1.0)
    finally:
        # Without waiting for the threads, which a second Ctrl-C would end before the index saves its records.
        pool.shutdown(wait=False, cancel_futures=True)


def _is_unchanged(path: Path, record: FileRecord) -> bool:
    with contextlib.suppress(OSError):
        status = path.stat()
        return (status.st_size, status.st_mtime_ns) == (record.size, record.mtime_ns)
    return False


def _load_records(cache_file: Path) -> dict[str, FileRecord]:
    try:
        digest, _, text = cache_file.read_bytes().partition(b"\n")
        if digest != hashlib.sha256(text).hexdigest().encode():
            raise ValueError
        saved = json.loads(text)
        # Another Pillow may decode what this one can't, and the reverse.
        if (saved["version"], saved["pillow"]) != (CACHE_VERSION, PIL.__version__):
            return {}
        return {path: FileRecord(*values) for path, values in saved["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        warn(f"the index cache {cache_file} can't be used ({type(error).__name__}): every image is checked again")
        return {}


def _save_records(cache_file: Path, root: Path, records: dict[str, FileRecord]) -> None:
    # Without a hash the content was never read (no permission, say), which can change while size and time don't.
    kept = {path: r for path, r in sorted(records.items()) if r.sha256 and os.path.lexists(root / path)}
    saved = {path: dataclasses.astuple(record) for path, record in kept.items()}
    try:
        text = json.dumps({"version": CACHE_VERSION, "pillow": PIL.__version__, "files": saved}).encode()
        # The first line is the hash of the rest, so that a damaged record is detected.
        write_bytes(cache_file, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    except OSError as error:
        warn(f"the index cache {cache_file} can't be written ({error.strerror}): images are checked again next time")


def check_targets(targets: dict[str, str | None], inputs: Sequence[str]) -> None:
    """Checks, before any work is done, that the files of a command's output flags may be written.

    Args:
        targets: flag -> its file; None where it isn't given, and "-" for stdout.
        inputs: the command's input files, which no output may replace.

    Raises:
        UserError: a target is an image, an input, another flag's file, or can't be written.
    """
    taken = {os.path.realpath(path) for path in inputs}
    for flag, file in targets.items():
        if file is None or (file == "-" and flag in ("csv", "jsonl")):
            continue
        suffix = Path(file).suffix.lower()
        is_wrong = suffix != ".png" if flag == "show" else suffix in IMAGE_EXTENSIONS
        if is_wrong or file == "-":  # as in --csv *.jpg, where the shell inserts a photo's name
            raise UserError(f"--{flag} {file}: expected a {'.png' if flag == 'show' else 'text'} file to write.")
        if os.path.realpath(file) in taken:
            raise UserError(f"--{flag} {file}: is an input or another output already; name another file.")
        taken.add(os.path.realpath(file))
        is_other = os.path.lexists(file) and not os.path.isfile(file)  # a folder, or a device that must not be replaced
        if is_other or not os.access(Path(file).absolute().parent, os.W_OK):
            raise UserError(f"--{flag} {file}: can't be written; expected a file in a folder that exists.")
