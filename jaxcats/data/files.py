"""Image files on disk: lists them, decodes each one once, and caches what that showed while the file is unchanged.

`index` and `quality` use it; `check_targets` keeps the outputs of predict and doctor from replacing a user's file.
"""

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import PIL
from PIL import Image

from jaxcats.common.errors import UserError
from jaxcats.common.io import cache_name, remove_stale_temporaries, warn, write_bytes
from jaxcats.data.images import FORMATS, Decoded, ImageError, bad_reason, decode, open_image

IMAGE_EXTENSIONS = frozenset(f".{extension}" for extensions in FORMATS.values() for extension in extensions)
CACHE_VERSION = 6
SAVE_SECONDS = 60.0  # the work that a killed process can lose
MOST_VISITS = 1000  # of one folder, by different paths of links
QUEUE = 4096  # files given to the decoding threads at a time: a queue of all would be larger than the index itself


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What decoding a file showed.

    Attributes:
        bad: the reason why the file can't be used; None for a good image.
        note: what is unusual about a good image, and what jaxcats does about it; "" for nothing.
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
    visits: Counter[tuple[int, int]] = Counter()

    def visit(here: str, parents: frozenset[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
        folders, names = [], []
        try:
            identity = _identity(here)
            if identity in parents:
                return
            with os.scandir(here) as entries:
                for entry in entries:
                    (folders if _is_folder(entry) else names).append(entry.name)
        except OSError as error:
            if any(part.startswith(".") for part in Path(here).relative_to(root).parts):
                return
            raise UserError(f"{here}: can't be read ({error.strerror}); allow it, or move the folder away") from None
        visits[identity] += 1
        if visits[identity] > MOST_VISITS:
            raise UserError(f"{here}: links lead to the same folders over and over; remove those between folders")
        yield here, names
        for name in sorted(folders):
            if hidden or not name.startswith("."):
                yield from visit(os.path.join(here, name), parents | {identity})

    steps = folder.relative_to(root).parts
    yield from visit(str(folder), frozenset(_identity(Path(root, *steps[:n])) for n in range(len(steps))))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


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
        # Pixels are worked on inside: a file of several frames takes its image with it as it is closed.
        with open_image(content) as image:
            decoded = decode(image, content)
            if check:
                check(image, decoded)
            return dataclasses.replace(
                record,
                width=decoded.image.width,
                height=decoded.image.height,
                mode=image.mode,
                format=image.format or "",
                note="; ".join(filter(None, [*decoded.notes, wrong_extension_note(image, path)])),
            )
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
    with `rehash`. The cache is one file per root, which starts with the SHA-256 of the rest; damaged or unwritable, it
    costs a warning, not the run. Records made before an exception (Ctrl-C, SIGTERM) are saved; before a SIGKILL, those
    of a minute before.
    """
    cache_file = cache_dir / "index" / cache_name(root)
    remove_stale_temporaries(cache_file.parent)
    cached = _load_records(cache_file)
    records = {p: cached[p] for p in paths if p in cached and not rehash and _is_unchanged(root / p, cached[p])}
    todo = [path for path in paths if path not in records]
    reused = len(records)
    if todo:
        from tqdm import tqdm

        pool = ThreadPoolExecutor(workers or os.cpu_count())
        try:
            parts = (todo[start : start + QUEUE] for start in range(0, len(todo), QUEUE))
            fresh = (record for part in parts for record in pool.map(inspect_file, [root / path for path in part]))
            disable = None if progress else True
            bar = tqdm(fresh, total=len(todo), desc="checking images", unit="file", disable=disable, delay=1.0)
            due = monotonic() + SAVE_SECONDS
            for path, record in zip(todo, bar, strict=True):
                records[path] = record
                if (now := monotonic()) > due:
                    _save_records(cache_file, root, cached | records)
                    end = monotonic()
                    due = end + max(SAVE_SECONDS, 9 * (end - now))  # saving millions is slow: a tenth of the time
        finally:
            # Without waiting for the threads, which a second Ctrl-C would end before anything is saved.
            pool.shutdown(wait=False, cancel_futures=True)
            if len(records) > reused:
                _save_records(cache_file, root, cached | records)
    return [records[path] for path in paths], reused


def _is_unchanged(path: Path, record: FileRecord) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (record.size, record.mtime_ns)


def _load_records(cache_file: Path) -> dict[str, FileRecord]:
    try:
        digest, _, text = cache_file.read_bytes().partition(b"\n")
        if digest.decode("ascii") != hashlib.sha256(text).hexdigest():
            raise ValueError("damaged")
        saved = json.loads(text)
        # Another Pillow may decode what this one can't, and the reverse.
        if (saved["version"], saved["pillow"]) != (CACHE_VERSION, PIL.__version__):
            return {}
        return {path: _check_record(FileRecord(*values)) for path, values in saved["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        warn(f"the index cache {cache_file} can't be used ({type(error).__name__}): every image is checked again")
        return {}


def _check_record(record: FileRecord) -> FileRecord:
    numbers = (record.size, record.mtime_ns, record.width, record.height)
    texts = [record.sha256, record.mode, record.format, record.note, "" if record.bad is None else record.bad]
    valid = all(type(number) is int for number in numbers) and all(type(text) is str for text in texts)
    shown = "".join(texts[-2:]) if valid else ""
    shown.encode("utf-8", "surrogateescape")  # ValueError where no report could hold it
    if not valid or not re.fullmatch("[0-9a-f]{64}", record.sha256) or len(shown) > 400:  # twice the longest text
        raise ValueError("fields out of range")
    return record


def _save_records(cache_file: Path, root: Path, records: dict[str, FileRecord]) -> None:
    # Without a hash the content was never read (no permission, say), which can change while size and time don't.
    saved = {
        path: dataclasses.astuple(record)
        for path, record in sorted(records.items())
        if record.sha256 and os.path.lexists(root / path)
    }
    try:
        text = json.dumps({"version": CACHE_VERSION, "pillow": PIL.__version__, "files": saved}).encode()
        # A wrong digit in a record would be believed for ever: the first line is the hash of the rest.
        write_bytes(cache_file, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    except OSError as error:
        reason = bad_reason(error)
        warn(f"the index cache {cache_file} can't be written ({reason}): the images are checked again next time")


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
        if is_wrong or file == "-":  # as in --csv *.jpg, where the shell puts a photo
            raise UserError(f"--{flag} {file}: expected a {'.png' if flag == 'show' else 'text'} file to write.")
        if os.path.realpath(file) in taken:
            raise UserError(f"--{flag} {file}: is a file given already; name another.")
        taken.add(os.path.realpath(file))
        is_other = os.path.lexists(file) and not os.path.isfile(file)  # a folder, or a device that must not be replaced
        if is_other or not os.access(Path(file).absolute().parent, os.W_OK):
            raise UserError(f"--{flag} {file}: can't be written; expected a file in a folder that exists.")
