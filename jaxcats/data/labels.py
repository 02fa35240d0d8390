"""Labels: from `data.labels` (class folders, parent folders, a pattern or a table) to rows of (path, label, split, group).

`index` reads the images of the rows; `quality` uses the same code to say what training would refuse. No image is opened
here.
"""

import codecs
import csv
import dataclasses
import io
import os
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxcats.common.config import compiled, label_kind
from jaxcats.common.errors import UserError, first_line, nearest
from jaxcats.data.files import IMAGE_EXTENSIONS, list_images, subfolders

# What folders and cells of a table may call a split.
SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
SPLIT_ORDER = ("train", "valid", "test")

Unlabelled = list[tuple[str, str]]  # (an image's path or a line of a table, why it has no label)
Lines = Iterator[tuple[str, Sequence[str]]]  # (a place in a table, such as "line 7", its cells)


@dataclass(frozen=True, slots=True)
class Row:
    """An image's path relative to the root, its label, its split, and the group that it must stay with ("" for none)."""

    path: str
    label: str
    split: str = "train"
    group: str = ""


@dataclass(frozen=True)
class Labelled:
    """Images with their labels, before any is opened.

    Attributes:
        classes: in label order.
        rows: by split, class and path. Without a row of "valid", images have to be held out of "train".
        unlabelled: what has no label, and why.
    """

    classes: tuple[str, ...]
    rows: list[Row]
    unlabelled: Unlabelled


def find_labels(
    root: Path, labels: str, *, valid_fraction: float | None, columns: Mapping[str, str], group: str | None = None
) -> Labelled:
    """The images under `root` (resolved) with their labels; see `index.scan` for the arguments.

    Raises:
        UserError: the folder or the table can't be used.
    """
    kind, unlabelled = label_kind(labels), []
    group_pattern = compiled(group, "group", "data.group") if group and "(?P<" in group else None
    if kind == "table":
        rows, unlabelled = read_table(root, labels, columns, group=None if group_pattern else group)
    elif kind == "folders":
        rows = _rows_of_class_folders(root, split_folders(root, valid_fraction))
    else:
        rows, unlabelled = _rows_by_path(root, split_folders(root, valid_fraction), labels)
    if group_pattern:
        rows = [dataclasses.replace(row, group=_matched(group_pattern, "group", row.path)) for row in rows]
    classes = _classes_of_splits(root, rows)
    return Labelled(classes, _in_order(rows, classes), unlabelled)


def find_labels_of(root: Path, labels: str, classes: Sequence[str]) -> Labelled:
    """The images of another folder (in its valid/ where it has one) with labels of a classifier's classes, as "valid".

    Raises:
        UserError: the folder's classes aren't exactly `classes`.
    """
    top, unlabelled = valid_folder(root) or root, []
    if labels == "folders":
        rows = _rows_of_classes(root, top, "valid")
    else:
        rows, unlabelled = _rows_by_path(root, {"valid": top}, labels)
    check_classes(top, {row.label for row in rows}, classes, against="the classifier")
    return Labelled(tuple(classes), _in_order(rows, classes), unlabelled)


def _in_order(rows: Sequence[Row], classes: Sequence[str]) -> list[Row]:
    label = {name: i for i, name in enumerate(classes)}
    return sorted(rows, key=lambda row: (SPLIT_ORDER.index(row.split), label[row.label], row.path))


def _classes_of_splits(root: Path, rows: Sequence[Row]) -> tuple[str, ...]:
    """The classes of "train", sorted; UserError where the other splits don't fit them."""
    labels = {split: {row.label for row in rows if row.split == split} for split in SPLIT_ORDER}
    classes = tuple(sorted(labels["train"]))
    if not classes:
        raise UserError(f"{root}: there are no training images among the {len(rows):,} with a label.")
    if len(classes) == 1:
        raise UserError(f"{root}: only one class ({classes[0]}); a classifier needs at least two")
    if labels["valid"]:
        check_classes(f"{root}: valid", labels["valid"], classes, against="train")
    if unknown := sorted(labels["test"] - labels["train"]):
        raise UserError(f"{root}: test has classes that train lacks: {shortened(unknown)}; add or remove them.")
    return classes


