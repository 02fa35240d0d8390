"""Counts, and how far they can be trusted."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcats.common.errors import UserError
from jaxcats.common.stats import brier, log_softmax, percent_digits, summary, wilson_interval

if TYPE_CHECKING:
    from jaxcats.evaluate.calibration import Calibration


def evaluation_metrics(
    logits: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    calibration: "Calibration | None" = None,
    max_error: float = 0.005,
    folds: int = 5,
    seed: int = 0,
) -> "tuple[dict[str, Any], Calibration]":
    """Everything that labelled images say about a classifier, in plain JSON types; what 0/0 would be is None.

    Args:
        logits: float [N, C], at least one image.
        labels: int [N], all known; a class may have no image.
        classes: C names.
        calibration: chosen on other images, to be judged here; None: chosen on these, and then each image's numbers
            "after" are those of the temperature and the threshold that the other folds choose.
        max_error: share of wrong answers to choose the threshold for; only where no calibration is given.
        folds: how many.
        seed: of the folds and of the bootstrap.

    Returns:
        What `summary` gives and {"brier", "auc" (two classes only), "macro_f1", "balanced_accuracy", "top_k", "classes",
        "per_class", "confusion" (rows are actual classes), "most_confused", "calibration" (before and after the
        temperature), "abstain"}, and the calibration that was given or chosen.
    """
    from jaxcats.evaluate import calibration as calibration_module  # which imports this module

    if not len(labels):
        raise UserError("there are no images with labels to judge.")
    fitted = calibration is None
    log_probs, correct = log_softmax(logits), logits.argmax(-1) == labels
    if calibration is None:
        calibration = calibration_module.fit_calibration(logits, labels, max_error=max_error)
        after, temperatures = calibration_module.out_of_fold(logits, labels, folds=folds, seed=seed)
        options = {"max_error": max_error, "seed": seed}
        given = calibration_module.given_out_of_fold(logits, labels, temperatures, **options)
        abstain = {"out_of_fold": calibration_module.count_answers(given, correct)}
    else:
        after, temperatures, abstain = log_softmax(logits / calibration.temperature), np.zeros(0), {}
    confidence = np.exp(log_softmax(logits / calibration.temperature).max(-1))
    found = summary(logits, labels) | {"brier": brier(log_probs, labels)}
    if len(classes) == 2:
        found["auc"] = area_under_roc(logits[:, 1] - logits[:, 0], labels)
    found |= {"classes": list(classes), "top_k": top_k(logits, labels)} | by_class(logits, labels, classes)
    found["calibration"] = {
        "temperature": calibration.temperature,
        "fitted_on_these_pictures": fitted,
        "folds": len(temperatures) or None,
        "fold_temperatures": temperatures.tolist() or None,
        "bins": 15,
        "before": calibration_module.calibration_metrics(log_probs, labels, seed=seed),
        "after": calibration_module.calibration_metrics(after, labels, seed=seed),
    }
    answers = calibration_module.answered(confidence, correct, calibration.threshold)
    found["abstain"] = {"max_error": calibration.max_error} | answers | abstain
    return found, calibration


def area_under_roc(score: np.ndarray, labels: np.ndarray) -> float | None:
    """Of two classes: how often an image of the second one scores higher than one of the first; None if one is absent."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each run of equal scores
    right = np.cumsum(labels[order])[last]
    wrong = last + 1 - right
    if not (right[-1] and wrong[-1]):
        return None
    # A point on the straight line of its neighbours adds nothing but rounding.
    bend = np.concatenate([[True], (np.diff(wrong, 2) != 0) | (np.diff(right, 2) != 0), [True]])[-len(last) :]
    x, y = (np.append(0, n[bend]) / n[-1] for n in (wrong, right))
    return float(np.trapezoid(y, x))


