"""The numbers of metrics.json, and the table of them that train and evaluate print."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcats.common.errors import UserError
from jaxcats.common.stats import brier, log_softmax, percent_digits, summary, wilson_interval
from jaxcats.evaluate.calibration import Calibration, abstain_metrics, calibration_metrics, cross_fit, fit_calibration


def evaluation_metrics(
    logits: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    calibration: Calibration | None = None,
    max_error: float = 0.005,
) -> tuple[dict[str, Any], Calibration]:
    """Everything that labelled images say about a classifier, in plain JSON types; what would be 0/0 is None.

    Args:
        logits: float [N, C], at least one image.
        labels: int [N], all known; a class may have no image.
        classes: C names.
        calibration: chosen on other images, to be evaluated here. None: it is fitted on these images, and each image's
            numbers "after" are those of the temperature and the threshold that the other folds choose.
        max_error: the share of wrong predictions to choose the threshold for; only where no calibration is given.

    Returns:
        What `summary` gives and {"brier", "auc" (two classes only), "macro_f1", "balanced_accuracy", "top_k", "classes",
        "per_class", "confusion" (rows are actual classes), "most_confused", "calibration" (before and after the
        temperature), "abstain"}, and the calibration that was given or fitted.
    """
    if not len(labels):
        raise UserError("there are no images with labels to evaluate.")
    fitted = calibration is None
    log_probs, correct = log_softmax(logits), logits.argmax(-1) == labels
    if calibration is None:
        calibration = fit_calibration(logits, labels, max_error=max_error)
        after, answered, temperatures = cross_fit(logits, labels, max_error=max_error)
        out_of_fold = {"out_of_fold": abstain_metrics(answered, correct)}
    else:
        after, temperatures, out_of_fold = log_softmax(logits / calibration.temperature), np.zeros(0), {}
    confidence = np.exp(log_softmax(logits / calibration.temperature).max(-1))
    metrics = summary(logits, labels) | {"brier": brier(log_probs, labels)}
    if len(classes) == 2:
        metrics["auc"] = area_under_roc(logits[:, 1] - logits[:, 0], labels)
    metrics |= {"classes": list(classes), "top_k": top_k(logits, labels)} | by_class(logits, labels, classes)
    metrics["calibration"] = {
        "temperature": calibration.temperature,
        "fitted_on_these_pictures": fitted,
        "folds": len(temperatures) or None,
        "fold_temperatures": temperatures.tolist() or None,
        "bins": 15,
        "before": calibration_metrics(log_probs, labels),
        "after": calibration_metrics(after, labels),
    }
    metrics["abstain"] = {"max_error": calibration.max_error, "threshold": calibration.threshold}
    metrics["abstain"] |= abstain_metrics(calibration.is_answered(confidence), correct) | out_of_fold
    return metrics, calibration


def area_under_roc(score: np.ndarray, labels: np.ndarray) -> float | None:
    """Of two classes: how often an image of the second one scores higher than one of the first; None if one is absent."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each group of equal scores
    right = np.cumsum(labels[order])[last]
    wrong = last + 1 - right
    if not (right[-1] and wrong[-1]):
        return None
    # A point on the straight line between its neighbours adds nothing but rounding.
    bend = np.concatenate([[True], (np.diff(wrong, 2) != 0) | (np.diff(right, 2) != 0), [True]])[-len(last) :]
    x, y = (np.append(0, n[bend]) / n[-1] for n in (wrong, right))
    return float(np.trapezoid(y, x))


