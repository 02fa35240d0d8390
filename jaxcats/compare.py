"""`python -m jaxcats.compare RUN_A RUN_B`: two runs on the same images, by a paired test."""

import csv
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcats.common.cli import Parser, run_command
from jaxcats.common.errors import UserError, one_line
from jaxcats.common.io import write_text
from jaxcats.common.stats import percent_digits, sentence
from jaxcats.evaluate.comparison import Answer, Comparison, compare_predictions, flattered, read_predictions

DESCRIPTION = (
    "Compares two runs on the same images: the errors of each, the exact McNemar test, and the images that one gets "
    "right and the other wrong."
)
SHOWN = 20


def report(found: Comparison, *, names: Sequence[str]) -> list[str]:
    """The lines that the command prints; `names` are A's and B's."""
    n, d = found.n, percent_digits(found.n)
    a_wrong, b_wrong = (found.both_wrong + x for x in (found.only_a_wrong, found.only_b_wrong))
    alone = [f"{x:,} only in {name}" for x, name in ((found.only_in_a, "A"), (found.only_in_b, "B")) if x]
    low, high = (f"{100 * x:+.{d}f}" for x in found.interval)
    lines = [
        f"A: {_printable(names[0])}: {sentence(a_wrong, n)}",
        f"B: {_printable(names[1])}: {sentence(b_wrong, n)}",
        f"{n:,} images compared" + (f"; left out: {', '.join(alone)}" if alone else "") + ".",
        "",
        f"  {found.both_right:>7,}  both right",
        f"  {found.only_a_wrong:>7,}  only A wrong",
        f"  {found.only_b_wrong:>7,}  only B wrong",
        f"  {found.both_wrong:>7,}  both wrong",
        "",
        f"{found.verdict} Exact McNemar test on the {found.only_a_wrong + found.only_b_wrong:,} images that only one gets right.",
        f"Accuracy of B less that of A: {100 * (a_wrong - b_wrong) / n:+.{d}f} points (95 % interval {low} to {high}).",
    ]
    if found.p >= 0.05 and found.interval[0] * found.interval[1] > 0:
        lines.append("The interval is approximate and leaves 0 out by a little; the exact test decides.")
    if found.changed:
        lines += ["", "These changed sides; with the probability that each gives the actual class:"]
    for path, a, b in found.changed[:SHOWN]:
        side = "only A wrong" if a.predicted != a.label else "only B wrong"
        lines.append(f"  {side}  A {a.probability:.4f}  B {b.probability:.4f}  {_printable(path)}")
    more = len(found.changed) - SHOWN
    return lines + ([f"  ... and {more:,} more; --out FILE.csv has all."] if more > 0 else [])


def _printable(text: str) -> str:
    """One line that any screen takes: bytes of a name that are not UTF-8 are shown as \\udcXX."""
    return one_line(text).encode("utf-8", "backslashreplace").decode("utf-8")


def write_changed(path: Path, changed: Sequence[tuple[str, Answer, Answer]]) -> None:
    """The images that changed sides as CSV, with both answers and the probabilities of the actual class."""
    text = io.StringIO(newline="")
    out = csv.writer(text)
    out.writerow(["path", "label", "predicted_a", "predicted_b", "probability_a", "probability_b"])
    out.writerows([name, a.label, a.predicted, b.predicted, a.probability, b.probability] for name, a, b in changed)
    write_text(path, text.getvalue())


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m jaxcats.compare", description=DESCRIPTION)
    run: dict[str, Any] = {"help": "run folder, or a predictions.csv"}
    parser.add_argument("a", metavar="RUN_A", **run)
    parser.add_argument("b", metavar="RUN_B", **run)
    parser.add_argument("--out", metavar="FILE.csv", help="where to write all images that changed sides")
    options = parser.parse_args(argv)
    (a, ours), (b, theirs) = read_predictions(options.a), read_predictions(options.b)
    if set(ours) != set(theirs):
        raise UserError(f"A has the classes {', '.join(ours)}; B has {', '.join(theirs)}: they can't be compared.")
    found = compare_predictions(a, b)
    print("\n".join(report(found, names=(options.a, options.b))))
    for name, place in (("A", options.a), ("B", options.b)):
        if flattered(place):
            print(f"{name}'s best epoch was chosen on its validation images, so its number flatters.")
    if options.out:
        write_changed(Path(os.path.expanduser(options.out)), found.changed)
        print(f"Written: {options.out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
