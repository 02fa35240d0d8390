"""Calibration: the temperature, the calibration error, and the threshold below which a classifier abstains.

Everywhere: logits float [N, C], labels int [N], confidence float [N] (the highest probability), correct bool [N].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcats.common.stats import brier, log_softmax, wilson_interval

LOWEST, HIGHEST = 0.05, 20.0  # bounds of the temperature
FOLDS = 5


@dataclass(frozen=True)
class Calibration:
    """How a classifier's logits become predictions.

    Attributes:
        temperature: probabilities are softmax(logits / temperature).
        threshold: of the highest probability; the classifier abstains below it. None: it never abstains.
        max_error: the share of wrong predictions that the threshold was chosen for.
    """

    temperature: float = 1.0
    threshold: float | None = None
    max_error: float = 0.005

    def is_answered(self, confidence: np.ndarray) -> np.ndarray:
        """Which images get a prediction, bool [N]; `confidence` is that after the temperature."""
        return confidence >= (-1 if self.threshold is None else self.threshold)


def fit_temperature(logits: np.ndarray, labels: np.ndarray, *, prior: float = 1.0) -> float:
    """The temperature, from 0.05 to 20, that gives softmax(logits / temperature) the least log loss.

    Temperature scaling (Guo et al., arXiv:1706.04599), with a weak prior (log T normal about 0, standard deviation 1): where
    every prediction is right, the log loss alone runs to the lowest temperature, and ten images would make a classifier
    that is always certain. Among a thousand images with ten errors the prior makes no visible difference.

    Args:
        logits: float [N, C].
        labels: int [N].
        prior: the prior's weight, in images; 0 for no prior, and then the temperature may be a bound.

    Returns:
        The temperature; 1 without images.
    """
    if not len(labels):
        return 1.0
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    actual = shifted[np.arange(len(labels)), labels]

    def slope(log_t: float) -> float:
        """The derivative of the log loss and the prior with respect to log T."""
        t = np.exp(log_t)
        weights = np.exp(shifted / t)
        expected = (weights * shifted).sum(-1) / weights.sum(-1)
        return float((actual - expected).sum() / t + prior * log_t)

    low, high = np.log(LOWEST), np.log(HIGHEST)
    for _ in range(26):  # down to 1e-7 of log T; importing SciPy's minimiser takes longer than all of this
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return float(np.exp((low + high) / 2))


def fit_calibration(logits: np.ndarray, labels: np.ndarray, *, max_error: float = 0.005) -> Calibration:
    """The temperature that these images choose and, with it, the threshold."""
    temperature = fit_temperature(logits, labels)
    confidence = np.exp(log_softmax(logits / temperature).max(-1))
    threshold = choose_threshold(confidence, logits.argmax(-1) == labels, max_error=max_error)
    return Calibration(temperature, threshold, max_error)


def assign_folds(labels: np.ndarray) -> np.ndarray:
    """Each image's fold, int [N] from 0: random, every class spread as evenly as it can be, at most `FOLDS` and N folds.

    `core.folds.stratified_folds` draws other folds from the same seed; these decide numbers that are in metrics.json, and
    copies of an image need not stay together where only a temperature is fitted.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), int)
    fold[order] = np.arange(len(labels)) % min(FOLDS, len(labels))
    return fold


