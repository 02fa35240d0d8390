"""What a folder of images must look like, and what is said where it doesn't."""

import codecs
import csv
import io
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxcats.common.config import compiled, label_kind
from jaxcats.common.errors import UserError, first_line, nearest
from jaxcats.data.files import IMAGE_EXTENSIONS, list_images

VALID_NAMES = ("valid", "val", "validation")


def existing_folder(folder: str | Path) -> Path:
    """The folder with links resolved; UserError where there is none."""
    path = Path(os.path.expanduser(folder))
    if not path.exists():
        raise UserError(f"{path}: no such folder; give the folder that holds the images")
    if not path.is_dir():
        raise UserError(f"{path}: not a folder; give the folder that holds the images")
    return path.resolve()


def split_folders(root: Path, valid_fraction: float | None) -> tuple[Path, Path | None]:
    """The folder of training classes, and that of validation classes if there is one."""
    if valid_fraction is not None and not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction: {valid_fraction} is not between 0 and 1; 0.2 holds out a fifth")
    train, valid = root / "train", valid_folder(root)
    if train.is_dir() and valid is not None:
        if valid_fraction is not None:
            raise UserError(
                f"valid_fraction: {valid_fraction} given, but {root} has its own {valid.name}/; leave valid_fraction "
                f"out, or give {train} as the folder"
            )
        return train, valid
    if valid_fraction is not None and valid is None:
        return (train if train.is_dir() else root), None
    names = [name + "/" for name in subfolders(root)]
    found = shortened(names) if names else "no folders"
    raise UserError(
        f"{root}: found {found}, looked for train/ and valid/ (or val/, validation/) with a folder per class in each; "
        "for a single folder of class folders set valid_fraction, for example 0.2"
    )


def valid_folder(root: Path) -> Path | None:
    """`valid/`, `val/` or `validation/`, whichever there is; two of them are an error."""
    present = [root / name for name in VALID_NAMES if (root / name).is_dir()]
    if len(present) > 1:
        raise UserError(f"{root}: both {present[0].name}/ and {present[1].name}/ exist; keep one of them")
    return present[0] if present else None


def test_folder(root: Path) -> Path | None:
    """`test/`, where there is one."""
    return root / "test" if (root / "test").is_dir() else None


def subfolders(folder: Path) -> list[str]:
    """The names of the folders inside that aren't hidden, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the folders inside, sorted: the classes in label order."""
    names = tuple(subfolders(folder))
    if not names:
        loose = len(list_images(folder, folder))
        found = f"{loose:,} images but no class folders" if loose else "no images"
        raise UserError(f"{folder}: {found}; expected a folder of images per class, for example cats/ and dogs/")
    return names


def check_classes(
    folder: Path, found: Sequence[str], expected: Sequence[str], *, against: str, what: str = "class folders"
) -> None:
    """Raise UserError, saying how, where the two sets of names differ."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [f"missing {shortened(missing)}"] * bool(missing) + [f"unknown {shortened(extra)}"] * bool(extra)
        spelt = [(a, b) for a in missing for b in extra if normalized_name(a) == normalized_name(b)]
        if spelt:
            a, b = map(ascii, spelt[0])
            raise UserError(
                f"{folder}: {b} there is {a} in {against}: they differ in capitals, spaces, or how an accent is "
                f"encoded; rename one."
            )
        raise UserError(
            f"{folder}: its {what} differ from those of {against}: {', '.join(parts)}; "
            f"expected exactly {shortened(expected)}"
        )


def normalized_name(name: str) -> str:
    """What two names have in common that differ in capitals, spaces around them, or how an accent is encoded."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def class_files(root: Path, folder: Path, classes: Sequence[str]) -> list[list[str]]:
    """The images of each class, relative to `root`; a class without any is an error."""
    members = [list_images(folder / name, root) for name in classes]
    if not any(members):
        raise UserError(f"{folder}: no images in its {len(classes)} class folders; looked for {extensions()}")
    for name, paths in zip(classes, members, strict=True):
        if not paths:
            raise UserError(
                f"{folder / name}: no images in this class folder; add some, or remove the folder if it is no class "
                f"(looked for {extensions()})"
            )
    return members


