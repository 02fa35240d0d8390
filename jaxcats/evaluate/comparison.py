"""Two classifiers on the same images: a paired test of their predictions.csv; `compare` prints it."""

import csv
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxcats.common.errors import UserError
from jaxcats.common.stats import wilson_interval
from jaxcats.evaluate.predictions import read_json


@dataclass(frozen=True)
class Prediction:
    """One image in predictions.csv: class names, and the predicted probability of the actual class."""

    label: str
    predicted: str
    probability: float

    @property
    def correct(self) -> bool:
        return self.predicted == self.label


@dataclass(frozen=True)
class Comparison:
    """Two classifiers, A and B, on the images that both predicted.

    Attributes:
        both_right: number of images that both got right.
        only_a_wrong: that only A got wrong.
        only_b_wrong: that only B got wrong.
        both_wrong: that both got wrong.
        only_in_a: images that B did not predict.
        only_in_b: images that A did not predict.
        p: of the exact McNemar test.
        interval: 95 %, of the accuracy of B minus that of A.
        changed: of the images that one gets right and the other wrong, (path, A's prediction, B's prediction), the
            largest change of the actual class's probability first.
    """

    both_right: int
    only_a_wrong: int
    only_b_wrong: int
    both_wrong: int
    only_in_a: int
    only_in_b: int
    p: float
    interval: tuple[float, float]
    changed: list[tuple[str, Prediction, Prediction]]

    @property
    def n(self) -> int:
        """The number of images that both predicted."""
        return self.both_right + self.only_a_wrong + self.only_b_wrong + self.both_wrong

    @property
    def verdict(self) -> str:
        """A sentence that says which is better, or that they can't be told apart."""
        p = f"p = {self.p:.2g}" if self.p >= 1e-4 else "p < 0.0001"
        if self.p >= 0.05:
            return f"A and B can't be told apart ({p})."
        return f"{'A' if self.only_a_wrong < self.only_b_wrong else 'B'} is better ({p})."


def compare_predictions(a: Mapping[str, Prediction], b: Mapping[str, Prediction]) -> Comparison:
    """Compares predictions by path.

    Raises:
        UserError: no image in common, or an image with two labels.
    """
    shared = [path for path in a if path in b]
    if not shared:
        raise UserError("A and B have no image in common: evaluate both on the same folder.")
    for path in shared:
        if a[path].label != b[path].label:
            raise UserError(f"{path}: is '{a[path].label}' in A and '{b[path].label}' in B; evaluate both again.")
    counts = Counter((a[path].correct, b[path].correct) for path in shared)
    table = counts[True, True], counts[False, True], counts[True, False], counts[False, False]
    changed = [(path, a[path], b[path]) for path in shared if a[path].correct != b[path].correct]
    return Comparison(
        *table,
        only_in_a=len(a) - len(shared),
        only_in_b=len(b) - len(shared),
        p=mcnemar_exact(*table[1:3]),
        interval=paired_interval(*table),
        changed=sorted(changed, key=lambda row: -abs(row[1].probability - row[2].probability)),
    )


def mcnemar_exact(b: int, c: int) -> float:
    """The two-sided p of b and c discordant pairs if both kinds were equally likely (McNemar 1947, exact); 1 without pairs."""
    n = b + c
    tail = sum(math.comb(n, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_interval(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """A 95 % interval of the difference of two proportions of the same images, at least one, first minus second.

    Square-and-add of Wilson intervals with the pairs' correlation (Newcombe, Statist. Med. 17, 2635-2650, 1998, method 10).
    """
    n = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    product = first * (n - first) * second * (n - second)
    odds = both * neither - only_first * only_second
    odds = max(odds - n / 2, 0) if odds > 0 else odds
    phi = odds / math.sqrt(product) if product else 0.0
    p, q = first / n, second / n
    (p_low, p_high), (q_low, q_high) = wilson_interval(first, n), wilson_interval(second, n)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)


def read_predictions(place: str | Path) -> tuple[dict[str, Prediction], tuple[str, ...]]:
    """The predictions by path, and the classes, of a run folder or a predictions.csv that train or evaluate wrote.

    Raises:
        OSError: no such file.
        UserError: not a predictions.csv, a damaged one, or images without labels.
    """
    file = Path(os.path.expanduser(place))
    if file.is_dir():
        file /= "predictions.csv"
    predictions: dict[str, Prediction] = {}
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        try:
            columns = list(rows.fieldnames or ())
            classes = tuple(name.removeprefix("p_") for name in columns if name.startswith("p_"))
            if not classes or not {"path", "label", "predicted"} <= set(columns):
                raise UserError(f"{file}: not a predictions.csv; the columns are path, label, predicted, p_CLASS ...")
            for row in rows:
                path, label, predicted = row["path"], row["label"], row["predicted"]
                if label == "":
                    raise UserError(f"{file}: {path} has no label; only images with labels can be compared.")
                probability = float(row[f"p_{label}"])
                if path in predictions or predicted not in classes or not math.isfinite(probability):
                    raise ValueError
                predictions[path] = Prediction(label, predicted, probability)
        except (csv.Error, KeyError, TypeError, ValueError):
            raise UserError(f"{file}: damaged at line {rows.reader.line_num}; evaluate the run again.") from None
    return predictions, classes


def chose_best_epoch(place: str | Path) -> bool:
    """Whether a run folder says that the images of its predictions.csv chose its best epoch."""
    folder = Path(os.path.expanduser(place))
    checkpoint = read_json(folder / "metrics.json").get("checkpoint") if (folder / "config.yaml").is_file() else None
    return isinstance(checkpoint, dict) and bool(checkpoint.get("valid_used_for"))
