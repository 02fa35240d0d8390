"""`python -m jaxcats.predict --model DIR PATHS...`: predicts the classes of images with an exported classifier."""

import csv
import glob
import io
import json
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcats.common.cli import Parser, run_command
from jaxcats.common.errors import RunError, UserError, one_line, unwritable

if TYPE_CHECKING:
    from jaxcats.export.classifier import Prediction

DESCRIPTION = (
    "Predicts the classes of images with an exported classifier. 'unsure' marks the images whose probability is below the "
    "threshold. A file that can't be used gets a row with the reason, and the exit code is 1."
)
SHEET_IMAGES = 64
FIELDS = ("path", "label", "probability", "abstain", "error")  # then p_CLASS for each class
KAGGLE_MAX = 0.995  # the score is the log loss, where one certain and wrong answer costs more than all others together


def main(argv: Sequence[str]) -> None:
    """The command."""
    options = read_options(argv)
    paths = expand(options.paths)
    if options.kaggle:
        kaggle_ids(paths)  # refuses them before any image is predicted
    from jaxcats.export.classifier import load

    classifier = load(options.model)
    if options.kaggle and len(classifier.classes) != 2:
        raise UserError(f"--kaggle: needs a classifier of two classes; this one has {len(classifier.classes)}.")
    started = time.perf_counter()
    rows = classifier.stream(paths, batch_size=options.batch_size, tta=options.tta)
    try:
        bad = write_outputs(rows, options, classifier.classes, paths)
    except BrokenPipeError:  # `| head` has closed it; Python would complain again when it flushes at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    seconds = time.perf_counter() - started
    print(f"{len(paths):,} images in {seconds:.1f} s ({len(paths) / seconds:,.0f} a second)", file=sys.stderr)
    if bad:
        raise RunError(f"{bad:,} of {len(paths):,} images can't be used; their rows give the reason.")


def read_options(argv: Sequence[str]) -> Namespace:
    """Reads the flags, and refuses an output that would replace an image or an input."""
    parser = Parser(prog="python -m jaxcats.predict", description=DESCRIPTION)
    paths_help = "images, folders, quoted patterns such as 'photos/**/*.jpg', or - for a list of files on stdin"
    parser.add_argument("paths", nargs="+", metavar="PATHS", help=paths_help)
    parser.add_argument("--model", required=True, help="folder that train or export wrote (model/ in a run folder)")
    parser.add_argument("--csv", metavar="FILE", help="write CSV instead of the table; - is stdout")
    parser.add_argument("--jsonl", metavar="FILE", help="write a line of JSON per image instead; - is stdout")
    parser.add_argument("--kaggle", metavar="FILE", help="write a submission for Kaggle's Dogs vs. Cats Redux")
    parser.add_argument("--show", metavar="FILE", help=f"draw the first {SHEET_IMAGES} images with their labels as PNG")
    parser.add_argument("--tta", type=int, default=0, help="average over this number of augmented versions of an image")
    parser.add_argument("--batch_size", type=int, default=32, help="images per call of the network")
    options = parser.parse_args(argv)
    if options.csv == options.jsonl == "-":
        raise UserError("--csv - --jsonl -: only one of them can go to stdout.")
    from jaxcats.data.files import check_targets

    check_targets({name: getattr(options, name) for name in ("csv", "jsonl", "kaggle", "show")}, options.paths)
    return options


def expand(words: Sequence[str]) -> list[str]:
    """Lists the files named by paths, folders (every image below them), patterns and `-` (a list on stdin)."""
    from jaxcats.data.files import list_images

    paths: list[str] = []
    for word in words:
        if word == "-":
            content = sys.stdin.buffer.read()  # with zero bytes as `find -print0` writes them, or in lines
            parts = content.split(b"\0") if b"\0" in content else content.replace(b"\r\n", b"\n").split(b"\n")
            files = [os.fsdecode(part) for part in parts if part]
        elif os.path.isdir(word):
            files = [os.path.join(word, name) for name in list_images(Path(word), Path(word))]
        elif glob.has_magic(word) and not os.path.lexists(word):
            files = sorted(name for name in glob.iglob(word, recursive=True) if not os.path.isdir(name))
        else:
            files = [word]
        if not files:
            raise UserError(f"{word}: no images in this folder or list, or under such a name.")
        paths += files
    return paths