# Folders of splits and classes.


def existing_folder(folder: str | Path) -> Path:
    """The folder with links resolved; UserError where there is none."""
    path = Path(os.path.expanduser(folder))
    if not path.is_dir():
        problem = "not a folder" if path.exists() else "no such folder"
        raise UserError(f"{path}: {problem}; give the folder that holds the images")
    return path.resolve()


def split_folders(root: Path, valid_fraction: float | None) -> dict[str, Path]:
    """The folders of "train", "valid" and "test" that exist; without train/, `root` itself is that of "train".

    Raises:
        UserError: no folder, and no `valid_fraction`, says which images are for validation, or only train/ is missing.
    """
    folders = {"train": root / "train", "valid": valid_folder(root), "test": root / "test"}
    tops = {split: folder for split, folder in folders.items() if folder and folder.is_dir()}
    if tops and "train" not in tops:
        name = next(iter(tops.values())).name
        raise UserError(f"{root}: has {name}/ but no train/; put the other images in train/, or move {name}/ away.")
    if "valid" not in tops and valid_fraction is None:
        found = shortened([f"{name}/" for name in subfolders(root)]) or "no folders"
        problem = f"{root}: nothing says which images are for validation: found {found}, looked for train/ and valid/"
        raise UserError(f"{problem}; for a folder without them set valid_fraction, for example 0.2")
    return tops or {"train": root}


def valid_folder(root: Path) -> Path | None:
    """`valid/`, `val/` or `validation/`, whichever there is; two of them are an error."""
    present = [root / name for name, split in SPLITS.items() if split == "valid" and (root / name).is_dir()]
    if len(present) > 1:
        raise UserError(f"{root}: both {present[0].name}/ and {present[1].name}/ exist; keep one of them")
    return present[0] if present else None


def check_classes(place: str | Path, found: Collection[str], expected: Sequence[str], *, against: str) -> None:
    """UserError, which says how, where the two sets of class names differ."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    for a in missing:
        for b in unknown:
            if normalized_name(a) == normalized_name(b):
                difference = "they differ in capitals, spaces, or how an accent is encoded"
                raise UserError(f"{place}: {b!a} there is {a!a} in {against}: {difference}; rename one.")
    if missing or unknown:
        difference = f"missing {shortened(missing) or 'none'}, unknown {shortened(unknown) or 'none'}"
        problem = f"{place}: its classes differ from those of {against}: {difference}"
        raise UserError(f"{problem}; expected exactly {shortened(expected)}")


def normalized_name(name: str) -> str:
    """Equal for two names that differ only in capitals, spaces around them, or how an accent is encoded."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def shortened(names: Sequence[str], most: int = 8) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def extensions() -> str:
    """What counts as an image, for messages."""
    return " ".join(sorted(IMAGE_EXTENSIONS))


def _rows_of_class_folders(root: Path, tops: Mapping[str, Path]) -> list[Row]:
    rows = []
    for split, top in tops.items():
        # A test folder without exactly the classes holds images without labels; one without images is not filled yet.
        if split != "test" or (subfolders(top) == subfolders(tops["train"]) and list_images(top, root)):
            rows += _rows_of_classes(root, top, split)
    return rows


def _rows_of_classes(root: Path, top: Path, split: str) -> list[Row]:
    """The images of each class folder in `top`; a class folder without any is an error."""
    paths_of = {name: list_images(top / name, root) for name in subfolders(top)}
    if not paths_of:
        n = len(list_images(top, root))
        problem = f"{top}: {f'{n:,} images but no class folders' if n else 'no images'}"
        raise UserError(f"{problem}; expected a folder of images per class, for example cats/ and dogs/")
    if not any(paths_of.values()):
        raise UserError(f"{top}: no images in its {len(paths_of)} class folders; looked for {extensions()}")
    for name, paths in paths_of.items():
        if not paths:
            problem = f"{top / name}: no images in this class folder (looked for {extensions()})"
            raise UserError(f"{problem}; add some, or remove the folder if it is no class")
    return [Row(path, name, split) for name, paths in paths_of.items() for path in paths]


