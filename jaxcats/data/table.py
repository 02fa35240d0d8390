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
    file = next((p for p in (root / Path(table).expanduser(), Path(table).expanduser()) if p.is_file()), None)
    if file is None:
        raise UserError(f"data.labels: {table}: no such file, neither in {root} nor in the working directory.")
    names = COLUMNS | dict(columns)
    try:
        lines = _parquet(file, {*names.values(), *further}) if file.suffix.lower() == ".parquet" else _csv(file)
        header = next(lines)[1]
        where = _positions(file, header, names, further)
        return _rows(root, file, lines, where)
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror or error}).") from None


def _positions(file: Path, header: Sequence[str], names: Mapping[str, str], further: Set[str]) -> dict[str, int]:
    where = {}
    optional = "split" if names["split"] == "split" else None
    for key, name in [*names.items(), *((name, name) for name in sorted(further))]:
        if name in header:
            where[key] = list(header).index(name)
        elif key != optional:
            option = f"data.columns.{key}" if key in names else "data.group"
            raise UserError(
                f"{file}: has no column '{name}'; it has {', '.join(header)}.{nearest(name, header)} Say with {option} which it is."
            )
    return where


def _rows(
    root: Path, file: Path, lines: Iterator[tuple[str, Sequence[str]]], where: Mapping[str, int]
) -> tuple[list[Row], list[tuple[str, str]]]:
    found: dict[str, Row] = {}
    bad: list[tuple[str, str]] = []
    conflicts: set[str] = set()
    last = max(where.values())
    others = where.keys() - COLUMNS.keys()
    for place, cells in lines:
        if len(cells) <= last:
            bad.append((f"{file.name} {place}", f"has {len(cells)} of {last + 1} columns or more"))
            continue
        given, label = cells[where["path"]].strip(), cells[where["label"]].strip()
        path, wrong = _path(root, given)
        if wrong or not label:
            bad.append((given or f"{file.name} {place}", wrong or f"has no label ({place})"))
            continue
        split = _split(file, place, cells[where["split"]]) if "split" in where else None
        row = Row(path, label, split, {name: cells[where[name]].strip() for name in others})
        before = found.setdefault(path, row)
        if (before.label, before.split) != (row.label, row.split):
            conflicts.add(path)
    if not found:
        raise UserError(f"{file}: has no row with a path and a label.")
    bad += [(path, f"{file.name} gives it two labels or splits") for path in sorted(conflicts)]
    return [row for path, row in found.items() if path not in conflicts], bad


def _path(root: Path, given: str) -> tuple[str, str]:
    """The path relative to the root, and what is wrong with it."""
    if not given or "\0" in given:
        return "", "names no picture"
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
    split = SPLITS.get(cell.strip().lower())
    if split is None:
        raise UserError(f"{file} {place}: the split {cell!r} is none of train, valid (val, validation) and test.")
    return split


def _csv(file: Path) -> Iterator[tuple[str, list[str]]]:
    """("line N", cells), the header first; blank lines are left out."""
    data = file.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{file} line {line}: is not UTF-8 (or UTF-16 with its mark); save it as UTF-8.") from None
    first = text.partition("\n")[0]
    mark = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        cells = [cell.strip() for cell in next(reader, [])]
        if not any(cells):
            raise UserError(f"{file}: is empty; expected a line with the names of the columns, then one per picture.")
        yield "line 1", cells
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
        names = pq.read_schema(file).names
        table: Any = pq.read_table(file, columns=[name for name in names if name in wanted])
    except pa.ArrowException as error:
        raise UserError(f"{file}: can't be read as Parquet ({str(error).splitlines()[0]}).") from None
    yield "header", list(names)
    columns = [table[name].to_pylist() if name in wanted else [None] * len(table) for name in names]
    for number, cells in enumerate(zip(*columns, strict=True), 1):
        yield f"row {number}", ["" if cell is None else str(cell) for cell in cells]
