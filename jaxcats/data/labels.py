"""Where the labels of pictures come from: the folders they lie in, a pattern on their names, or a table."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxcats.data.files import list_pictures
from jaxcats.data.label_rule import compiled, way
from jaxcats.data.layout import (
    check_classes,
    class_files,
    class_names,
    shortened,
    split_folders,
    subfolders,
    test_folder,
    valid_folder,
)
from jaxcats.data.table import Row, read_table
from jaxcats.errors import UserError


@dataclass(frozen=True)
class Labelled:
    """Pictures with their labels, before any is opened.

    Attributes:
        classes: in label order.
        parts: split ("train", "valid", "test") -> for each class its pictures, relative to the root. Without "valid"
            it has to be held out of "train".
        bad: (picture, reason) of those that have no label.
        places: what to call a class of a split in messages: split -> the text that a class's name is added to.
        columns: further columns of the table: name -> picture -> value.
    """

    classes: tuple[str, ...]
    parts: dict[str, list[list[str]]]
    bad: tuple[tuple[str, str], ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def find_labels(
    root: Path, labels: str, *, valid_fraction: float | None, columns: Mapping[str, str], group: str | None = None
) -> Labelled:
    """The pictures under `root` (resolved) with the labels that `labels` gives them; see `scan` for the arguments.

    Raises UserError where the folder or the table can't be used so.
    """
    kind = way(labels)
    if kind == "folders":
        return _from_folders(root, valid_fraction)
    if kind == "table":
        wanted = {group} if group and "(?P<" not in group else set()
        rows, bad = read_table(root, labels, columns, further=wanted)
        found = _from_rows(root, rows, bad, f"{labels}: class ")
        return _with_columns(found, rows, wanted)
    return _from_names(root, labels, valid_fraction)


def _from_folders(root: Path, valid_fraction: float | None) -> Labelled:
    train, valid = split_folders(root, valid_fraction)
    if train == root:
        _no_split_apart(root)
    classes = class_names(train)
    if len(classes) == 1:
        raise UserError(f"{train}: only one class ({classes[0]}); a classifier needs a folder for each of two")
    if valid is not None:
        check_classes(valid, class_names(valid), classes, against=str(train))
    test = test_folder(root) if train != root else None
    # A test folder without these classes holds pictures without labels, and is left alone.
    if test is not None and set(classes) != set(subfolders(test)):
        test = None
    tops = {"train": train, "valid": valid, "test": test}
    if test is not None and not list_pictures(test, root):  # laid out, but still empty
        tops["test"] = None
    there = {name: top for name, top in tops.items() if top is not None}
    parts = {name: class_files(root, top, classes) for name, top in there.items()}
    return Labelled(classes, parts, places={name: f"{top}{os.sep}" for name, top in there.items()})


def _from_names(root: Path, labels: str, valid_fraction: float | None) -> Labelled:
    """By the folder that a picture lies in, at any depth, or by a pattern on its path."""
    top, valid = root, None
    if (root / "train").is_dir():
        top, valid = split_folders(root, valid_fraction)
    else:
        _no_split_apart(root)
        if valid_fraction is None:
            raise UserError(
                f"{root}: nothing says which pictures are for validation; set data.valid_fraction, for example 0.2, or give "
                f"it train/ and valid/."
            )
    tops = {"train": top, "valid": valid, "test": test_folder(root) if top != root else None}
    rows, bad = [], []
    for split, folder in tops.items():
        if folder is not None:
            with_label, without = _named(root, folder, labels)
            rows += [Row(path, label, split) for path, label in with_label]
            # A test folder may hold pictures without labels.
            bad += without if split != "test" or with_label else []
    if not rows:
        raise UserError(f"{root}: no picture gets a label from data.labels {labels!r}{_for_example(bad)}.")
    return _from_rows(root, rows, bad, f"{root}: class ")


def _no_split_apart(root: Path) -> None:
    """UserError where a folder that is to be trained on as a whole has a split in it."""
    if apart := valid_folder(root) or test_folder(root):
        raise UserError(
            f"{root}: has {apart.name}/ but no train/, so its pictures would be among those to train on; put the others in "
            f"train/, or move {apart.name}/ away."
        )


def _for_example(bad: Sequence[tuple[str, str]]) -> str:
    return f"; for example {shortened([path for path, _ in bad], 3)}" if bad else ""


def _named(root: Path, folder: Path, labels: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(picture, label) by "parent" or a pattern on the path below `folder`, and (picture, why it has none)."""
    label, why = labeller(labels), "lies in no folder" if labels == "parent" else "data.labels doesn't match its name"
    found = [(path, label(os.path.relpath(root / path, folder))) for path in list_pictures(folder, root)]
    return [(path, name) for path, name in found if name], [(path, why) for path, name in found if not name]


