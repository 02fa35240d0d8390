"""`python -m jaxcats.predict --model DIR PATHS...`: images judged by an exported classifier."""

import csv
import glob
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxcats.common.cli import Parser, one_line, run_command
from jaxcats.common.errors import RunError, UserError, unwritable

DESCRIPTION = (
    "Judges images with an exported classifier. Probabilities are calibrated on the validation images; 'unsure' marks "
    "those below the threshold chosen there. Bad files are rows with their reason, and make the exit code 1."
)
SHOWN = 64  # images in a contact sheet
HIGHEST = 0.995  # in a Kaggle submission, where one certain and wrong answer costs more than all others together


def expand(words: Sequence[str]) -> list[str]:
    """Files of paths, folders (every image at any depth), patterns and `-` (a list on stdin)."""
    from jaxcats.data.files import list_images

    found: list[str] = []
    for word in words:
        if word == "-":
            found += expand_list(sys.stdin.buffer.read())
        elif os.path.isdir(word):
            images = list_images(Path(word), Path(word))
            if not images:
                raise UserError(f"{word}: no images in this folder.")
            found += [os.path.join(word, name) for name in images]
        elif glob.has_magic(word) and not os.path.lexists(word):
            matches = sorted(name for name in glob.iglob(word, recursive=True) if not os.path.isdir(name))
            if not matches:
                raise UserError(f"{word}: no file has such a name.")
            found += matches
        else:
            found.append(word)
    if not found:
        raise UserError("PATHS: no images to judge.")
    return found


def expand_list(content: bytes) -> list[str]:
    """Paths in a list, one per line; each ends with a zero byte instead where there are any (as `find -print0` writes)."""
    words = content.split(b"\0") if b"\0" in content else [line.removesuffix(b"\r") for line in content.split(b"\n")]
    return [os.fsdecode(word) for word in words if word]


def as_csv(values: Sequence[Any]) -> str:
    """One line of CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow(values)  # with "\n" as its line end it leaves a carriage return unquoted
    return text.getvalue().removesuffix("\r\n") + "\n"


def csv_row(row: Any) -> str:
    """A Prediction as a line of CSV; a bad image has nothing but its path and error."""
    if row.error is not None:
        return as_csv([row.path, "", "", "", row.error, *([""] * len(row.probabilities))])
    numbers = [f"{p:.9g}" for p in row.probabilities]
    return as_csv([row.path, row.label, f"{row.probability:.9g}", "yes" if row.abstain else "no", "", *numbers])


def json_row(row: Any, classes: Sequence[str]) -> str:
    """A Prediction as a line of JSON, with null where there is nothing; names that are not UTF-8 as lone surrogates."""
    good = row.error is None
    values = {
        "path": row.path,
        "label": row.label,
        "probability": row.probability if good else None,
        "abstain": row.abstain if good else None,
        "error": row.error,
    }
    values |= {f"p_{c}": float(p) if good else None for c, p in zip(classes, row.probabilities, strict=True)}
    return json.dumps(values) + "\n"


def table_row(row: Any, width: int, label_width: int) -> str:
    """A Prediction as a line to read."""
    said = "-" if row.error is not None else one_line(row.label)
    more = one_line(row.error) if row.error is not None else f"{row.probability:.4f}{'  unsure' if row.abstain else ''}"
    return f"{one_line(row.path):<{width}}  {said:<{label_width}}  {more}\n"


def ids(paths: Sequence[str]) -> list[int]:
    """The number in each file's name, for Kaggle; UserError where there is none, or twice the same."""
    found: dict[int, str] = {}
    for path in paths:
        number = re.fullmatch(r"[^0-9]*([0-9]{1,18})[^0-9]*", Path(path).stem, re.DOTALL)
        if not number:
            raise UserError(f"--kaggle: {one_line(path)}: expected one number in the file's name, its id.")
        if int(number[1]) in found:
            raise UserError(f"--kaggle: {one_line(path)}: has the id of {one_line(found[int(number[1])])}.")
        found[int(number[1])] = path
    return list(found)


def submission(rows: Sequence[Any], numbers: Sequence[int]) -> str:
    """A Kaggle submission: ids and the second class's probabilities, sorted by id; 0.5 for a bad image."""
    known = [0.5 if row.error is not None else float(row.probabilities[1]) for row in rows]
    kept = [min(max(p, 1 - HIGHEST), HIGHEST) for p in known]
    return "id,label\n" + "".join(f"{i},{p:.6g}\n" for i, p in sorted(zip(numbers, kept, strict=True)))


def contact_sheet(rows: Sequence[Any]) -> bytes:
    """The first images under what is said of them, as PNG."""
    from jaxcats.plots import gallery

    good = [row for row in rows if row.error is None][:SHOWN]
    if not good:
        raise UserError("--show: none of the images can be used.")
    titles = [f"{row.label} {row.probability:.3f}{' unsure' if row.abstain else ''}" for row in good]
    out = io.BytesIO()
    gallery([row.path for row in good], titles).savefig(out, format="png", dpi=100)
    return out.getvalue()


