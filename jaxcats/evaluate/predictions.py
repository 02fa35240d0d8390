"""What an evaluation leaves in a folder: predictions.csv, metrics.json, and the table on the screen."""

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
from jaxcats.evaluate.calibration import Calibration
from jaxcats.evaluate.metrics import evaluation_metrics, table

if TYPE_CHECKING:
    from jaxcats.data.index import Split
    from jaxcats.evaluate.run import Run

# What an evaluation chooses on the validation images, besides what training chooses on them; model.json names it so.
CHOSEN_ON_VALIDATION = ["temperature", "abstain threshold"]


def write_results(
    folder: Path,
    run: "Run",
    split: "Split",
    logits: np.ndarray,
    *,
    facts: dict[str, Any],
    max_error: float | None = None,
    calibration: Calibration | None = None,
) -> tuple[dict[str, Any], Calibration | None]:
    """Writes predictions.csv and, with labels, metrics.json, and prints the result.

    Args:
        folder: where to.
        run: the trained run.
        split: N images, with labels or without (-1).
        logits: [N, C].
        facts: further entries of metrics.json ("seconds", "checkpoint", ...).
        max_error: the share of wrong predictions to allow when the classifier may abstain; None: the run's.
        calibration: chosen on other images; None: these are the validation images, so it is fitted on them and reported
            out of fold.

    Returns:
        metrics.json's content and the calibration that was given or fitted; {} and the one given without labels.
    """
    metrics, chose_epoch = {}, calibration is None and run.best_epoch
    if is_labelled(split):
        options = {"calibration": calibration, "max_error": max_error or run.config.max_error}
        metrics, calibration = evaluation_metrics(logits, split.labels, run.classes, **options)
        metrics = facts | metrics
    try:
        write_predictions(folder / "predictions.csv", split, run.classes, logits, calibration)
        if metrics:
            write_json(folder / "metrics.json", metrics)
    except OSError as e:
        raise unwritable(f"{folder}:", e) from None
    if metrics:
        caveat = "; the best epoch was chosen on these images, so the result is too good" if chose_epoch else ""
        print(stats.sentence(metrics["errors"], metrics["n"]) + caveat)
        print(table(metrics))
    else:
        print(f"{len(split):,} images without labels: predictions only.")
    return metrics, calibration


def write_predictions(
    path: Path, split: "Split", classes: Sequence[str], logits: np.ndarray, calibration: Calibration | None = None
) -> None:
    """Writes predictions.csv: path, label (empty where unknown), predicted, and the network's own probability of each class.

    With a calibration there are two more columns after `predicted`, which are what predict says: `probability` of the
    predicted class, after the temperature, and `abstain`.
    """
    probabilities = np.exp(stats.log_softmax(logits))
    columns: dict[str, Sequence[Any]] = {"path": split.paths}
    columns["label"] = [classes[label] if label >= 0 else "" for label in split.labels]
    columns["predicted"] = [classes[best] for best in probabilities.argmax(1)]
    if calibration is not None:
        confidence = np.exp(stats.log_softmax(logits / calibration.temperature)).max(1)
        columns["probability"] = [f"{p:.9g}" for p in confidence]
        columns["abstain"] = ["no" if answered else "yes" for answered in calibration.is_answered(confidence)]
    for name, p in zip(classes, probabilities.T, strict=True):
        columns[f"p_{name}"] = [f"{x:.9g}" for x in p]
    write_csv(path, [list(columns), *zip(*columns.values(), strict=True)])


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Writes a CSV file, whole or not at all; file names that are not UTF-8 keep their bytes."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def is_labelled(split: "Split") -> bool:
    """Whether every image's class is known."""
    return bool((split.labels >= 0).all())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where the file is missing or something else."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def read_calibration(run_folder: Path, checkpoint: Mapping[str, Any]) -> Calibration | None:
    """The temperature and threshold that a run's own validation images gave this checkpoint; None where they are unknown."""
    metrics = read_json(run_folder / "metrics.json")
    try:
        evaluated = metrics["checkpoint"]
        # Another training in the same folder may have ended at the same step.
        hashes = {facts.get("state") for facts in (evaluated, checkpoint)} - {None, ""}
        if evaluated["step"] != checkpoint["step"] or len(hashes) > 1:
            return None
        return Calibration(
            temperature=float(metrics["calibration"]["temperature"]),
            threshold=metrics["abstain"]["threshold"],
            max_error=float(metrics["abstain"]["max_error"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