def shortened(names: Sequence[str], most: int = 8) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def extensions() -> str:
    """What counts as an image, for messages."""
    return " ".join(sorted(IMAGE_EXTENSIONS))


SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
COLUMNS = {"path": "path", "label": "label", "split": "split"}


@dataclass(frozen=True)
class Row:
    """One image of a table; `split` is None where nothing says it."""

    path: str
    label: str
    split: str | None = None
    further: Mapping[str, str] = field(default_factory=dict)


def read_table(
    root: Path, table: str, columns: Mapping[str, str], *, further: Set[str] = frozenset()
) -> tuple[list[Row], list[tuple[str, str]]]:
    """The rows of a table of labels, each image once, and (image or line, reason) of those that can't be used.

    Args:
        root: what relative paths in it are relative to.
        table: a .csv, .tsv or .parquet file, relative to `root` or to the working directory, in this order.
        columns: names of the columns "path", "label" and, where there is one, "split".
        further: other columns to keep.

    Raises UserError for a table that can't be read, lacks a column, or names a split that isn't one.
    """
    own = os.path.expanduser(table)
    file = next((p for p in (root / own, Path(own)) if os.path.isfile(p)), None)
    if file is None:
        raise UserError(f"data.labels: {table}: no such file, neither in {root} nor in the working directory.")
    names = COLUMNS | dict(columns)
    try:
        lines = _parquet(file, {*names.values(), *further}) if file.suffix.lower() == ".parquet" else _csv(file)
        header = next(lines)[1]
        where, others = _positions(file, header, names, further)
        return _rows(root, file, lines, where, others)
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror or error}).") from None


