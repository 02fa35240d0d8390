"""The folder of pictures as a table: classes, splits, labels, and the files that can't be used."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jaxcats.data.files import IMAGE_EXTENSIONS, FileRecord, cache_folder, examine, list_pictures
from jaxcats.data.holdout import default_manifest, hold_out
from jaxcats.data.layout import (
    check_classes,
    class_files,
    class_names,
    existing_folder,
    extensions,
    split_folders,
    valid_folder,
)
from jaxcats.errors import UserError

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
    """A file that can't be used (relative to the folder scanned), and why."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Split:
    """Pictures of one split, sorted by path.

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

    `seconds` is the time the scan took, `reused` how many files were answered from the cache.
    """

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Split]
    bad: tuple[BadFile, ...]
    seconds: float
    reused: int


@dataclass(frozen=True)
class _Reader:
    """The options that every scan passes to `examine`."""

    cache_dir: Path | None
    rehash: bool
    workers: int | None
    progress: bool
    on_bad_file: str

    def read(self, root: Path, paths: Sequence[str]) -> tuple[dict[str, FileRecord], tuple[BadFile, ...], int]:
        """Good records by path, the bad files, and how many were cached."""
        records, reused = examine(
            root,
            paths,
            cache_dir=self.cache_dir or cache_folder(),
            rehash=self.rehash,
            workers=self.workers,
            progress=self.progress,
        )
        good, bad = {}, []
        for path, record in zip(paths, records, strict=True):
            if record.bad is None:
                good[path] = record
            else:
                bad.append(BadFile(path, record.bad))
        if bad and self.on_bad_file == "fail":
            more = f", and {len(bad) - 5:,} more" if len(bad) > 5 else ""
            raise UserError(
                f"{root}: {len(bad):,} of {len(paths):,} pictures can't be used: {_listed(bad[:5])}{more}; "
                "mend or remove them, or set on_bad_file to skip"
            )
        if bad and not good:
            raise UserError(
                f"{root}: none of the {len(bad):,} pictures can be used, for example {_listed(bad[:3])}; "
                "check that the files are whole pictures in a format that Pillow reads"
            )
        return good, tuple(bad), reused


def scan(
    root: str | Path,
    *,
    valid_fraction: float | None = None,
    seed: int = 0,
    on_bad_file: Literal["skip", "fail"] = "skip",
    cache_dir: str | Path | None = None,
    manifest: str | Path | None = None,
    rehash: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> FolderIndex:
    """Index a folder of pictures for training; every file is decoded once, and remembered while it is unchanged.

    Two layouts: `train/` and `valid/` (or `val/`, `validation/`) with a folder per class in each; or a single folder
    of class folders (or `train/` alone) plus `valid_fraction`. Pictures may be nested inside a class folder; hidden
    files and folders are left out. Nothing under `root` is changed.

    Args:
        valid_fraction: share of each class that goes to "valid", for the second layout only. A picture's side depends
            on its content and `seed`, and is kept in `manifest`, so that it never changes when files come or go.
        on_bad_file: "skip" lists files that can't be decoded in `bad`; "fail" raises.
        cache_dir: what to use in place of `cache_folder()`.
        manifest: JSON file of the split; None puts it in the cache folder, by root, fraction and seed.
        rehash: look at every file again, cached or not.
        workers: decoding threads; None is one per core.

    Raises UserError for a folder that can't be trained on, saying what was looked for and the way out.
    """
    started = time.perf_counter()
    root = existing_folder(root)
    cache_dir = Path(cache_dir) if cache_dir else cache_folder()
    reader = _Reader(cache_dir, rehash, workers, progress, on_bad_file)
    train_top, valid_top = split_folders(root, valid_fraction)
    classes = class_names(train_top)
    if len(classes) == 1:
        raise UserError(f"{train_top}: only one class ({classes[0]}); a classifier needs a folder for each of two")
    if valid_top is not None:
        check_classes(valid_top, class_names(valid_top), classes, against=str(train_top))
    folders = [folder for folder in (train_top, valid_top) if folder is not None]
    members = {folder: class_files(root, folder, classes) for folder in folders}
    good, bad, reused = reader.read(root, [p for folder in folders for paths in members[folder] for p in paths])
    tables = {folder: _usable(folder, classes, members[folder], good, bad) for folder in folders}
    if valid_top is not None:
        splits = {"train": _split(root, tables[train_top], good), "valid": _split(root, tables[valid_top], good)}
    else:
        assert valid_fraction is not None  # split_folders saw to it
        place = Path(manifest) if manifest else default_manifest(cache_dir, root, valid_fraction, seed)
        table = tables[train_top]
        contents = {name: [good[path].sha256 for path in paths] for name, paths in zip(classes, table, strict=True)}
        held = hold_out(contents, fraction=valid_fraction, seed=seed, manifest=place, given=manifest is not None)
        splits = {
            name: _split(root, [[p for p in paths if (good[p].sha256 in held) == side] for paths in table], good)
            for name, side in (("train", False), ("valid", True))
        }
    return FolderIndex(root, classes, splits, bad, time.perf_counter() - started, reused)


def scan_labelled(
    folder: str | Path,
    *,
    classes: Sequence[str],
    on_bad_file: Literal["skip", "fail"] = "skip",
    cache_dir: str | Path | None = None,
    rehash: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[Split, tuple[BadFile, ...]]:
    """Index another folder of labelled pictures, to evaluate a trained classifier on it.

    `folder` holds a folder per class, or a `valid/` (`val/`, `validation/`) that does. Classes are matched by name;
    labels are positions in `classes`. The other arguments are those of `scan`.

    Raises UserError where the class folders aren't exactly `classes`, saying which are missing and which unknown.
    """
    root = existing_folder(folder)
    reader = _Reader(Path(cache_dir) if cache_dir else None, rehash, workers, progress, on_bad_file)
    top = valid_folder(root) or root
    check_classes(top, class_names(top), classes, against="the classifier")
    members = class_files(root, top, classes)
    good, bad, _ = reader.read(root, [path for paths in members for path in paths])
    return _split(root, _usable(top, classes, members, good, bad), good), bad


def scan_unlabelled(
    folder: str | Path,
    *,
    on_bad_file: Literal["skip", "fail"] = "skip",
    cache_dir: str | Path | None = None,
    rehash: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[Split, tuple[BadFile, ...]]:
    """Index any folder of pictures, at any depth, to predict on; labels are -1. Arguments as for `scan`."""
    root = existing_folder(folder)
    reader = _Reader(Path(cache_dir) if cache_dir else None, rehash, workers, progress, on_bad_file)
    paths = list_pictures(root, root)
    if not paths:
        raise UserError(f"{root}: no pictures found at any depth; looked for {extensions()}")
    good, bad, _ = reader.read(root, paths)
    return _split(root, [list(good)], good, first_label=-1), bad


def _usable(
    folder: Path,
    classes: Sequence[str],
    members: list[list[str]],
    good: Mapping[str, FileRecord],
    bad: Sequence[BadFile],
) -> list[list[str]]:
    """The good paths of each class, of which there must be one at least."""
    table = [[path for path in paths if path in good] for paths in members]
    for name, paths, usable in zip(classes, members, table, strict=True):
        if not usable:
            reasons = [file for file in bad if file.path in set(paths)][:3]
            raise UserError(
                f"{folder / name}: none of its {len(paths):,} pictures can be used: {_listed(reasons)}; "
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