def top_k(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The images whose class is not among the k likeliest, for k of 2, 3 and 5 below the number of classes."""
    order = np.argsort(-logits, axis=-1, kind="stable")  # so that the first of equals is argmax's
    errors = {}
    for k in (2, 3, 5):
        if k < logits.shape[1]:
            right = int((order[:, :k] == labels[:, None]).any(-1).sum())
            errors[str(k)] = {"errors": len(labels) - right, "interval": list(wilson_interval(right, len(labels)))}
    return errors


def by_class(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """{"macro_f1", "balanced_accuracy", "per_class", "confusion", "most_confused"}; averages leave undefined classes out."""
    size = len(classes)
    confusion = np.bincount(labels * size + logits.argmax(-1), minlength=size * size).reshape(size, size)
    right, actual, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):  # 0/0 is nan, and becomes None
        precision, recall, f1 = right / predicted, right / actual, 2 * right / (actual + predicted)
    shares = [[None if np.isnan(x) else float(x) for x in column] for column in (precision, recall, f1)]
    per_class = []
    for i, name in enumerate(classes):
        row = {"class": name, "n": int(actual[i]), "predicted": int(predicted[i]), "right": int(right[i])}
        row |= {"precision": shares[0][i], "recall": shares[1][i]}
        row |= {"recall_interval": list(wilson_interval(row["right"], row["n"])), "f1": shares[2][i]}
        per_class.append(row)
    errors = confusion * (1 - np.eye(size, dtype=int))
    cells = [divmod(cell, size) for cell in np.argsort(-errors, axis=None, kind="stable")[:10].tolist()]
    pairs = [(classes[i], classes[j], int(errors[i, j])) for i, j in cells if errors[i, j]]
    return {
        "macro_f1": float(np.nanmean(f1)),
        "balanced_accuracy": float(np.nanmean(recall)),
        "per_class": per_class,
        "confusion": confusion.tolist(),
        "most_confused": [{"actual": actual, "predicted": predicted, "n": n} for actual, predicted, n in pairs],
    }


def table(metrics: Mapping[str, Any]) -> str:
    """What `evaluation_metrics` gives, for the screen: scores, calibration, abstaining and the classes, in 100 columns."""
    scores = [f"log loss {metrics['log_loss']:.4f}", f"Brier score {metrics['brier']:.4f}"]
    if metrics.get("auc") is not None:
        scores.append(f"AUC {metrics['auc']:.5f}")
    if metrics["top_k"]:
        k, top = list(metrics["top_k"].items())[-1]
        scores.append(f"actual class not among the {k} likeliest: {top['errors']:,}")
    calibration = metrics["calibration"]
    before, after = calibration["before"], calibration["after"]
    source = "out of fold" if calibration["fitted_on_these_pictures"] else "chosen on other images"
    lines = [
        ", ".join(scores),
        f"Temperature {calibration['temperature']:.3f}, {source}: log loss {before['log_loss']:.4f} -> "
        f"{after['log_loss']:.4f}, Brier score {before['brier']:.4f} -> {after['brier']:.4f},",
        f"    calibration error {_ece(before)} -> {_ece(after)}",
        *_abstain_lines(metrics["abstain"], metrics["n"]),
        "",
        *_class_lines(metrics["per_class"]),
    ]
    if metrics["most_confused"]:
        lines += ["", "Most confused:"]
    for pair in metrics["most_confused"][:5]:
        lines.append(f"{pair['n']:>7,}  {_short(pair['actual'])} taken for {_short(pair['predicted'])}")
    return "\n".join(lines)


def _ece(metrics: Mapping[str, Any]) -> str:
    low, high = metrics["ece_interval"]
    return f"{100 * metrics['ece']:.2f} % ({100 * low:.2f} to {100 * high:.2f})"


def _abstain_lines(abstain: Mapping[str, Any], n: int) -> list[str]:
    def share(metrics: Mapping[str, Any]) -> str:
        low, high = (100 * end for end in metrics["interval"])
        coverage = f"{100 * metrics['coverage']:.{percent_digits(n)}f} % of the images"
        wrong = f"{100 * (metrics['error'] or 0):.2f} % of them wrong"
        return f"{coverage}, {wrong} ({metrics['errors']:,}; 95 % interval {low:.2f} to {high:.2f} %)"

    threshold, limit = abstain["threshold"], f"at most {100 * abstain['max_error']:g} % errors"
    if threshold is None:
        rule = f"Every prediction is given; there is no threshold for {limit}:"
    else:
        rule = f"Predictions are given at a probability of {threshold:.9g} or more (chosen for {limit}):"
    lines = [rule, f"    {share(abstain)}"]
    if "out_of_fold" in abstain:
        lines.append(f"    out of fold: {share(abstain['out_of_fold'])}")
    return lines


def _class_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    hidden = len(rows) - 10
    if hidden > 0:
        rows = sorted(rows, key=lambda row: 2.0 if row["f1"] is None else row["f1"])[:10]
    cells = [("class", "images", "right", "precision", "recall (95 % interval)", "F1")]
    for row in rows:
        n, d = row["n"], percent_digits(row["n"])
        low, high = (f"{100 * end:.{d}f}" for end in row["recall_interval"])
        recall = f"{100 * row['recall']:.{d}f} % ({low} to {high})" if n else "-"
        f1 = "-" if row["f1"] is None else f"{row['f1']:.4f}"
        d = percent_digits(row["predicted"])
        precision = "-" if row["precision"] is None else f"{100 * row['precision']:.{d}f} %"
        cells.append((_short(row["class"]), f"{n:,}", f"{row['right']:,}", precision, recall, f1))
    width = max(len(row[0]) for row in cells)
    lines = [f"{row[0]:<{width}}  {row[1]:>8}  {row[2]:>7}  {row[3]:>9}  {row[4]:<25}  {row[5]:>6}" for row in cells]
    if hidden > 0:
        lines.append(f"These are the ten classes with the lowest F1; {hidden:,} more are in metrics.json.")
    return lines


def _short(name: str) -> str:
    """A name on one line of at most 32 characters; the middle is left out, because names often differ at the end."""
    name = " ".join(name.split())
    return name if len(name) <= 32 else f"{name[:18]}…{name[-13:]}"