def cross_fit(
    logits: np.ndarray, labels: np.ndarray, *, max_error: float = 0.005
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Calibrates each image with the temperature and the threshold that the other folds choose.

    Args:
        logits: float [N, C].
        labels: int [N].
        max_error: as in `choose_threshold`.

    Returns:
        Log-probabilities [N, C]; whether each image is answered, bool [N]; the temperatures [folds].
    """
    fold = assign_folds(labels)
    correct = logits.argmax(-1) == labels
    log_probs, answered = np.empty(logits.shape), np.empty(len(labels), bool)
    temperatures = np.empty(fold.max() + 1)
    for k in range(len(temperatures)):
        held_out = fold == k
        temperatures[k] = fit_temperature(logits[~held_out], labels[~held_out])
        scaled = log_softmax(logits / temperatures[k])
        confidence = np.exp(scaled.max(-1))
        threshold = choose_threshold(confidence[~held_out], correct[~held_out], max_error=max_error)
        log_probs[held_out] = scaled[held_out]
        answered[held_out] = threshold is None or confidence[held_out] >= threshold
    return log_probs, answered, temperatures


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15) -> float:
    """The mean distance of confidence and accuracy over bins of equally many images, weighted with their images.

    Top-label, equal-mass (Nguyen and O'Connor, EMNLP 2015). Images with equal confidence stay in one bin.
    """
    images, confidences, right = _sum_by_bin(*_count_by_confidence(confidence, correct), bins)
    return float(np.abs(confidences - right).sum() / images.sum())


def ece_interval(confidence: np.ndarray, correct: np.ndarray, *, resamples: int = 1000) -> tuple[float, float]:
    """A 95 % bootstrap interval of `expected_calibration_error`; images are drawn with replacement.

    It goes from the lowest to the highest end of the percentile and the basic bootstrap interval. The percentile interval
    alone is as biased upwards as the estimate: it never reaches 0, however good the probabilities are. The basic interval
    corrects that, but is too short where errors are few.
    """
    values, group = np.unique(confidence, return_inverse=True)
    n, k, rng, errors = len(group), len(values), np.random.default_rng(0), []
    at_once = max(1, 200_000 // n)  # 10 MB at a time
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = rng.integers(0, n, (rows, n))
        cell = (group[drawn] + k * np.arange(rows)[:, None]).ravel()
        size = np.bincount(cell, minlength=rows * k).reshape(rows, k)
        right = np.bincount(cell, weights=correct[drawn].ravel(), minlength=rows * k).reshape(rows, k)
        _, confidences, right = _sum_by_bin(values, size, right)
        errors.append(np.abs(confidences - right).sum(-1) / n)
    low, high = np.percentile(np.concatenate(errors), [2.5, 97.5])
    estimate = expected_calibration_error(confidence, correct)
    return float(max(0, min(low, 2 * estimate - high))), float(max(high, 2 * estimate - low))


def calibration_metrics(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How good log-probabilities [N, C] are: {"log_loss", "brier", "ece", "ece_interval"}."""
    confidence, correct = np.exp(log_probs.max(-1)), log_probs.argmax(-1) == labels
    return {
        "log_loss": float(-log_probs[np.arange(len(labels)), labels].mean()),
        "brier": brier(log_probs, labels),
        "ece": expected_calibration_error(confidence, correct),
        "ece_interval": list(ece_interval(confidence, correct)),
    }


def reliability(confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15) -> list[dict[str, Any]]:
    """The bins of `expected_calibration_error` that hold images, the least confident first, as plain numbers.

    Returns:
        For each {"n", "confidence" (mean), "accuracy", "low" and "high" (95 % Wilson)}.
    """
    rows = []
    sums = _sum_by_bin(*_count_by_confidence(confidence, correct), bins)
    for n, total, right in zip(*(x[0] for x in sums), strict=True):
        if n:
            low, high = wilson_interval(int(right), int(n))
            row = {"n": int(n), "confidence": float(total / n), "accuracy": float(right / n), "low": low, "high": high}
            rows.append(row)
    return rows


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of the images answered [K] and the share of these that is wrong [K], the most confident images first."""
    _, answered, errors = _most_confident_first(confidence, correct)
    return answered / len(confidence), errors / answered


def choose_threshold(confidence: np.ndarray, correct: np.ndarray, *, max_error: float) -> float | None:
    """The threshold with the highest coverage at which at most the share `max_error` of the predictions is wrong.

    An image is answered at `confidence >= threshold`, so images with equal confidence go together.

    Returns:
        Half-way between the last confidence answered and the next one, so that rounding elsewhere changes no answer; 0
        where all images may be answered; None where no threshold keeps the errors low enough.
    """
    values, answered, errors = _most_confident_first(confidence, correct)
    allowed = np.flatnonzero(errors / answered <= max_error)
    if not len(allowed):
        return None
    if allowed[-1] == len(values) - 1:
        return 0.0
    last, following = values[allowed[-1]], values[allowed[-1] + 1]
    between = (last + following) / 2
    return float(between if between > following else last)


def abstain_metrics(answered: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Counts of the images answered (bool [N]): {"answered", "coverage", "errors", "error", "interval" (Wilson, of error)}."""
    n, count, errors = len(answered), int(answered.sum()), int((answered & ~correct).sum())
    return {
        "answered": count,
        "coverage": count / n if n else None,
        "errors": errors,
        "error": errors / count if count else None,
        "interval": list(wilson_interval(errors, count)),
    }


def _sum_by_bin(values: np.ndarray, size: np.ndarray, right: np.ndarray, bins: int = 15) -> list[np.ndarray]:
    """Sums of images, confidences and right answers by bin, each [R, bins].

    Bins hold equally many images. Equal confidences stay together, or the order of the images would matter: they go to
    the bin of their middle image. `values` [K] ascend; `size` and `right` [R, K] count images in R samples.
    """
    rows, total = len(size), size[0].sum()
    middle = size.cumsum(-1) - size / 2
    bin_of = np.minimum(bins * middle / total, bins - 1).astype(int)
    flat = (bin_of + bins * np.arange(rows)[:, None]).ravel()
    sums = [np.bincount(flat, weights=w.ravel(), minlength=rows * bins) for w in (size, size * values, right)]
    return [x.reshape(rows, bins) for x in sums]


def _count_by_confidence(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct confidences [K], ascending, the images [1, K] at each, and how many of these are right [1, K]."""
    values, group = np.unique(confidence, return_inverse=True)
    return values, np.bincount(group)[None], np.bincount(group, weights=correct)[None]


def _most_confident_first(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct confidences [K], descending, and the number of images and of errors at each or above."""
    values, size, right = _count_by_confidence(confidence, correct)
    return values[::-1], size[0, ::-1].cumsum(), (size - right)[0, ::-1].cumsum()