def write_outputs(rows: "Iterable[Prediction]", options: Namespace, classes: Sequence[str], paths: list[str]) -> int:
    """Writes every output and returns the number of images that can't be used."""
    formats: dict[str, Callable[[Prediction], str]] = {}  # by file; - is stdout
    lines: dict[str, list[str]] = {}
    if options.csv:
        formats[options.csv] = csv_line
        lines[options.csv] = [as_csv([*FIELDS, *(f"p_{name}" for name in classes)])]
    if options.jsonl:
        formats[options.jsonl] = partial(json_line, classes=classes)
    if not options.csv and not options.jsonl and not options.kaggle:
        formats["-"] = partial(table_line, width=min(60, max(len(one_line(path)) for path in paths)))
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[attr-defined]
    kept, bad = [], 0
    for row in rows:
        for file, to_line in formats.items():
            lines.setdefault(file, []).append(to_line(row))
        print("".join(lines.pop("-", [])), end="", flush=True)
        bad += row.error is not None
        if options.kaggle or (options.show and len(kept) < SHEET_IMAGES):
            kept.append(row)
    for file, text in lines.items():
        write_file(file, "".join(text).encode("utf-8", "surrogateescape"))
    if options.kaggle:
        write_file(options.kaggle, submission(kept).encode())
    if options.show:
        write_file(options.show, contact_sheet(kept))
    return bad


def as_csv(values: Sequence[Any]) -> str:
    """Formats a line of CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow(values)  # with "\n" as its line end it leaves a carriage return unquoted
    return text.getvalue().removesuffix("\r\n") + "\n"


def csv_line(row: "Prediction") -> str:
    """Formats a prediction as CSV; an image that can't be used has only its path and the error."""
    if row.error is not None:
        return as_csv([row.path, "", "", "", row.error, *([""] * len(row.probabilities))])
    numbers = [f"{p:.9g}" for p in row.probabilities]
    return as_csv([row.path, row.label, f"{row.probability:.9g}", "yes" if row.abstain else "no", "", *numbers])


def json_line(row: "Prediction", classes: Sequence[str]) -> str:
    """Formats a prediction as JSON, with null for what an image that can't be used does not have."""
    values = {name: getattr(row, name) for name in FIELDS}
    values |= {f"p_{name}": float(p) for name, p in zip(classes, row.probabilities, strict=True)}
    if row.error is not None:
        values = dict.fromkeys(values) | {"path": row.path, "error": row.error}
    return json.dumps(values) + "\n"  # a name that is not UTF-8 has lone surrogates


def table_line(row: "Prediction", width: int) -> str:
    """Formats a prediction for the screen."""
    result = (
        f"{row.probability:.4f}  {row.label}{'  unsure' if row.abstain else ''}" if row.label else f"-  {row.error}"
    )
    return f"{one_line(row.path):<{width}}  {one_line(result)}\n"


def kaggle_ids(paths: "Sequence[str | None]") -> list[int]:
    """Reads the number in the name of each file; UserError if a name has none, or two names have the same."""
    path_of_id: dict[int, str] = {}
    for path in map(str, paths):
        number = re.fullmatch(r"[^0-9]*([0-9]{1,18})[^0-9]*", Path(path).stem, re.DOTALL)
        if not number:
            raise UserError(f"--kaggle: {one_line(path)}: expected one number in the file's name, its id.")
        other = path_of_id.setdefault(int(number[1]), path)
        if other is not path:
            raise UserError(f"--kaggle: {one_line(path)}: has the same id as {one_line(other)}.")
    return list(path_of_id)


def submission(rows: "Sequence[Prediction]") -> str:
    """Formats a Kaggle submission: ids and the second class's probabilities, sorted by id."""
    row_of_id = dict(zip(kaggle_ids([row.path for row in rows]), rows, strict=True))
    lines = ["id,label\n"]
    for number, row in sorted(row_of_id.items()):
        p = 0.5 if row.error is not None else float(row.probabilities[1])
        lines.append(f"{number},{min(max(p, 1 - KAGGLE_MAX), KAGGLE_MAX):.6g}\n")
    return "".join(lines)


def contact_sheet(rows: "Sequence[Prediction]") -> bytes:
    """Draws the images under their labels, as PNG."""
    from jaxcats.plots import gallery

    usable = [row for row in rows if row.error is None][:SHEET_IMAGES]
    if not usable:
        raise UserError("--show: none of the images can be used.")
    titles = [f"{row.label} {row.probability:.3f}{' unsure' if row.abstain else ''}" for row in usable]
    png = io.BytesIO()
    gallery([str(row.path) for row in usable], titles).savefig(png, format="png", dpi=100)
    return png.getvalue()


def write_file(path: str, content: bytes) -> None:
    """Writes a file as a whole or not at all."""
    from jaxcats.common.io import write_bytes

    try:
        write_bytes(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise unwritable(f"{path}:", error) from None
    print(f"Written: {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
