"""Counts, and how far they can be trusted."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcats.errors import UserError

if TYPE_CHECKING:
    from jaxcats.results.calibration import Calibration


def wilson_interval(successes: int, n: int, *, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95 % by default (Wilson, JASA 22, 1927); (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def percent_digits(n: int) -> int:
    """Decimals of a percentage that n pictures can resolve, at least one."""
    return max(1, math.ceil(math.log10(max(n, 1))) - 2)


def sentence(errors: int, n: int) -> str:
    """'9 errors of 1,000 (99.1 %, 95 % interval 98.3 to 99.5 %)'."""
    low, high = wilson_interval(n - errors, n)
    d = percent_digits(n)
    share = 100 * (n - errors) / n if n else float("nan")
    word = "error" if errors == 1 else "errors"
    return f"{errors:,} {word} of {n:,} ({share:.{d}f} %, 95 % interval {100 * low:.{d}f} to {100 * high:.{d}f} %)"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64: [N, C] -> [N, C]."""
    z = logits.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def summary(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Errors of n with interval, and log loss.

    Args:
        logits: [N, C].
        labels: int [N], all known.

    Returns:
        {"n", "errors", "accuracy", "interval": [low, high], "log_loss" (nats)}.
    """
    n = len(labels)
    wrong = int((logits.argmax(-1) != labels).sum())
    losses = -log_softmax(logits)[np.arange(n), labels]
    return {
        "n": n,
        "errors": wrong,
        "accuracy": (n - wrong) / n if n else None,
        "interval": list(wilson_interval(n - wrong, n)),
        "log_loss": float(losses.mean()) if n else None,
    }


def brier(log_probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of the probabilities from the truth (Brier, Mon. Weather Rev. 78, 1950): [N, C], [N].

    With two classes of the second one's probability, from 0 to 1; else summed over the classes, from 0 to 2 (as scikit-learn).
    """
    truth = np.arange(log_probs.shape[1]) == np.asarray(labels)[:, None]
    squares = ((np.exp(log_probs) - truth) ** 2).sum(-1)
    return float(squares.mean() / (2 if log_probs.shape[1] == 2 else 1))


def judge(
    logits: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    calibration: "Calibration | None" = None,
    max_error: float = 0.005,
    folds: int = 5,
    seed: int = 0,
) -> "tuple[dict[str, Any], Calibration]":
    """Everything that labelled pictures say about a classifier, in plain JSON types; what 0/0 would be is None.

    Args:
        logits: float [N, C], at least one picture.
        labels: int [N], all known; a class may have no picture.
        classes: C names.
        calibration: chosen on other pictures, to be judged here; None: chosen on these, and then each picture's numbers
            "after" are those of the temperature and the threshold that the other folds choose.
        max_error: share of wrong answers to choose the threshold for; only where no calibration is given.
        folds: how many.
        seed: of the folds and of the bootstrap.

    Returns:
        What `summary` gives and {"brier", "auc" (two classes only), "macro_f1", "balanced_accuracy", "top_k", "classes",
        "per_class", "confusion" (rows are actual classes), "most_confused", "calibration" (before and after the
        temperature), "abstain"}, and the calibration that was given or chosen.
    """
    from jaxcats.results import calibration as cal  # which imports this module

    if not len(labels):
        raise UserError("there are no pictures with labels to judge.")
    fitted = calibration is None
    log_probs, correct = log_softmax(logits), logits.argmax(-1) == labels
    if calibration is None:
        calibration = cal.fit_calibration(logits, labels, max_error=max_error)
        after, temperatures = cal.out_of_fold(logits, labels, folds=folds, seed=seed)
        options = {"max_error": max_error, "seed": seed}
        given = cal.given_out_of_fold(logits, labels, temperatures, **options)
        abstain = {"out_of_fold": cal.count_answers(given, correct)}
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
        "before": cal.trust(log_probs, labels, seed=seed),
        "after": cal.trust(after, labels, seed=seed),
    }
    answers = cal.answered(confidence, correct, calibration.threshold)
    found["abstain"] = {"max_error": calibration.max_error} | answers | abstain
    return found, calibration


def area_under_roc(score: np.ndarray, labels: np.ndarray) -> float | None:
    """Of two classes: how often a picture of the second one scores higher than one of the first; None if one is absent."""
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
    """Pictures whose class is not among the k likeliest, for k of 2, 3 and 5 below the number of classes."""
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
    how = "out of fold" if found["fitted_on_these_pictures"] else "chosen on other pictures"
    return [
        f"Temperature {found['temperature']:.3f}, {how}: log loss {before['log_loss']:.4f} -> {after['log_loss']:.4f}, "
        f"Brier score {before['brier']:.4f} -> {after['brier']:.4f},",
        f"    calibration error {ece(before)} -> {ece(after)}",
    ]


def _abstain_lines(found: Mapping[str, Any], n: int) -> list[str]:
    def share(x: Mapping[str, Any]) -> str:
        if not x["answered"]:
            return "none of the pictures"
        low, high = (100 * end for end in x["interval"])
        given = f"{100 * x['coverage']:.{percent_digits(n)}f} % of the pictures"
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
        f"{'class':<{width}}  {'pictures':>8}  {'right':>7}  {'precision':>9}  {'recall (95 % interval)':<25}  {'F1':>6}"
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


def table_row(row: Mapping[str, Any]) -> str:
    """One line of the epoch table, under `table_head`."""
    n, errors = row["n"], row["errors"]
    low, high = row["interval"]
    d = percent_digits(n)
    accuracy = f"{100 * (n - errors) / n:.{d}f} %  ({100 * low:.{d}f} to {100 * high:.{d}f})"
    return (
        f"{row['phase']:>10} {row['epoch']:>5}   {row['train_loss']:>10.5f}  {row['valid_loss']:>10.5f}   "
        f"{errors:>6,} of {n:<7,} {accuracy:<31} {row['seconds']:>7.1f} s  {row['images_per_second']:>9,.0f}"
        + "".join(f"   {part}" for part in own_words(row))
    )


def own_words(row: Mapping[str, Any]) -> list[str]:
    """What a function of one's own measured after an epoch: ['f2 0.9912', ...]."""
    return [f"{name} {'-' if x is None else f'{x:.5g}'}" for name, x in row.get("metrics", {}).items()]


def table_head() -> str:
    """Names of the columns of the epoch table."""
    return (
        f"{'phase':>10} {'epoch':>5}   {'train loss':>10}  {'valid loss':>10}   {'errors':>6}    {'':7} "
        f"{'accuracy (95 % interval)':<31} {'time':>7}    {'images/s':>9}"
    )