def labelled_pictures(root: Path, labels: str, classes: Sequence[str]) -> Labelled:
    """The pictures of another folder (in its valid/ where it has one) with labels of these classes, as "valid".

    Raises UserError where the classes found aren't exactly `classes`.
    """
    top = valid_folder(root) or root
    if labels == "folders":
        check_classes(top, class_names(top), classes, against="the classifier")
        return Labelled(tuple(classes), {"valid": class_files(root, top, classes)}, places={"valid": f"{top}{os.sep}"})
    rows, bad = _named(root, top, labels)
    by_label: dict[str, list[str]] = {}
    for path, label in rows:
        by_label.setdefault(label, []).append(path)
    check_classes(top, list(by_label), classes, against="the classifier", what="classes")
    return Labelled(tuple(classes), {"valid": [by_label[c] for c in classes]}, tuple(bad), {"valid": f"{top}: class "})


def labeller(labels: str) -> Callable[[str], str | None]:
    """From a picture's path to its label, None where it has none, for "parent" or a pattern."""
    if labels == "parent":
        return lambda path: os.path.basename(os.path.dirname(path)) or None
    pattern = compiled(labels, "label", "data.labels")

    def label(path: str) -> str | None:
        match = pattern.search(path)
        return match["label"] if match else None

    return label


def _from_rows(root: Path, rows: Sequence[Row], bad: Sequence[tuple[str, str]], place: str) -> Labelled:
    by_split: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        by_split.setdefault(row.split or "train", {}).setdefault(row.label, []).append(row.path)
    if "train" not in by_split:
        raise UserError(f"{root}: there are no training pictures among the {len(rows):,} with a label.")
    classes = tuple(sorted(by_split["train"]))
    if len(classes) == 1:
        raise UserError(f"{root}: only one class ({classes[0]}); a classifier needs two at least")
    for split, found in by_split.items():
        unknown = sorted(found.keys() - set(classes))
        if unknown:
            raise UserError(
                f"{root}: {split} has classes that train lacks: {shortened(unknown)}; add some, or remove them."
            )
        lacking = [name for name in classes if name not in found]
        if split == "valid" and lacking:
            raise UserError(f"{root}: valid has no pictures of {shortened(lacking)}; every class needs some.")
    parts = {
        split: [sorted(by_split[split].get(name, [])) for name in classes]
        for split in ("train", "valid", "test")
        if split in by_split
    }
    return Labelled(classes, parts, tuple(bad), dict.fromkeys(parts, place))


def _with_columns(found: Labelled, rows: Sequence[Row], names: set[str]) -> Labelled:
    values = {name: {row.path: row.further[name] for row in rows if row.further.get(name)} for name in names}
    return Labelled(found.classes, found.parts, found.bad, found.places, values)


def grouping(group: str, labelled: Labelled) -> Callable[[str], str | None]:
    """From a picture's path to the name of its group, None for a picture on its own.

    Args:
        group: a regular expression with (?P<group>...) on the path, or a column of the table.
    """
    if "(?P<" not in group:
        return labelled.columns.get(group, {}).get
    pattern = compiled(group, "group", "data.group")

    def find(path: str) -> str | None:
        match = pattern.search(path)
        return match["group"] if match else None

    return find