def top_k(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Images whose class is not among the k likeliest, for k of 2, 3 and 5 below the number of classes."""
    order = np.argsort(-logits, axis=-1, kind="stable")  # so that the first of equals is argmax's
    found = {}
    for k in (k for k in (2, 3, 5) if k < logits.shape[1]):
        right = int((order[:, :k] == labels[:, None]).any(-1).sum())
        found[str(k)] = {"errors": len(labels) - right, "interval": list(wilson_interval(right, len(labels)))}
    return found


def by_class(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """{"macro_f1", "balanced_accuracy", "per_class", "confusion", "most_confused"}; averages leave undefined classes out."""
    size = len(classes)
    confusion = np.bincount(labels * size + logits.argmax(-1), minlength=size * size).reshape(size, size)
    hits, of_actual, of_guessed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):  # 0/0 is nan, and becomes None
        scores = hits / of_guessed, hits / of_actual, 2 * hits / (of_actual + of_guessed)
    precision, recall, f1 = ([None if np.isnan(x) else float(x) for x in column] for column in scores)
    right, actual, guessed = hits.tolist(), of_actual.tolist(), of_guessed.tolist()
    wrong = confusion * (1 - np.eye(len(classes), dtype=int))
    worst = np.argsort(-wrong, axis=None, kind="stable")[:10]
    pairs = [(*divmod(int(i), len(classes)), int(wrong.flat[i])) for i in worst]
    return {
        "macro_f1": float(np.nanmean(scores[2])),
        "balanced_accuracy": float(np.nanmean(scores[1])),
        "per_class": [
            {
                "class": name,
                "n": actual[i],
                "predicted": guessed[i],
                "right": right[i],
                "precision": precision[i],
                "recall": recall[i],
                "recall_interval": list(wilson_interval(right[i], actual[i])),
                "f1": f1[i],
            }
            for i, name in enumerate(classes)
        ],
        "confusion": confusion.tolist(),
        "most_confused": [{"actual": classes[i], "predicted": classes[j], "n": n} for i, j, n in pairs if n],
    }


def table(found: Mapping[str, Any]) -> str:
    """What `judge` found, for the screen: scores, calibration, abstaining, the classes and what is confused, in 100 columns."""
    scores = [f"log loss {found['log_loss']:.4f}", f"Brier score {found['brier']:.4f}"]
    if found.get("auc") is not None:
        scores.append(f"AUC {found['auc']:.5f}")
    if found["top_k"]:
        k, top = list(found["top_k"].items())[-1]
        scores.append(f"actual class not among the {k} likeliest: {top['errors']:,}")
    lines = [
        ", ".join(scores),
        *_calibration_lines(found["calibration"]),
        *_abstain_lines(found["abstain"], found["n"]),
    ]
    lines += ["", *_class_lines(found["per_class"])]
    if found["most_confused"]:
        pairs = [
            f"{p['n']:>7,}  {_short(p['actual'])} taken for {_short(p['predicted'])}" for p in found["most_confused"]
        ]
        lines += ["", "Most confused:", *pairs[:5]]
    return "\n".join(lines)


def _calibration_lines(found: Mapping[str, Any]) -> list[str]:
    def ece(x: Mapping[str, Any]) -> str:
        low, high = x["ece_interval"]
        return f"{100 * x['ece']:.2f} % ({100 * low:.2f} to {100 * high:.2f})"

    before, after = found["before"], found["after"]
    how = "out of fold" if found["fitted_on_these_pictures"] else "chosen on other images"
    return [
        f"Temperature {found['temperature']:.3f}, {how}: log loss {before['log_loss']:.4f} -> {after['log_loss']:.4f}, "
        f"Brier score {before['brier']:.4f} -> {after['brier']:.4f},",
        f"    calibration error {ece(before)} -> {ece(after)}",
    ]


def _abstain_lines(found: Mapping[str, Any], n: int) -> list[str]:
    def share(x: Mapping[str, Any]) -> str:
        if not x["answered"]:
            return "none of the images"
        low, high = (100 * end for end in x["interval"])
        given = f"{100 * x['coverage']:.{percent_digits(n)}f} % of the images"
        wrong = f"{100 * x['error']:.2f} % of them wrong"
        return f"{given}, {wrong} ({x['errors']:,}; 95 % interval {low:.2f} to {high:.2f} %)"

    threshold, limit = found["threshold"], f"{100 * found['max_error']:g} %"
    if threshold is None:
        why = f"none keeps errors at {limit} or fewer" if "out_of_fold" in found else "none was chosen"
        how = f"Every answer is given, with no threshold of certainty ({why})"
    elif threshold == 0:
        how = f"Every answer may be given with errors at {limit} or fewer"
    else:
        # As many digits as tell it from 1, cut off and not rounded.
        digits = max(3, 1 - math.floor(math.log10(max(1 - threshold, 1e-12))))
        how = f"Answers given only at {math.floor(threshold * 10**digits) / 10**digits:.{digits}f} or surer (chosen for at most {limit} errors)"
    lines = [f"{how}:", f"    {share(found)}"]
    return [*lines, f"    out of fold: {share(found['out_of_fold'])}"] if "out_of_fold" in found else lines


def _class_lines(rows: Sequence[Mapping[str, Any]], most: int = 10) -> list[str]:
    hidden = len(rows) - most
    if hidden > 0:
        rows = sorted(rows, key=lambda row: 2.0 if row["f1"] is None else row["f1"])[:most]
    width = max(len("class"), *(len(_short(row["class"])) for row in rows))

    def percent(x: float | None, n: int) -> str:
        return "-" if x is None else f"{100 * x:.{percent_digits(n)}f} %"

    lines = [
        f"{'class':<{width}}  {'images':>8}  {'right':>7}  {'precision':>9}  {'recall (95 % interval)':<25}  {'F1':>6}"
    ]
    for row in rows:
        n = row["n"]
        low, high = (f"{100 * end:.{percent_digits(n)}f}" for end in row["recall_interval"])
        recall = f"{percent(row['recall'], n)} ({low} to {high})" if n else "-"
        f1 = "-" if row["f1"] is None else f"{row['f1']:.4f}"
        precision = percent(row["precision"], row["predicted"])
        lines.append(
            f"{_short(row['class']):<{width}}  {n:>8,}  {row['right']:>7,}  {precision:>9}  {recall:<25}  {f1:>6}"
        )
    return [*lines, f"The {most} worst by F1; {hidden:,} more are in metrics.json."] if hidden > 0 else lines


def _short(name: str) -> str:
    """In one line of at most 32 characters; the middle goes, because names often differ at the end."""
    name = " ".join(name.split())
    return name if len(name) <= 32 else f"{name[:18]}…{name[-13:]}"