def _positions(
    file: Path, header: Sequence[str], names: Mapping[str, str], further: Set[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Where "path", "label" and "split" are, and where the further columns: one of these may be called "label" too."""
    where = {key: list(header).index(name) for key, name in names.items() if name in header}
    others = {name: list(header).index(name) for name in further if name in header}
    needed = [(f"data.columns.{key}", name) for key, name in names.items() if (key, name) != ("split", "split")]
    for option, name in [*needed, *(("data.group", name) for name in sorted(further))]:
        if name not in header:
            raise UserError(
                f"{file}: has no column '{name}'; it has {', '.join(header)}.{nearest(name, header)} Say with {option} which it is."
            )
    return where, others


def _rows(
    root: Path,
    file: Path,
    lines: Iterator[tuple[str, Sequence[str]]],
    where: Mapping[str, int],
    others: Mapping[str, int],
) -> tuple[list[Row], list[tuple[str, str]]]:
    found: dict[str, Row] = {}
    bad: list[tuple[str, str]] = []
    conflicts: set[str] = set()
    says_splits = False
    last = max(*where.values(), *others.values())
    for place, cells in lines:
        if len(cells) <= last:
            bad.append((f"{file.name} {place}", f"has {len(cells)} of {last + 1} columns or more"))
            continue
        given, label = cells[where["path"]].strip(), cells[where["label"]].strip()
        part = cells[where["split"]].strip() if "split" in where else ""
        says_splits = says_splits or bool(part)
        path, wrong = _path(root, given)
        if wrong or not label:
            bad.append((given or f"{file.name} {place}", wrong or f"has no label ({place})"))
            continue
        split = _split(file, place, part) if part else None
        row = Row(path, label, split, {name: cells[i].strip() for name, i in others.items()})
        before = found.setdefault(path, row)
        if (before.label, before.split) != (row.label, row.split):
            conflicts.add(path)
    single = [row for path, row in found.items() if path not in conflicts]
    # Where others have a split, an empty one could mean any; where none has, the column says nothing.
    rows = [row for row in single if row.split or not says_splits]
    bad += [(row.path, "has no split") for row in single if says_splits and not row.split]
    bad += [(path, f"{file.name} gives it two labels or splits") for path in sorted(conflicts)]
    if not rows:
        first = f"; the first of {len(bad):,}: {bad[0][0]} ({bad[0][1]})" if bad else ""
        raise UserError(f"{file}: has no row that can be used{first}; expected a path in {root} and a label in each.")
    return rows, bad


def _path(root: Path, given: str) -> tuple[str, str]:
    """The path relative to the root, and what is wrong with it."""
    if not given or "\0" in given:
        return "", "names no image"
    # Written on Windows; but here a backslash may be a letter of a name too, so the files decide.
    if os.sep == "/" and "\\" in given and "/" not in given and not os.path.isfile(os.path.join(root, given)):
        path, wrong = _path(root, given.replace("\\", "/"))
        if not wrong and os.path.isfile(os.path.join(root, path)):
            return path, ""
    relative = os.path.relpath(given, root) if os.path.isabs(given) else os.path.normpath(given)
    if os.path.isabs(given) and _outside(relative):  # written with a link in it, where the root has its links resolved
        resolved = os.path.realpath(os.path.dirname(given))
        relative = os.path.relpath(os.path.join(resolved, os.path.basename(given)), root)
    if _outside(relative):
        return "", "lies outside the folder"
    return Path(relative).as_posix(), ""


def _outside(relative: str) -> bool:
    return relative == os.pardir or relative.startswith(os.pardir + os.sep)


def _split(file: Path, place: str, cell: str) -> str:
    split = SPLITS.get(cell.lower())
    if split is None:
        raise UserError(f"{file} {place}: the split {cell!r} is none of train, valid (val, validation) and test.")
    return split


def _csv(file: Path) -> Iterator[tuple[str, list[str]]]:
    """("line N", cells), the header first; blank lines are left out, and ahead of it those of separators alone."""
    data = file.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{file} line {line}: is not UTF-8 (or UTF-16 with its mark); save it as UTF-8.") from None
    first = next((line for line in io.StringIO(text, newline="") if line.strip(",;\t \r\n")), "")
    mark = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        header = next((names for cells in reader if any(names := [cell.strip() for cell in cells])), None)
        if header is None:
            raise UserError(f"{file}: is empty; expected a line with the names of the columns, then one per image.")
        yield f"line {reader.line_num}", header
        for cells in reader:
            if cells:
                yield f"line {reader.line_num}", cells
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num}: can't be read as CSV ({error}).") from None


def _parquet(file: Path, wanted: Set[str]) -> Iterator[tuple[str, list[str]]]:
    """("row N", cells), the header first; columns that aren't wanted, which may hold whole images, stay unread."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f'{file}: reading Parquet needs pyarrow; pip install "jaxcats[parquet]", or save it as CSV.'
        ) from None
    try:
        schema = pq.read_schema(file)
        header = list(schema.names)
        for name, kind in zip(header, schema.types, strict=True):
            if name in wanted:
                _check_type(file, name, kind)
        names = [name for name in header if name in wanted]
        table: Any = pq.read_table(file, columns=names)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can't be read as Parquet ({first_line(error)}).") from None
    yield "header", header
    cells_of = {name: _texts(file, name, table[name]) for name in names}
    columns = [cells_of.get(name) or [""] * len(table) for name in header]
    for number, cells in enumerate(zip(*columns, strict=True), 1):
        yield f"row {number}", list(cells)


def _check_type(file: Path, name: str, kind: Any) -> None:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_nested(kind) or "binary" in str(kind):
        raise UserError(
            f"{file}: column '{name}' is of type {str(kind).partition('<')[0]}, expected text or numbers; save it as "
            f"text, or name another with data.columns or data.group."
        )


def _texts(file: Path, name: str, column: Any) -> list[str]:
    try:
        cells = column.to_pylist()
    except (ValueError, OverflowError) as error:  # text that isn't UTF-8, a date beyond Python's
        raise UserError(f"{file}: column '{name}' can't be read ({error}); save it as UTF-8 text.") from None
    # In a column of floats an empty cell is NaN, which is the only value that differs from itself.
    return ["" if cell is None or cell != cell else str(cell) for cell in cells]


@dataclass(frozen=True)
class Labelled:
    """Images with their labels, before any is opened.

    Attributes:
        classes: in label order.
        parts: split ("train", "valid", "test") -> for each class its images, relative to the root. Without "valid"
            it has to be held out of "train".
        bad: (image, reason) of those that have no label.
        places: what to call a class of a split in messages: split -> the text that a class's name is added to.
        columns: further columns of the table: name -> image -> value.
    """

    classes: tuple[str, ...]
    parts: dict[str, list[list[str]]]
    bad: tuple[tuple[str, str], ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def find_labels(
    root: Path, labels: str, *, valid_fraction: float | None, columns: Mapping[str, str], group: str | None = None
) -> Labelled:
    """The images under `root` (resolved) with the labels that `labels` gives them; see `scan` for the arguments.

    Raises UserError where the folder or the table can't be used so.
    """
    kind = label_kind(labels)
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
    # A test folder without these classes holds images without labels, and is left alone.
    if test is not None and set(classes) != set(subfolders(test)):
        test = None
    tops = {"train": train, "valid": valid, "test": test}
    if test is not None and not list_images(test, root):  # laid out, but still empty
        tops["test"] = None
    there = {name: top for name, top in tops.items() if top is not None}
    parts = {name: class_files(root, top, classes) for name, top in there.items()}
    return Labelled(classes, parts, places={name: f"{top}{os.sep}" for name, top in there.items()})


def _from_names(root: Path, labels: str, valid_fraction: float | None) -> Labelled:
    """By the folder that an image lies in, at any depth, or by a pattern on its path."""
    top, valid = root, None
    if (root / "train").is_dir():
        top, valid = split_folders(root, valid_fraction)
    else:
        _no_split_apart(root)
        if valid_fraction is None:
            raise UserError(
                f"{root}: nothing says which images are for validation; set data.valid_fraction, for example 0.2, or give "
                f"it train/ and valid/."
            )
    tops = {"train": top, "valid": valid, "test": test_folder(root) if top != root else None}
    rows, bad = [], []
    for split, folder in tops.items():
        if folder is not None:
            with_label, without = _named(root, folder, labels)
            rows += [Row(path, label, split) for path, label in with_label]
            # A test folder may hold images without labels.
            bad += without if split != "test" or with_label else []
    if not rows:
        raise UserError(f"{root}: no image gets a label from data.labels {labels!r}{_for_example(bad)}.")
    return _from_rows(root, rows, bad, f"{root}: class ")


def _no_split_apart(root: Path) -> None:
    """UserError where a folder that is to be trained on as a whole has a split in it."""
    if apart := valid_folder(root) or test_folder(root):
        raise UserError(
            f"{root}: has {apart.name}/ but no train/, so its images would be among those to train on; put the others in "
            f"train/, or move {apart.name}/ away."
        )


def _for_example(bad: Sequence[tuple[str, str]]) -> str:
    return f"; for example {shortened([path for path, _ in bad], 3)}" if bad else ""


def _named(root: Path, folder: Path, labels: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(image, label) by "parent" or a pattern on the path below `folder`, and (image, why it has none)."""
    label, why = labeller(labels), "lies in no folder" if labels == "parent" else "data.labels doesn't match its name"
    found = [(path, label(os.path.relpath(root / path, folder))) for path in list_images(folder, root)]
    return [(path, name) for path, name in found if name], [(path, why) for path, name in found if not name]


def labelled_images(root: Path, labels: str, classes: Sequence[str]) -> Labelled:
    """The images of another folder (in its valid/ where it has one) with labels of these classes, as "valid".

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
    """From an image's path to its label, None where it has none, for "parent" or a pattern."""
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
        raise UserError(f"{root}: there are no training images among the {len(rows):,} with a label.")
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
            raise UserError(f"{root}: valid has no images of {shortened(lacking)}; every class needs some.")
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
    """From an image's path to the name of its group, None for an image on its own.

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
