"""Labels: from `data.labels` (class folders, parent folders, a pattern or a table) to rows of (path, label, split, group).

`index` reads the images of the rows; `quality` uses the same code to say what training would refuse. No image is opened
here.
"""

import codecs
import csv
import dataclasses
import io
import itertools
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


def find_labels(root: Path, labels: str, *, columns: Mapping[str, str], group: str | None = None) -> Labelled:
    """The images under `root` (resolved) with their labels; see `index.scan` for the arguments.

    Raises:
        UserError: the folder, the table or an argument can't be used.
    """
    kind, unlabelled = label_kind(labels), []
    group_pattern = compiled(group, "group", "data.group") if group and "(?P<" in group else None
    if kind == "table":
        rows, unlabelled = read_table(root, labels, columns, group=None if group_pattern else group)
    elif group is not None and not group_pattern:
        raise UserError(f"data.group: {group!r} can't be used; expected a regular expression with (?P<group>...).")
    elif kind == "folders":
        rows = _rows_of_class_folders(root, split_folders(root))
    else:
        rows, unlabelled = _rows_by_path(root, split_folders(root), labels)
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
    if len(classes) < 2:
        problem = f"{root}: the classes of the training images: {shortened(classes) or 'none'}"
        raise UserError(f"{problem}; a classifier needs at least two classes")
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
        raise UserError(f"{path}: no such folder; give the folder that holds the images")
    return path.resolve()


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of "train", "valid" and "test" that exist; without any, `root` itself is that of "train".

    Raises:
        UserError: only train/ is missing.
    """
    folders = {"train": root / "train", "valid": valid_folder(root), "test": root / "test"}
    tops = {split: folder for split, folder in folders.items() if folder and folder.is_dir()}
    if tops and "train" not in tops:
        name = next(iter(tops.values())).name
        raise UserError(f"{root}: has {name}/ but no train/; put the other images in train/, or move {name}/ away.")
    return tops or {"train": root}


def valid_folder(root: Path) -> Path | None:
    """`valid/`, `val/` or `validation/`, whichever there is; two of them are an error."""
    present = [root / name for name, split in SPLITS.items() if split == "valid" and (root / name).is_dir()]
    if len(present) > 1:
        raise UserError(f"{root}: both {present[0].name}/ and {present[1].name}/ exist; keep one of them")
    return present[0] if present else None


def check_classes(place: str | Path, found: Collection[str], expected: Sequence[str], *, against: str) -> None:
    """Raises UserError with the difference if the two sets of class names differ."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    for a, b in itertools.product(missing, unknown):
        if normalized_name(a) == normalized_name(b):
            raise UserError(f"{place}: {b!a} is spelled {a!a} in {against}; rename one.")
    if missing or unknown:
        difference = f"missing {shortened(missing) or 'none'}, unknown {shortened(unknown) or 'none'}"
        problem = f"{place}: its classes differ from those of {against}: {difference}"
        raise UserError(f"{problem}; expected exactly {shortened(expected)}")


def normalized_name(name: str) -> str:
    """A name in a form that ignores capitals, spaces around it, and how accents are encoded."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def shortened(names: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def extensions() -> str:
    """The extensions of image files, as text for messages."""
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
        problem = f"{top}: {len(list_images(top, root)):,} images but no class folders"
        raise UserError(f"{problem}; expected a folder of images per class, for example cats/ and dogs/")
    for name, paths in paths_of.items():
        if not paths:
            problem = f"{top / name}: no images in this class folder (looked for {extensions()})"
            raise UserError(f"{problem}; add some, or remove the folder if it is no class")
    return [Row(path, name, split) for name, paths in paths_of.items() for path in paths]


def _rows_by_path(root: Path, tops: Mapping[str, Path], labels: str) -> tuple[list[Row], Unlabelled]:
    """Rows of images labelled by their parent folder, or by a pattern on the path below the split's folder."""
    is_parent = labels == "parent"
    pattern = re.compile(r"(?P<label>[^/]+)/[^/]+\Z") if is_parent else compiled(labels, "label", "data.labels")
    reason = "lies in no folder" if is_parent else "data.labels doesn't match its name"
    rows, unlabelled = [], []
    for split, top in tops.items():
        prefix = "" if top == root else f"{top.name}/"
        label_of = {path: _matched(pattern, "label", path.removeprefix(prefix)) for path in list_images(top, root)}
        rows += [Row(path, label, split) for path, label in label_of.items() if label]
        if split != "test" or any(label_of.values()):  # a test folder may hold images without labels
            unlabelled += [(path, reason) for path, label in label_of.items() if not label]
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
        _, header = next(lines, ("", []))
        for key, name in names.items():
            if name not in header and (key, name) != ("split", "split"):
                problem = f"{file}: has no column '{name}'; it has {', '.join(header) or 'none'}."
                option = "data.group" if key == "group" else f"data.columns.{key}"
                raise UserError(f"{problem}{nearest(name, header)} Set {option} to the name that it has.")
        return _rows_of_lines(root, file, lines, {k: header.index(name) for k, name in names.items() if name in header})
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror or error}).") from None


