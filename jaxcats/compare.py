"""`python -m jaxcats.compare RUN_A RUN_B`: two runs on the same images, by a paired test."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxcats.common.cli import Parser, run_command
from jaxcats.common.errors import UserError, one_line
from jaxcats.common.stats import percent_digits, sentence
from jaxcats.evaluate import comparison
from jaxcats.evaluate.predictions import write_csv

DESCRIPTION = (
    "Compares two runs on the same images: errors, the exact McNemar test, and the images that only one gets right."
)
SHOWN = 20  # changed images that are printed


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m jaxcats.compare", description=DESCRIPTION)
    for name in ("a", "b"):
        parser.add_argument(name, metavar=f"RUN_{name.upper()}", help="run folder, or a predictions.csv")
    parser.add_argument(
        "--out", metavar="FILE.csv", help="file to write, with all images that only one of the two gets right"
    )
    options = parser.parse_args(argv)
    (a, a_classes), (b, b_classes) = map(comparison.read_predictions, (options.a, options.b))
    if set(a_classes) != set(b_classes):
        raise UserError(f"A has the classes {', '.join(a_classes)}; B has {', '.join(b_classes)}: can't compare them.")
    compared = comparison.compare_predictions(a, b)
    print_comparison(compared, options.a, options.b)
    for name, place in (("A", options.a), ("B", options.b)):
        if comparison.chose_best_epoch(place):
            print(f"{name}'s best epoch was chosen on its validation images, so its result is too good.")
    if options.out:
        columns = ["path", "label", "predicted_a", "predicted_b", "probability_a", "probability_b"]
        changed = compared.changed
        rows = [[path, a.label, a.predicted, b.predicted, a.probability, b.probability] for path, a, b in changed]
        write_csv(Path(os.path.expanduser(options.out)), [columns, *rows])
        print(f"Written: {options.out}")


def print_comparison(c: comparison.Comparison, a_name: str, b_name: str) -> None:
    """Prints both results, the counts, the test, and the first images that only one gets right."""
    d = percent_digits(c.n)
    difference, low, high = (f"{100 * x:+.{d}f}" for x in ((c.only_a_wrong - c.only_b_wrong) / c.n, *c.interval))
    print(f"A: {one_line(a_name)}: {sentence(c.both_wrong + c.only_a_wrong, c.n)}")
    print(f"B: {one_line(b_name)}: {sentence(c.both_wrong + c.only_b_wrong, c.n)}")
    print(f"{c.n:,} images compared; left out: {c.only_in_a:,} only in A, {c.only_in_b:,} only in B.")
    print(f"\n  {c.both_right:>7,}  both right")
    print(f"  {c.only_a_wrong:>7,}  only A wrong")
    print(f"  {c.only_b_wrong:>7,}  only B wrong")
    print(f"  {c.both_wrong:>7,}  both wrong\n")
    print(f"{c.verdict} Exact McNemar test on the {len(c.changed):,} images that only one gets right.")
    print(f"Accuracy of B minus that of A: {difference} points (approximate 95 % interval {low} to {high}).")
    if c.changed:
        print(f"\nImages that changed sides with the probability of the actual class, at most {SHOWN} (--out has all):")
    for path, a, b in c.changed[:SHOWN]:
        side = "only B wrong" if a.correct else "only A wrong"
        print(f"  {side}  A {a.probability:.4f}  B {b.probability:.4f}  {one_line(path)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