def _rows_by_path(root: Path, tops: Mapping[str, Path], labels: str) -> tuple[list[Row], Unlabelled]:
    """Rows of images labelled by their parent folder, or by a pattern on the path below the split's folder."""
    pattern = None if labels == "parent" else compiled(labels, "label", "data.labels")
    reason = "data.labels doesn't match its name" if pattern else "lies in no folder"
    rows, unlabelled = [], []
    for split, top in tops.items():
        split_rows, without = [], []
        for path in list_images(top, root):
            below = os.path.relpath(root / path, top)
            label = _matched(pattern, "label", below) if pattern else os.path.basename(os.path.dirname(below))
            if label:
                split_rows.append(Row(path, label, split))
            else:
                without.append((path, reason))
        rows += split_rows
        if split_rows or split != "test":  # a test folder may hold images without labels
            unlabelled += without
    if not rows:
        example = f"; for example {shortened([path for path, _ in unlabelled], 3)}" if unlabelled else ""
        raise UserError(f"{root}: no image gets a label from data.labels {labels!r}{example}.")
    return rows, unlabelled


def _matched(pattern: re.Pattern[str], name: str, path: str) -> str:
    match = pattern.search(path)
    return (match[name] or "") if match else ""


# Tables.


def read_table(
    root: Path, table: str, columns: Mapping[str, str], *, group: str | None = None
) -> tuple[list[Row], Unlabelled]:
    """The rows of a table of labels, each image once, and what can't be used.

    Args:
        root: what relative paths in it are relative to.
        table: a .csv, .tsv or .parquet file, relative to `root` or to the working directory, in this order.
        columns: names of the columns "path", "label" and, where there is one, "split".
        group: the column of groups.

    Raises:
        UserError: the table can't be read, lacks a column, or names a split that isn't one.
    """
    given = os.path.expanduser(table)
    file = next((p for p in (root / given, Path(given)) if os.path.isfile(p)), None)
    if file is None:
        raise UserError(f"data.labels: {table}: no such file, neither in {root} nor in the working directory.")
    names = {"path": "path", "label": "label", "split": "split"} | dict(columns) | ({"group": group} if group else {})
    try:
        lines = _parquet_lines(file, set(names.values())) if file.suffix.lower() == ".parquet" else _csv_lines(file)
        header = list(next(lines)[1])
        for key, name in names.items():
            if name not in header and (key, name) != ("split", "split"):
                option = "data.group" if key == "group" else f"data.columns.{key}"
                problem = f"{file}: has no column '{name}'; it has {', '.join(header)}.{nearest(name, header)}"
                raise UserError(f"{problem} Say with {option} which it is.")
        return _rows_of_lines(root, file, lines, {k: header.index(name) for k, name in names.items() if name in header})
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror or error}).") from None


def _rows_of_lines(root: Path, file: Path, lines: Lines, positions: Mapping[str, int]) -> tuple[list[Row], Unlabelled]:
    by_path: dict[str, Row] = {}  # split "" where its cell is empty
    unusable: Unlabelled = []
    conflicts: set[str] = set()
    has_splits = False
    n = max(positions.values()) + 1
    for place, cells in lines:
        if len(cells) < n:
            unusable.append((f"{file.name} {place}", f"has {len(cells)} of {n} columns or more"))
            continue
        values = {key: cells[position].strip() for key, position in positions.items()}
        split_name = values.get("split", "")
        has_splits = has_splits or bool(split_name)
        path, problem = _relative_path(root, values["path"])
        if problem or not values["label"]:
            unusable.append((values["path"] or f"{file.name} {place}", problem or f"has no label ({place})"))
            continue
        split = SPLITS.get(split_name.lower(), "")
        if split_name and not split:
            raise UserError(f"{file} {place}: the split {split_name!r} is none of {', '.join(SPLITS)}.")
        row = Row(path, values["label"], split, values.get("group", ""))
        first = by_path.setdefault(path, row)
        if (first.label, first.split) != (row.label, row.split):
            conflicts.add(path)
    rows = []
    for path, row in by_path.items():
        if path in conflicts:
            continue
        if row.split or not has_splits:
            rows.append(row if row.split else Row(path, row.label, group=row.group))
        else:  # where others have a split, an empty one could mean any
            unusable.append((path, "has no split"))
    unusable += [(path, f"{file.name} gives it two labels or splits") for path in sorted(conflicts)]
    if not rows:
        first = f"; the first of {len(unusable):,}: {unusable[0][0]} ({unusable[0][1]})" if unusable else ""
        raise UserError(f"{file}: has no row that can be used{first}; expected a path in {root} and a label in each.")
    return rows, unusable


