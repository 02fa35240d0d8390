"""The index: a folder of images as classes, splits, labels and content hashes, and the files that can't be used.

`scan` indexes a folder for training, `scan_labelled` and `scan_unlabelled` another one to evaluate or predict on.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypedDict, Unpack

import numpy as np

from jaxcats.common.errors import UserError, one_line
from jaxcats.common.io import cache_folder
from jaxcats.data.files import FileRecord, inspect_files, list_images
from jaxcats.data.labels import Labelled, Row, existing_folder, extensions, find_labels, find_labels_of, shortened
from jaxcats.data.splits import Rule, default_manifest, split_by_content


@dataclass(frozen=True)
class BadFile:
    """A file that can't be used (relative to the folder scanned), the reason, and its split; "" if nothing says the split."""

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
    """A folder of images, indexed by `scan`.

    Attributes:
        root: the folder, with links resolved.
        classes: in label order.
        splits: "train" and "valid".
        bad: files left out.
        seconds: the time that the scan took.
        reused: how many files the cache knew.
        test: apart from `splits`, so that nothing trains or chooses on it.
        notes: (path, note) of good images with something unusual, and what jaxcats does about it.
        manifest: where the cache keeps the split; None where folders, a table or the user's own manifest say it.
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


class ReadOptions(TypedDict, total=False):
    """How the files of a folder are read.

    Args:
        on_bad_file: "skip" (the default) lists files that can't be decoded, or get no label, in `bad`; "fail" raises.
        cache_dir: used in place of `cache_folder()`.
        rehash: decode every file again, cached or not.
        workers: decoding threads; None is one per core.
        progress: show a bar on a terminal; True by default.
    """

    on_bad_file: Literal["skip", "fail"]
    cache_dir: str | Path | None
    rehash: bool
    workers: int | None
    progress: bool


def scan(
    root: str | Path,
    *,
    labels: str = "folders",
    columns: Mapping[str, str] = MappingProxyType({}),
    group: str | None = None,
    valid_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    manifest: str | Path | None = None,
    kept_manifest: Path | None = None,
    **options: Unpack[ReadOptions],
) -> FolderIndex:
    """Indexes a folder of images for training; every file is decoded once, and remembered while it is unchanged.

    There are two layouts: `train/` and `valid/` (or `val/`, `validation/`), and perhaps `test/`, with a folder per class
    in each; or a single folder of class folders (or `train/` alone) plus `valid_fraction`. Images may be nested inside
    a class folder; hidden files and folders are left out. Nothing under `root` is changed.

    Args:
        labels: "folders": as above. "parent": the folder that an image lies in, at any depth. A regular expression with
            (?P<label>...), searched for in the path below `root` (or below its train/, valid/ and test/). A .csv, .tsv
            or .parquet file with the columns path, label and perhaps split.
        columns: other names of the columns "path", "label" and "split".
        group: images of one group stay in one split when images are held out: a regular expression with (?P<group>...)
            on the path, or a column of the table.
        valid_fraction: share of each class that is held out for "valid", where neither folders nor a table say it. The
            split of an image depends on its content (or group) and `seed`, and is kept in `manifest`, so that it never
            changes when files come, go or are renamed.
        test_fraction: share of each class that is held out for `test`.
        seed: of the images held out.
        manifest: JSON file of the split; None puts it in the cache folder, by root, fraction and seed.
        kept_manifest: a run's copy of the manifest in the cache folder. It is used first: the cache may have been removed
            or be older, and the split can't be made again where images have been added since.
        options: see `ReadOptions`.

    Raises:
        UserError: the folder can't be trained on; the message says what was looked for and the way out.
    """
    started = time.perf_counter()
    root = existing_folder(root)
    rule = Rule(valid_fraction, seed, test_fraction, group) if valid_fraction is not None else None
    labelled = find_labels(root, labels, columns=columns, group=group)
    held_out = {"valid_fraction": valid_fraction, "test_fraction": test_fraction, "group": group}
    _check_held_out(root, labelled, {name: value for name, value in held_out.items() if value is not None})
    good, bad, reused = _read_files(root, labelled, options)
    assignments, place = {}, None
    if rule:
        if manifest:
            place, kept_manifest = Path(manifest), None
        else:
            way = labels if labels == "folders" else " ".join([labels, *columns.values()])
            place = default_manifest(Path(options.get("cache_dir") or cache_folder()), root, rule, way)
        contents: dict[str, list[str]] = {name: [] for name in labelled.classes}
        groups: dict[str, set[str]] = defaultdict(set)
        for row in labelled.rows:
            if row.split == "train" and row.path in good:
                contents[row.label].append(good[row.path].sha256)
                if row.group:
                    groups[good[row.path].sha256].add(row.group)
        if group and not groups:
            raise UserError("data.group: no image is in a group; correct the pattern or the column")
        assignments = split_by_content(
            contents, rule=rule, manifest=place, given=bool(manifest), groups=groups, kept=kept_manifest
        )
        bad = tuple(dataclasses.replace(file, split="") if file.split == "train" else file for file in bad)
    rows_of: dict[str, list[Row]] = defaultdict(list)
    for row in labelled.rows:
        if row.path in good:
            assigned = assignments.get(good[row.path].sha256) if row.split == "train" else None
            rows_of[assigned or row.split].append(row)
    splits = {name: _make_split(root, rows, labelled.classes, good) for name, rows in rows_of.items()}
    to_train = {name: splits[name] for name in ("train", "valid")}
    notes = tuple((path, record.note) for path, record in good.items() if record.note)
    seconds, place = time.perf_counter() - started, None if manifest else place
    return FolderIndex(root, labelled.classes, to_train, bad, seconds, reused, splits.get("test"), notes, place)


def scan_labelled(
    folder: str | Path, *, classes: Sequence[str], labels: str = "folders", **options: Unpack[ReadOptions]
) -> tuple[Split, tuple[BadFile, ...]]:
    """Indexes another folder of labelled images, to evaluate a trained classifier on it.

    Args:
        folder: holds a folder per class, or a `valid/` (`val/`, `validation/`) that does; or its images are labelled by
            "parent" or a pattern.
        classes: of the classifier, matched by name; labels are positions in it.
        labels: as for `scan`, but no table.
        options: see `ReadOptions`.

    Raises:
        UserError: the folder's classes aren't exactly `classes`; says which are missing and which unknown.
    """
    root = existing_folder(folder)
    labelled = find_labels_of(root, labels, classes)
    good, bad, _ = _read_files(root, labelled, options)
    return _make_split(root, [row for row in labelled.rows if row.path in good], classes, good), bad


def scan_unlabelled(folder: str | Path, **options: Unpack[ReadOptions]) -> tuple[Split, tuple[BadFile, ...]]:
    """Indexes any folder of images, at any depth, to predict on; labels are -1. See `ReadOptions` for the options."""
    root = existing_folder(folder)
    paths = list_images(root, root)
    if not paths:
        raise UserError(f"{root}: no images found at any depth; looked for {extensions()}")
    good, bad, _ = _read_files(root, Labelled(("",), [Row(path, "", "") for path in paths], []), options)
    return Split(root, tuple(good), np.full(len(good), -1, np.int32), tuple(r.sha256 for r in good.values())), bad


def skipped(bad: Sequence[BadFile]) -> list[str]:
    """Lines that name the first few of the images left out."""
    lines = [f"skipped {one_line(file.path)}: {file.reason}" for file in bad]
    return lines if len(lines) <= 5 else [*lines[:5], f"... and {len(lines) - 5:,} more images skipped"]


def _check_held_out(root: Path, labelled: Labelled, given: Mapping[str, float | str]) -> None:
    """UserError where what should be held out contradicts the splits that the folder or the table has."""
    splits = {row.split for row in labelled.rows}
    if "valid" not in splits and "valid_fraction" not in given:
        problem = f"{root}: nothing says which images are for validation: there is no valid/ beside train/"
        raise UserError(f"{problem}, and no table names a split; set valid_fraction, for example 0.2")
    for name, value in given.items():
        split = "test" if name == "test_fraction" and "valid" not in splits else "valid"
        if split in splits:
            raise UserError(f"{name}: {value} can't be used: {root} has a {split} split already; leave {name} out")


def _read_files(
    root: Path, labelled: Labelled, options: ReadOptions
) -> tuple[dict[str, FileRecord], tuple[BadFile, ...], int]:
    """Good records by path, the bad files (those without a label first), and how many records were cached.

    Raises:
        UserError: a class has no usable image, or any image is unusable and on_bad_file is "fail".
    """
    split_of = {row.path: row.split for row in labelled.rows}
    inspection: dict[str, Any] = {**options, "cache_dir": Path(options.get("cache_dir") or cache_folder())}
    is_strict = inspection.pop("on_bad_file", "skip") == "fail"
    records, reused = inspect_files(root, list(split_of), **inspection)
    good = {path: record for path, record in zip(split_of, records, strict=True) if record.bad is None}
    bad = [BadFile(path, reason, split_of.get(path, "")) for path, reason in labelled.unlabelled]
    bad += [BadFile(p, r.bad, split_of[p]) for p, r in zip(split_of, records, strict=True) if r.bad is not None]
    n = len(split_of) + len(labelled.unlabelled)
    if bad and (is_strict or not good):
        problem = f"{root}: {len(bad):,} of {n:,} images can't be used: {_listed(bad)}"
        raise UserError(f"{problem}; repair or remove them, or set on_bad_file to skip if the others are enough")
    usable = {(row.split, row.label) for row in labelled.rows if row.path in good}
    for row in labelled.rows:
        if (row.split, row.label) not in usable:
            paths = {other.path for other in labelled.rows if (other.split, other.label) == (row.split, row.label)}
            problem = f"{root}: class {row.label}: none of its {len(paths):,} {row.split} images can be used"
            raise UserError(
                f"{problem}: {_listed([file for file in bad if file.path in paths])}; repair them or add others"
            )
    return good, tuple(bad), reused


def _make_split(root: Path, rows: Sequence[Row], classes: Sequence[str], good: Mapping[str, FileRecord]) -> Split:
    rows = sorted(rows, key=lambda row: row.path)
    label = {name: i for i, name in enumerate(classes)}
    labels = np.array([label[row.label] for row in rows], np.int32)
    return Split(root, tuple(row.path for row in rows), labels, tuple(good[row.path].sha256 for row in rows))


def _listed(files: Sequence[BadFile]) -> str:
    return shortened([f"{file.path} ({file.reason})" for file in files], 5, "; ")
