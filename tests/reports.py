"""An evaluated split for tests of the report: invented predictions for images that are there, without a network."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from jaxcats.common.config import Config, DataConfig
from jaxcats.data.index import Split
from jaxcats.evaluate.figures import EvaluatedSplit


def evaluated(root, paths, *, classes, wrong, metrics, seed=0, folder=None, data_root="images", **run):
    """The first `wrong` of the images are predicted wrong, and the others right; `metrics` are taken as they are."""
    rng, n, c = np.random.default_rng(seed), len(paths), len(classes)
    labels = np.arange(n) % c
    predicted = np.where(np.arange(n) < wrong, (labels + 1) % c, labels)
    confidence = rng.uniform(0.51, 0.9999, n)
    probs = np.repeat(((1 - confidence) / (c - 1))[:, None], c, axis=1)
    probs[np.arange(n), predicted] = confidence
    facts = {"use": "last", "step": 12, "best_epoch": False, "user_functions": None, "fingerprint": "abc-def"} | run
    opened = SimpleNamespace(
        folder=folder or root / "no run folder",
        config=Config(data=DataConfig(data_root)),
        preprocess=SimpleNamespace(size=224),
        classes=tuple(classes),
        **facts,
    )
    logits = np.log(probs) * metrics["calibration"]["temperature"]
    return EvaluatedSplit(opened, Split(root, tuple(paths), labels, ("",) * n), logits, metrics)


def metrics_of(classes, *, n=1000, errors=9, threshold=0.9):
    """What evaluation_metrics gives, in short."""
    rows = [
        {"class": name, "n": 100 - k, "predicted": 9, "right": 9, "precision": 1.0, "recall": 0.9, "f1": 0.947}
        | {"recall_interval": [0.596, 0.982]}
        for k, name in enumerate(classes)
    ]
    rows[-1] |= {"n": 0, "right": 0, "recall": None, "recall_interval": [0.0, 1.0], "precision": None, "f1": None}
    answered = {"answered": 950, "coverage": 0.95, "errors": 3, "error": 3 / 950, "interval": [0.001, 0.009]}
    scores = {"log_loss": 0.05, "brier": 0.01, "ece": 0.0123, "ece_interval": [0.005, 0.02]}
    return {
        "n": n,
        "errors": errors,
        "interval": [0.983, 0.995],
        "classes": list(classes),
        "per_class": rows,
        "most_confused": [{"actual": classes[1], "predicted": classes[0], "n": 6}],
        "top_k": {"2": {"errors": 1, "interval": [0.99, 1.0]}},
        "auc": 0.9991,
        "macro_f1": 0.98,
        "balanced_accuracy": 0.97,
        "calibration": {"temperature": 1.5, "fitted_on_these_pictures": True}
        | {"before": scores, "after": scores | {"ece": 0.0046}},
        "abstain": {"max_error": 0.005, "threshold": threshold, **answered, "out_of_fold": answered | {"errors": 4}},
    }


def run_folder(folder: Path, *, findings=(), suspects=(), versions=None) -> Path:
    """Writes what the report reads of a run folder."""
    (folder / "model").mkdir(parents=True)
    (folder / "data.json").write_text(json.dumps({"pictures": {"train": {"cats": 7}}, "findings": list(findings)}))
    (folder / "versions.json").write_text(json.dumps({"versions": versions or {}, "backend": "cpu"}))
    (folder / "model" / "model.json").write_text('{"files": {"model.safetensors": {"sha256": "0123"}}}')
    with (folder / "suspects.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        out = csv.DictWriter(file, ["path", "label", "suggested", "reason"])
        out.writeheader()
        out.writerows(suspects)
    return folder