def _relative_path(root: Path, given: str) -> tuple[str, str]:
    """A cell's path relative to the root, and what is wrong with it ("" for nothing)."""
    if not given or "\0" in given:
        return "", "names no image"
    # Written on Windows; but here a backslash may be a letter of a name too, so the files decide.
    if os.sep == "/" and "\\" in given and "/" not in given and not os.path.isfile(os.path.join(root, given)):
        path, problem = _relative_path(root, given.replace("\\", "/"))
        if not problem and os.path.isfile(os.path.join(root, path)):
            return path, ""
    relative = os.path.relpath(given, root) if os.path.isabs(given) else os.path.normpath(given)
    if os.path.isabs(given) and _is_outside(relative):  # written with a link in it; the root has its links resolved
        resolved = os.path.realpath(os.path.dirname(given))
        relative = os.path.relpath(os.path.join(resolved, os.path.basename(given)), root)
    return ("", "lies outside the folder") if _is_outside(relative) else (Path(relative).as_posix(), "")


def _is_outside(relative: str) -> bool:
    return relative == os.pardir or relative.startswith(os.pardir + os.sep)


def _csv_lines(file: Path) -> Lines:
    """("line N", cells), the header first; blank lines are left out, and before it those of separators alone."""
    data = file.read_bytes()
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{file} line {line}: is not UTF-8 (or UTF-16 with its mark); save it as UTF-8.") from None
    first = next((line for line in io.StringIO(text, newline="") if line.strip(",;\t \r\n")), "")
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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


def _parquet_lines(file: Path, wanted: set[str]) -> Lines:
    """("row N", cells), the header first; other columns than those wanted, which may hold whole images, stay unread."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        way_out = 'pip install "jaxcats[parquet]", or save it as CSV'
        raise UserError(f"{file}: reading Parquet needs pyarrow; {way_out}.") from None
    try:
        schema = pq.read_schema(file)
        names = [name for name in schema.names if name in wanted]
        for name in names:
            kind: Any = schema.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if pa.types.is_nested(kind) or "binary" in str(kind):
                problem = f"{file}: column '{name}' is of type {str(kind).partition('<')[0]}, expected text or numbers"
                raise UserError(f"{problem}; save it as text, or name another with data.columns or data.group.")
        table: Any = pq.read_table(file, columns=names)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can't be read as Parquet ({first_line(error)}).") from None
    yield "header", list(schema.names)
    cells_of = {name: _column_texts(file, name, table[name]) for name in names}
    columns = [cells_of.get(name) or [""] * len(table) for name in schema.names]
    for number, cells in enumerate(zip(*columns, strict=True), 1):
        yield f"row {number}", cells


def _column_texts(file: Path, name: str, column: Any) -> list[str]:
    try:
        cells = column.to_pylist()
    except (ValueError, OverflowError) as error:  # text that isn't UTF-8, a date beyond Python's
        raise UserError(f"{file}: column '{name}' can't be read ({error}); save it as UTF-8 text.") from None
    # In a column of floats an empty cell is NaN, which is the only value that differs from itself.
    return ["" if cell is None or cell != cell else str(cell) for cell in cells]
