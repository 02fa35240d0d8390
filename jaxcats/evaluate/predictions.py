"""What judging leaves in a folder: predictions.csv, metrics.json and its table on the screen."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcats.common import stats
from jaxcats.common.errors import unwritable
from jaxcats.common.io import write_json, write_text
from jaxcats.evaluate import metrics

if TYPE_CHECKING:
    from jaxcats.evaluate.calibration import Calibration


CHOSE = "also chose the best epoch, so the number flatters"
USED = ["temperature", "abstain threshold"]  # what is always chosen on the validation images


def write_predictions(
    path: Path,
    paths: Sequence[str],
    *,
    labels: np.ndarray,
    classes: Sequence[str],
    logits: np.ndarray,
    calibration: "Calibration | None" = None,
) -> None:
    """predictions.csv: path, label (empty where unknown), predicted, and the network's own probability of each class.

    With a calibration there are two columns more after `predicted`, which are what predict says: `probability` of the
    answer, after the temperature, and `abstain`.
    """
    probabilities = np.exp(stats.log_softmax(logits))
    more: list[list[Any]] = [[] for _ in paths]
    if calibration is not None:
        sure = np.exp(stats.log_softmax(logits / calibration.temperature)).max(1)
        least = -1.0 if calibration.threshold is None else calibration.threshold
        more = [[f"{p:.9g}", "yes" if p < least else "no"] for p in sure.tolist()]
    text = io.StringIO(newline="")
    out = csv.writer(text)
    added = ["probability", "abstain"] if calibration else []
    out.writerow(["path", "label", "predicted", *added, *(f"p_{c}" for c in classes)])
    for name, label, row, extra in zip(paths, labels.tolist(), probabilities, more, strict=True):
        known = classes[label] if label >= 0 else ""
        out.writerow([name, known, classes[int(row.argmax())], *extra, *(f"{p:.9g}" for p in row)])
    write_text(path, text.getvalue())


def labelled(split: Any) -> bool:
    """Whether every image's class is known."""
    return bool((split.labels >= 0).all())


def write_results(
    folder: Path,
    split: Any,
    *,
    classes: Sequence[str],
    logits: np.ndarray,
    facts: dict[str, Any],
    max_error: float,
    calibration: "Calibration | None" = None,
    chose: str = "",
) -> "tuple[dict[str, Any], Calibration | None]":
    """Writes predictions.csv and, with labels, metrics.json, and prints the result.

    Args:
        folder: where to.
        split: the images, with labels or without (-1).
        classes: names in the order of the logits.
        logits: [N, C].
        facts: further entries of metrics.json ("seconds", "checkpoint", ...).
        max_error: of the answers given when the classifier may abstain.
        calibration: chosen on other images; None: fitted on these, and reported out of fold.
        chose: what these very images were used to choose, said beside the result; empty for nothing.

    Returns:
        metrics.json's content and the calibration: the one given or the one fitted; None without labels.
    """
    found: dict[str, Any] = {}
    if labelled(split):
        found, calibration = metrics.evaluation_metrics(
            logits, split.labels, classes, calibration=calibration, max_error=max_error
        )
        found = facts | found
    try:
        write_predictions(
            folder / "predictions.csv",
            split.paths,
            labels=split.labels,
            classes=classes,
            logits=logits,
            calibration=calibration,
        )
        if found:
            write_json(folder / "metrics.json", found)
    except OSError as e:
        raise unwritable(f"{folder}:", e) from None
    if found:
        print(stats.sentence(found["errors"], found["n"]) + (f"; these images {chose}" if chose else ""))
        print(metrics.table(found))
    else:
        print(f"{len(split):,} images without labels: predictions only.")
    return found, calibration


def read_metrics(folder: Path) -> dict[str, Any]:
    """What an earlier metrics.json in the folder says; nothing when there is none or it can't be read."""
    try:
        return dict(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def read_calibration(run: Path, checkpoint: Mapping[str, Any]) -> "Calibration | None":
    """The temperature and threshold that a run's own validation images gave this checkpoint of it, if they did."""
    from jaxcats.evaluate.calibration import Calibration

    kept = read_metrics(run)
    try:
        now, then = checkpoint.get("state"), kept["checkpoint"].get("state")
        # Of equal steps in one folder: there may have been another training in it before.
        if kept["checkpoint"]["step"] != checkpoint["step"] or (now and then and now != then):
            return None
        abstain = kept["abstain"]
        return Calibration(
            temperature=float(kept["calibration"]["temperature"]),
            threshold=abstain["threshold"],
            max_error=float(abstain["max_error"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
