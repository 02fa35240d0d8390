"""The folder of images as a table: classes, splits, labels, and the files that can't be used."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from jaxcats.common.errors import UserError, one_line
from jaxcats.common.io import cache_folder
from jaxcats.data.files import IMAGE_EXTENSIONS, FileRecord, examine, list_images
from jaxcats.data.labels import Labelled, existing_folder, extensions, find_labels, grouping, labelled_images
from jaxcats.data.splits import Rule, default_manifest, split_by_content

__all__ = [
    "IMAGE_EXTENSIONS",
    "BadFile",
    "FolderIndex",
    "Split",
    "cache_folder",
    "scan",
    "scan_labelled",
    "scan_unlabelled",
]


@dataclass(frozen=True)
class BadFile:
    """A file that can't be used (relative to the folder scanned), why, and of which split it would be; "" if nothing says."""

    path: str
    reason: str
    split: str = ""


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one split, sorted by path.

    Attributes:
        root: the folder that `paths` are relative to.
        paths: N of them, with forward slashes.
        labels: int32 [N], indices of classes; -1 where there is none.
        hashes: SHA-256 of each file's content, in hex.
    """

    root: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    hashes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)
class FolderIndex:
    """What `scan` found: classes in label order, the splits "train" and "valid", and the files left out.

    `seconds` is the time the scan took, `reused` how many files were answered from the cache. `test` stands apart, so that
    nothing trains or chooses on it. `notes` are what is unusual about good images, and what becomes of them. `manifest`
    is where the cache keeps which side each image is on; None where folders, a table or the user's own manifest say so.
    """

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Split]
    bad: tuple[BadFile, ...]
    seconds: float
    reused: int
    test: Split | None = None
    notes: tuple[tuple[str, str], ...] = ()
    manifest: Path | None = None


@dataclass(frozen=True)
class _Reader:
    """The options that every scan passes to `examine`."""

    cache_dir: Path | None
    rehash: bool
    workers: int | None
    progress: bool
    on_bad_file: str

    def read(
        self, root: Path, paths: Sequence[str], without: Sequence[tuple[str, str]] = ()
    ) -> tuple[dict[str, FileRecord], tuple[BadFile, ...], int]:
        """Good records by path, the bad files, those `without` a label (image, reason) first, and how many were cached."""
        records, reused = examine(
            root,
            paths,
            cache_dir=self.cache_dir or cache_folder(),
            rehash=self.rehash,
            workers=self.workers,
            progress=self.progress,
        )
        good, bad = {}, [BadFile(*each) for each in without]
        for path, record in zip(paths, records, strict=True):
            if record.bad is None:
                good[path] = record
            else:
                bad.append(BadFile(path, record.bad))
        if bad and self.on_bad_file == "fail":
            more = f", and {len(bad) - 5:,} more" if len(bad) > 5 else ""
            raise UserError(
                f"{root}: {len(bad):,} of {len(paths) + len(without):,} images can't be used: {_listed(bad[:5])}{more}; "
                "mend or remove them, or set on_bad_file to skip"
            )
        if bad and not good:
            raise UserError(
                f"{root}: none of the {len(bad):,} images can be used, for example {_listed(bad[:3])}; "
                "check that the files are whole images in a format that Pillow reads"
            )
        return good, tuple(bad), reused


def scan(
    root: str | Path,
    *,
    labels: str = "folders",
    columns: Mapping[str, str] = MappingProxyType({}),
    group: str | None = None,
    valid_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    on_bad_file: Literal["skip", "fail"] = "skip",
    cache_dir: str | Path | None = None,
    manifest: str | Path | None = None,
    kept_manifest: Path | None = None,
    rehash: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> FolderIndex:
    """Index a folder of images for training; every file is decoded once, and remembered while it is unchanged.

    Two layouts: `train/` and `valid/` (or `val/`, `validation/`), and perhaps `test/`, with a folder per class in each; or
    a single folder of class folders (or `train/` alone) plus `valid_fraction`. Images may be nested inside a class
    folder; hidden files and folders are left out. Nothing under `root` is changed.

    Args:
        labels: "folders": as above. "parent": the folder that an image lies in, at any depth. A regular expression with
            (?P<label>...), searched for in the path below `root` (or below its train/, valid/ and test/). A .csv, .tsv
            or .parquet file with the columns path, label and perhaps split.
        columns: other names of the columns "path", "label" and "split".
        group: images of one group stay on one side when they are held out: a regular expression with (?P<group>...) on
            the path, or a column of the table.
        valid_fraction: share of each class that goes to "valid", where neither folders nor a table say what does. A
            image's side depends on its content (or group) and `seed`, and is kept in `manifest`, so that it never
            changes when files come, go or are renamed.
        test_fraction: likewise for `test`.
        on_bad_file: "skip" lists files that can't be decoded, or get no label, in `bad`; "fail" raises.
        cache_dir: what to use in place of `cache_folder()`.
        manifest: JSON file of the split; None puts it in the cache folder, by root, fraction and seed.
        kept_manifest: a run's copy of the one in the cache folder, which goes before it: that may have gone, or be of
            another time, and where images have come since the first split it can't be made again.
        rehash: look at every file again, cached or not.
        workers: decoding threads; None is one per core.

    Raises UserError for a folder that can't be trained on, saying what was looked for and the way out.
    """
    started = time.perf_counter()
    root = existing_folder(root)
    cache_dir = Path(cache_dir) if cache_dir else cache_folder()
    reader = _Reader(cache_dir, rehash, workers, progress, on_bad_file)
    found = find_labels(root, labels, valid_fraction=valid_fraction, columns=columns, group=group)
    held = "valid" not in found.parts
    _check_holding(root, found, held, valid_fraction, test_fraction, group)
    every = [path for part in found.parts.values() for paths in part for path in paths]
    good, bad, reused = reader.read(root, every, found.bad)
    known = [name for name in found.parts if not (held and name == "train")]
    of_split = {path: name for name in known for paths in found.parts[name] for path in paths} if bad else {}
    bad = tuple(dataclasses.replace(b, split=of_split.get(b.path, "")) for b in bad)
    tables = {name: _usable(name, found, good, bad) for name in found.parts}
    if held:
        assert valid_fraction is not None  # _check_holding saw to it
        rule = Rule(valid_fraction, seed, test_fraction, group)
        way = labels if labels == "folders" else " ".join([labels, *columns.values()])
        place = Path(manifest) if manifest else default_manifest(cache_dir, root, rule, way)
        table = tables.pop("train")
        contents = {
            name: [good[path].sha256 for path in paths] for name, paths in zip(found.classes, table, strict=True)
        }
        groups = _groups(grouping(group, found), table, good) if group else None
        kept = None if manifest else kept_manifest
        sides = split_by_content(
            contents, rule=rule, manifest=place, given=manifest is not None, groups=groups, kept=kept
        )
        for name in ("train", "valid", "test"):
            of_it = [[path for path in paths if sides[good[path].sha256] == name] for paths in table]
            if any(of_it):
                tables[name] = of_it
    splits = {name: _split(root, tables[name], good) for name in ("train", "valid")}
    test = _split(root, tables["test"], good) if "test" in tables else None
    notes = tuple((path, record.note) for path, record in good.items() if record.note)
    seconds, of_cache = time.perf_counter() - started, place if held and not manifest else None
    return FolderIndex(root, found.classes, splits, bad, seconds, reused, test, notes, of_cache)


def _check_holding(
    root: Path,
    found: Labelled,
    held: bool,
    valid_fraction: float | None,
    test_fraction: float | None,
    group: str | None,
) -> None:
    """UserError where what is asked to be held out doesn't fit what the folder or the table says."""
    if held and valid_fraction is None:
        raise UserError(f"{root}: nothing says which images are for validation; set valid_fraction, for example 0.2")
    for name, value in (("valid_fraction", valid_fraction), ("test_fraction", test_fraction), ("group", group)):
        if value is not None and not held:
            raise UserError(f"{name}: {value} given, but {root} has its own validation images; leave {name} out")
    if test_fraction is not None and "test" in found.parts:
        raise UserError(
            f"test_fraction: {test_fraction} given, but {root} has its own test images; leave test_fraction out"
        )
    for name, value in (("valid_fraction", valid_fraction), ("test_fraction", test_fraction)):
        if value is not None and not 0 < value < 1:
            raise UserError(f"{name}: {value} is not between 0 and 1; 0.2 holds out a fifth")
    if (valid_fraction or 0) + (test_fraction or 0) >= 1:
        raise UserError(
            f"valid_fraction, test_fraction: {valid_fraction} and {test_fraction} leave nothing to train on; expected less "
            f"than 1 together"
        )