def write_file(path: str, content: str | bytes) -> None:
    """All of a file or nothing."""
    from jaxcats.common.io import write_bytes, write_text

    try:
        if isinstance(content, bytes):
            write_bytes(Path(os.path.realpath(path)), content)
        else:
            write_text(Path(os.path.realpath(path)), content)
    except OSError as e:
        raise unwritable(f"{path}:", e) from None
    print(f"Written: {path}", file=sys.stderr)


def read_options(argv: Sequence[str]) -> Any:
    """The command's flags."""
    parser = Parser(prog="python -m jaxcats.predict", description=DESCRIPTION)
    paths = "images, folders, quoted patterns such as 'photos/**/*.jpg', or - for a list of files on stdin"
    parser.add_argument("paths", nargs="+", metavar="PATHS", help=paths)
    parser.add_argument("--model", required=True, help="folder that train or export wrote (model/ in a run folder)")
    parser.add_argument("--csv", metavar="FILE", help="write CSV instead of the table; - is stdout")
    parser.add_argument("--jsonl", metavar="FILE", help="write a line of JSON per image instead; - is stdout")
    kaggle = (
        "write id,label as Kaggle's Dogs vs. Cats Redux wants it: the number in the file's name and the probability of the "
        f"second class (dogs), kept within {1 - HIGHEST:.3g} to {HIGHEST}, since its score is the log loss; 0.5 for a bad "
        "file. (The competition of 2013 wanted 0 or 1: round it.)"
    )
    parser.add_argument("--kaggle", metavar="FILE", help=kaggle)
    parser.add_argument("--show", metavar="FILE", help=f"draw the first {SHOWN} images with their labels into a PNG")
    parser.add_argument("--tta", type=int, default=0, help="also judge so many changed versions of each image")
    parser.add_argument("--batch_size", type=int, default=32, help="images per call of the network")
    options = parser.parse_args(argv)
    if options.csv == options.jsonl == "-":
        raise UserError("--csv - --jsonl -: only one of them can go to stdout.")
    from jaxcats.data.files import check_targets

    check_targets({name: getattr(options, name) for name in ("csv", "jsonl", "kaggle", "show")}, options.paths)
    return options


def outputs(options: Any, classes: Sequence[str], paths: Sequence[str]) -> list[tuple[str, str, Callable[[Any], str]]]:
    """(file, its first line, a function from Prediction to line) of each output; the file - is stdout."""
    found: list[tuple[str, str, Callable[[Any], str]]] = []
    if options.csv:
        head = as_csv(["path", "label", "probability", "abstain", "error", *(f"p_{c}" for c in classes)])
        found.append((options.csv, head, csv_row))
    if options.jsonl:
        found.append((options.jsonl, "", lambda row: json_row(row, classes)))
    if not found and not options.kaggle:
        width = min(60, max(len(one_line(path)) for path in paths))
        names = max(len(one_line(c)) for c in classes)
        found.append(("-", "", lambda row: table_row(row, width, names)))
    return found


def judge(rows: Iterator[Any], options: Any, classes: Sequence[str], paths: Sequence[str]) -> int:
    """Writes every output; the number of bad images."""
    wanted = outputs(options, classes, paths)
    texts = [[head] for _, head, _ in wanted]
    kept, bad = [], 0
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[attr-defined]
    for i, row in enumerate(rows):
        for (file, _, line), text in zip(wanted, texts, strict=True):
            if file == "-":
                print(text[0] * (i == 0) + line(row), end="", flush=True)
            else:
                text.append(line(row))
        bad += row.error is not None
        if options.kaggle or (options.show and len(kept) < SHOWN):
            kept.append(row)
    for (file, _, _), text in zip(wanted, texts, strict=True):
        if file != "-":
            write_file(file, "".join(text))
    if options.kaggle:
        write_file(options.kaggle, submission(kept, ids(paths)))
    if options.show:
        write_file(options.show, contact_sheet(kept))
    return bad


def main(argv: Sequence[str]) -> None:
    """The command."""
    options = read_options(argv)
    paths = expand(options.paths)
    from jaxcats.export.classifier import load

    if options.kaggle:
        ids(paths)
    classifier = load(options.model)
    if options.kaggle and len(classifier.classes) != 2:
        raise UserError(f"--kaggle: needs a classifier of two classes; this one has {len(classifier.classes)}.")
    started = time.perf_counter()
    rows = classifier.stream(paths, batch_size=options.batch_size, tta=options.tta)
    try:
        bad = judge(rows, options, classifier.classes, paths)
    except BrokenPipeError:  # `| head` has seen enough; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    seconds = time.perf_counter() - started
    if len(paths) > 1:
        print(f"{len(paths):,} images in {seconds:.1f} s ({len(paths) / seconds:,.0f} a second)", file=sys.stderr)
    if bad:
        raise RunError(f"{bad:,} of {len(paths):,} images could not be judged; their rows say why.")


if __name__ == "__main__":
    sys.exit(run_command(main))
