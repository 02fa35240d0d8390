"""`python -m jaxcats.compare RUN_A RUN_B`: two runs on the same images, by a paired test."""

import csv
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxcats.common.errors import UserError
from jaxcats.common.stats import wilson_interval
from jaxcats.evaluate.predictions import read_metrics


@dataclass(frozen=True)
class Answer:
    """What predictions.csv says of one image: class names, and the probability given to the actual class."""

    label: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Comparison:
    """Two classifiers, A and B, on the images that both judged.

    Attributes:
        both_right: images.
        only_a_wrong: likewise.
        only_b_wrong: likewise.
        both_wrong: likewise.
        only_in_a: images that B did not judge.
        only_in_b: images that A did not judge.
        p: of the exact McNemar test.
        interval: 95 %, of the accuracy of B less that of A.
        changed: of the images that one gets right and the other wrong, (path, A's answer, B's answer), the largest
            change of the actual class's probability first.
    """

    both_right: int
    only_a_wrong: int
    only_b_wrong: int
    both_wrong: int
    only_in_a: int
    only_in_b: int
    p: float
    interval: tuple[float, float]
    changed: list[tuple[str, Answer, Answer]]

    @property
    def n(self) -> int:
        """Images that both judged."""
        return self.both_right + self.only_a_wrong + self.only_b_wrong + self.both_wrong

    @property
    def verdict(self) -> str:
        """Which is better, or that nobody can tell."""
        p = f"p = {self.p:.2g}" if self.p >= 1e-4 else "p < 0.0001"
        if self.p >= 0.05:
            return f"A and B can't be told apart ({p})."
        return f"{'A' if self.only_a_wrong < self.only_b_wrong else 'B'} is better ({p})."


def mcnemar_exact(b: int, c: int) -> float:
    """The two-sided p of b against c discordant pairs if each were as likely as the other (McNemar 1947, exact): 1 if none."""
    n, term, total = b + c, 1, 0
    for i in range(min(b, c) + 1):
        total += term  # of binomial coefficients, as whole numbers
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)


def paired_interval(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """A 95 % interval of the difference of two proportions of the same n images, first less second; (-1, 1) when n is 0.

    Square-and-add of Wilson intervals with the pairs' correlation (Newcombe, Statist. Med. 17, 2635-2650, 1998, method 10).
    """
    n = both + only_first + only_second + neither
    if not n:
        return -1.0, 1.0
    first, second = both + only_first, both + only_second
    product = first * (n - first) * second * (n - second)
    odds = both * neither - only_first * only_second
    if odds > 0:
        odds = max(odds - n / 2, 0)
    phi = odds / math.sqrt(product) if product else 0.0
    p, q = first / n, second / n
    (p_low, p_high), (q_low, q_high) = wilson_interval(first, n), wilson_interval(second, n)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)


def compare_predictions(a: Mapping[str, Answer], b: Mapping[str, Answer]) -> Comparison:
    """Compares answers by path.

    Raises:
        UserError: no image in common, or an image with two labels.
    """
    shared = [path for path in a if path in b]
    if not shared:
        examples = f" ('{next(iter(a))}' in A, '{next(iter(b))}' in B)" if a and b else ""
        raise UserError(f"A and B have no image in common{examples}: judge both on the same folder.")
    for path in shared:
        if a[path].label != b[path].label:
            raise UserError(
                f"{path}: is '{a[path].label}' in A and '{b[path].label}' in B; judge both again on the same folder."
            )
    counts, changed = dict.fromkeys(((x, y) for x in (False, True) for y in (False, True)), 0), []
    for path in shared:
        ours, theirs = a[path], b[path]
        right = ours.predicted == ours.label, theirs.predicted == theirs.label
        counts[right] += 1
        if right[0] != right[1]:
            changed.append((path, ours, theirs))
    both, only_a_wrong = counts[True, True], counts[False, True]
    only_b_wrong, neither = counts[True, False], counts[False, False]
    return Comparison(
        both_right=both,
        only_a_wrong=only_a_wrong,
        only_b_wrong=only_b_wrong,
        both_wrong=neither,
        only_in_a=len(a) - len(shared),
        only_in_b=len(b) - len(shared),
        p=mcnemar_exact(only_a_wrong, only_b_wrong),
        interval=paired_interval(both, only_a_wrong, only_b_wrong, neither),
        changed=sorted(changed, key=lambda row: -abs(row[1].probability - row[2].probability)),
    )


def read_predictions(place: str | Path) -> tuple[dict[str, Answer], tuple[str, ...]]:
    """Answers by path, and the classes, of a run folder or a predictions.csv that train or evaluate wrote.

    Raises:
        UserError: no such file, not a predictions.csv, images without labels, or one twice.
    """
    file = Path(os.path.expanduser(place))
    if file.is_dir():
        file /= "predictions.csv"
    if not file.is_file():
        raise UserError(f"{file}: there is no such file. Give a run folder that train wrote, or a predictions.csv.")
    found: dict[str, Answer] = {}
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        try:
            columns = list(rows.fieldnames or ())
            classes = tuple(c.removeprefix("p_") for c in columns if c.startswith("p_"))
            if not classes or not {"path", "label", "predicted"} <= set(columns):
                raise UserError(
                    f"{file}: not a predictions.csv (it needs the columns path, label, predicted, p_CLASS ...)."
                )
            for row in rows:
                path, label = row["path"], row["label"]
                if label == "":
                    raise UserError(f"{file}: {path} has no label; only images with labels can be compared.")
                if path in found:
                    raise UserError(f"{file}: {path} is in it twice; evaluate the run again.")
                found[path] = Answer(label, row["predicted"], float(row[f"p_{label}"]))
                if row["predicted"] not in classes or not math.isfinite(found[path].probability):
                    raise ValueError
        except (csv.Error, KeyError, TypeError, ValueError):
            raise UserError(f"{file}: damaged at line {rows.reader.line_num}; evaluate the run again.") from None
    return found, classes


def flattered(place: str | Path) -> bool:
    """Whether a run folder says that its best epoch was chosen on the images of its predictions.csv."""
    folder = Path(os.path.expanduser(place))
    checkpoint = read_metrics(folder).get("checkpoint") if (folder / "config.yaml").is_file() else None
    return isinstance(checkpoint, dict) and bool(checkpoint.get("valid_used_for"))