def _groups(
    function_name: Callable[[str], str | None],
    table: Sequence[Sequence[str]],
    good: Mapping[str, FileRecord],
) -> dict[str, set[str]]:
    """The groups of each content; UserError where no image has one."""
    found: dict[str, set[str]] = {}
    for path in (path for paths in table for path in paths):
        name = function_name(path)
        if name:
            found.setdefault(good[path].sha256, set()).add(name)
    if not found:
        raise UserError("data.group: no image is in a group; look at the pattern or the column again")
    return found


def scan_labelled(
    folder: str | Path,
    *,
    classes: Sequence[str],
    labels: str = "folders",
    on_bad_file: Literal["skip", "fail"] = "skip",
    cache_dir: str | Path | None = None,
    rehash: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[Split, tuple[BadFile, ...]]:
    """Index another folder of labelled images, to evaluate a trained classifier on it.

    `folder` holds a folder per class, or a `valid/` (`val/`, `validation/`) that does; or its images are labelled by
    "parent" or a pattern. Classes are matched by name; labels are positions in `classes`. The other arguments are those
    of `scan`.

    Raises UserError where the class folders aren't exactly `classes`, saying which are missing and which unknown.
    """
    root = existing_folder(folder)
    reader = _Reader(Path(cache_dir) if cache_dir else None, rehash, workers, progress, on_bad_file)
    found = labelled_images(root, labels, classes)
    good, bad, _ = reader.read(root, [path for paths in found.parts["valid"] for path in paths], found.bad)
    return _split(root, _usable("valid", found, good, bad), good), bad


def scan_unlabelled(
    folder: str | Path,
    *,
    on_bad_file: Literal["skip", "fail"] = "skip",
    cache_dir: str | Path | None = None,
    rehash: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[Split, tuple[BadFile, ...]]:
    """Index any folder of images, at any depth, to predict on; labels are -1. Arguments as for `scan`."""
    root = existing_folder(folder)
    reader = _Reader(Path(cache_dir) if cache_dir else None, rehash, workers, progress, on_bad_file)
    paths = list_images(root, root)
    if not paths:
        raise UserError(f"{root}: no images found at any depth; looked for {extensions()}")
    good, bad, _ = reader.read(root, paths)
    return _split(root, [list(good)], good, first_label=-1), bad


def _usable(split: str, found: Labelled, good: Mapping[str, FileRecord], bad: Sequence[BadFile]) -> list[list[str]]:
    """The good paths of each class, of which there must be one at least, but for a test split."""
    members = found.parts[split]
    table = [[path for path in paths if path in good] for paths in members]
    for name, paths, usable in zip(found.classes, members, table, strict=True):
        if paths and not usable:
            own = set(paths)
            reasons = [file for file in bad if file.path in own][:3]
            raise UserError(
                f"{found.places[split]}{name}: none of its {len(paths):,} images can be used: {_listed(reasons)}; "
                "mend them, add others, or remove the folder if it is no class"
            )
    return table


def _split(root: Path, table: list[list[str]], good: Mapping[str, FileRecord], *, first_label: int = 0) -> Split:
    pairs = sorted((path, label) for label, paths in enumerate(table, first_label) for path in paths)
    records = [good[path] for path, _ in pairs]
    return Split(
        root=root,
        paths=tuple(path for path, _ in pairs),
        labels=np.array([label for _, label in pairs], np.int32),
        hashes=tuple(record.sha256 for record in records),
    )


def _listed(files: Sequence[BadFile]) -> str:
    return "; ".join(f"{file.path} ({file.reason})" for file in files)


def skipped(bad: "Sequence[BadFile]", most: int = 5) -> list[str]:
    """Lines that name the images left out, the first few of them."""
    lines = [f"skipped {one_line(b.path)}: {b.reason}" for b in bad[:most]]
    return lines + ([f"... and {len(bad) - most:,} more images skipped"] if len(bad) > most else [])