def _rows_of_lines(root: Path, file: Path, lines: Lines, positions: Mapping[str, int]) -> tuple[list[Row], Unlabelled]:
    by_path: dict[str, Row] = {}  # split "" where its cell is empty
    unusable: Unlabelled = []
    conflicts: set[str] = set()
    has_splits = False
    for place, cells in lines:
        values = {key: cells[at].strip() if at < len(cells) else "" for key, at in positions.items()}
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
    clear = [row for path, row in by_path.items() if path not in conflicts]
    # If other rows name a split, a row without one is ambiguous.
    rows = [Row(r.path, r.label, r.split or "train", r.group) for r in clear if r.split or not has_splits]
    unusable += [(row.path, "has no split") for row in clear if has_splits and not row.split]
    unusable += [(path, f"{file.name} gives it two labels or splits") for path in sorted(conflicts)]
    if not rows:
        first = f"; the first of {len(unusable):,}: {unusable[0][0]} ({unusable[0][1]})" if unusable else ""
        raise UserError(f"{file}: has no row that can be used{first}; expected a path in {root} and a label in each.")
    return rows, unusable


def _relative_path(root: Path, given: str) -> tuple[str, str]:
    """A cell's path relative to the root, and what is wrong with it ("" for nothing)."""
    if not given or "\0" in given:
        return "", "names no image"
    # The path may come from Windows. A backslash may also be part of a name here, so the files decide.
    if "\\" in given and not os.path.isfile(os.path.join(root, given)):
        given = given.replace("\\", "/")
    relative = os.path.relpath(given, root) if os.path.isabs(given) else os.path.normpath(given)
    if os.path.isabs(given) and _is_outside(relative):  # written with a link in it; the root has its links resolved
        folder, name = os.path.split(given)
        relative = os.path.relpath(os.path.join(os.path.realpath(folder), name), root)
    return ("", "lies outside the folder") if _is_outside(relative) else (Path(relative).as_posix(), "")


def _is_outside(relative: str) -> bool:
    return relative == os.pardir or relative.startswith(os.pardir + os.sep)


def _csv_lines(file: Path) -> Lines:
    """("line N", cells), the header first; lines that are blank or only separators are left out."""
    data = file.read_bytes()
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8, or UTF-16 with its mark ({error}); save it as UTF-8.") from None
    first = next((line for line in io.StringIO(text, newline="") if line.strip(",;\t \r\n")), "")
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if any(cells):
                yield f"line {reader.line_num}", cells
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num}: can't be read as CSV ({error}).") from None


def _parquet_lines(file: Path, wanted: set[str]) -> Lines:
    """("row N", cells), the header first; other columns than those wanted, which may hold whole images, stay unread."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f'{file}: needs pyarrow: pip install "jaxcats[parquet]", or save it as CSV.') from None
    try:
        names = pq.read_schema(file).names
        table: Any = pq.read_table(file, columns=[name for name in names if name in wanted])
        columns = {name: table[name].to_pylist() for name in table.column_names}
    except (pa.ArrowException, ValueError, OverflowError) as error:  # also text that isn't UTF-8, dates beyond Python's
        raise UserError(f"{file}: can't be read as Parquet ({first_line(error)}); save it as UTF-8 CSV.") from None
    for name, cells in columns.items():
        if kinds := {type(cell).__name__ for cell in cells if isinstance(cell, (bytes, list, dict))}:
            raise UserError(f"{file}: column '{name}' holds {kinds.pop()}, expected text or numbers; save it as text.")
        # In a column of floats an empty cell is NaN, which is the only value that differs from itself.
        columns[name] = ["" if cell is None or cell != cell else str(cell) for cell in cells]
    yield "header", names
    for number, cells in enumerate(zip(*(columns.get(name, [""] * len(table)) for name in names), strict=True), 1):
        yield f"row {number}", cells
