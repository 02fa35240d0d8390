"""Tables of labels: CSV by the standard library, Parquet by pyarrow."""

import codecs
import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxcats.errors import UserError, nearest

TABLES = (".csv", ".tsv", ".parquet")
SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
COLUMNS = {"path": "path", "label": "label", "split": "split"}


@dataclass(frozen=True)
class Row:
    """One picture of a table; `split` is None where nothing says it."""

    path: str
    label: str
    split: str | None = None
    further: Mapping[str, str] = field(default_factory=dict)


def read_table(
    root: Path, table: str, columns: Mapping[str, str], *, further: Set[str] = frozenset()
) -> tuple[list[Row], list[tuple[str, str]]]:
    """The rows of a table of labels, each picture once, and (picture or line, reason) of those that can't be used.

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
        return "", "names no picture"
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
            raise UserError(f"{file}: is empty; expected a line with the names of the columns, then one per picture.")
        yield f"line {reader.line_num}", header
        for cells in reader:
            if cells:
                yield f"line {reader.line_num}", cells
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num}: can't be read as CSV ({error}).") from None


def _parquet(file: Path, wanted: Set[str]) -> Iterator[tuple[str, list[str]]]:
    """("row N", cells), the header first; columns that aren't wanted, which may hold whole pictures, stay unread."""
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
        raise UserError(f"{file}: can't be read as Parquet ({str(error).splitlines()[0]}).") from None
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
