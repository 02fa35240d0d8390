"""Whether probabilities can be taken at their word: temperature, calibration error, and when to give no answer.

Everywhere: logits float [N, C], labels int [N], confidence float [N] (the highest probability), correct bool [N].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcats.common.stats import brier, log_softmax, wilson_interval

LOWEST, HIGHEST = 0.05, 20.0  # temperatures looked at


@dataclass(frozen=True)
class Calibration:
    """How a classifier's logits become answers.

    Attributes:
        temperature: probabilities are softmax(logits / temperature).
        threshold: of the highest probability; an image below it gets no answer. None: every image gets one.
        max_error: share of wrong answers that the threshold was chosen for.
    """

    temperature: float = 1.0
    threshold: float | None = None
    max_error: float = 0.005


def fit_temperature(logits: np.ndarray, labels: np.ndarray, *, prior: float = 1.0) -> float:
    """The temperature, from 0.05 to 20, that gives softmax(logits / temperature) the least log loss.

    Temperature scaling (Guo et al., arXiv:1706.04599), with a weak prior (log T normal about 0, standard deviation 1): where
    every answer is right, the log loss alone runs to the lowest temperature, and ten images would make a classifier
    that is always certain. Among a thousand images with ten errors the prior does not show.

    Args:
        logits: float [N, C].
        labels: int [N].
        prior: its weight in images' log loss; 0 for none, and then the answer may be a bound.

    Returns:
        The temperature; 1 without images.
    """
    if not len(labels):
        return 1.0
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    own = shifted[np.arange(len(labels)), labels]

    def slope(log_t: float) -> float:
        """Derivative of the log loss and the prior by log T."""
        t = np.exp(log_t)
        weights = np.exp(shifted / t)
        expected = (weights * shifted).sum(-1) / weights.sum(-1)
        return float((own - expected).sum() / t + prior * log_t)

    low, high = np.log(LOWEST), np.log(HIGHEST)
    for _ in range(26):  # down to 1e-7 of log T; importing SciPy's minimiser takes longer than all of this
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return float(np.exp((low + high) / 2))


def fit_calibration(logits: np.ndarray, labels: np.ndarray, *, max_error: float = 0.005) -> Calibration:
    """The temperature and, with it, the threshold that these images choose."""
    temperature = fit_temperature(logits, labels)
    confidence = np.exp(log_softmax(logits / temperature).max(-1))
    threshold = choose_threshold(confidence, logits.argmax(-1) == labels, max_error=max_error)
    return Calibration(temperature, threshold, max_error)


def assign_folds(labels: np.ndarray, *, folds: int = 5, seed: int = 0) -> np.ndarray:
    """Each image's fold, int [N] from 0: random, every class spread as evenly as it can be, at most N folds."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    found = np.empty(len(labels), int)
    found[order] = np.arange(len(labels)) % max(1, min(folds, len(labels)))
    return found


def out_of_fold(
    logits: np.ndarray, labels: np.ndarray, *, folds: int = 5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [N, C], each row scaled with the temperature of the other folds, and temperatures [folds]."""
    fold = assign_folds(labels, folds=folds, seed=seed)
    temperatures = np.array([fit_temperature(logits[fold != k], labels[fold != k]) for k in range(fold.max() + 1)])
    return log_softmax(logits / temperatures[fold][:, None]), temperatures


def given_out_of_fold(
    logits: np.ndarray, labels: np.ndarray, temperatures: np.ndarray, *, max_error: float, seed: int = 0
) -> np.ndarray:
    """Which images get an answer, bool [N], where each fold's threshold is chosen on the other folds.

    Args:
        logits: float [N, C].
        labels: int [N].
        temperatures: [folds] from `out_of_fold`, of the same seed.
        max_error: as in `choose_threshold`.
        seed: of the folds.
    """
    fold = assign_folds(labels, folds=len(temperatures), seed=seed)
    correct = logits.argmax(-1) == labels
    given = np.empty(len(labels), bool)
    for k, temperature in enumerate(temperatures):
        confidence = np.exp(log_softmax(logits / temperature).max(-1))
        rest = fold != k
        threshold = choose_threshold(confidence[rest], correct[rest], max_error=max_error)
        given[~rest] = threshold is None or confidence[~rest] >= threshold
    return given


def _sums(values: np.ndarray, size: np.ndarray, right: np.ndarray, bins: int) -> tuple[np.ndarray, ...]:
    """Images, confidence and right answers summed by bin, each [R, bins], and the bin of each value [R, K].

    Bins hold equally many images, but equal confidences never part, else the order of the images would matter: all
    of them go where the middle one belongs. `values` [K] ascend; `size` and `right` [R, K] count images in R samples.
    """
    rows, total = len(size), size[0].sum()
    middle = size.cumsum(-1) - size / 2
    index = np.minimum(bins * middle / total, bins - 1).astype(int)
    flat = (index + bins * np.arange(rows)[:, None]).ravel()
    weights = (size, size * values, right)
    return *(np.bincount(flat, weights=w.ravel(), minlength=rows * bins).reshape(rows, bins) for w in weights), index


def _counted(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct confidences [K], ascending, the images [1, K] at each and how many of these are right [1, K]."""
    values, group = np.unique(np.asarray(confidence, np.float64), return_inverse=True)
    return values, np.bincount(group)[None], np.bincount(group, weights=np.asarray(correct, float))[None]


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins of equally many images, weighted with their images.

    Top-label, equal-mass (Nguyen and O'Connor, EMNLP 2015). Equal confidences stay in one bin.
    """
    n, sure, right, _ = _sums(*_counted(confidence, correct), bins)
    return float(np.abs(sure - right).sum() / n.sum())


def ece_interval(
    confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """A 95 % bootstrap interval of `expected_calibration_error`, images drawn with replacement.

    From the lowest to the highest end of the percentile and the basic bootstrap interval. The percentile interval alone
    is as biased upwards as the estimate: it never reaches 0, however good the probabilities; the basic one corrects
    that, but is too short where errors are few.
    """
    values, group = np.unique(np.asarray(confidence, np.float64), return_inverse=True)
    n, k, rng, found = len(group), len(values), np.random.default_rng(seed), []
    correct = np.asarray(correct, float)
    at_once = max(1, 200_000 // n)  # 10 MB at a time
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = rng.integers(0, n, (rows, n))
        cell = (group[drawn] + k * np.arange(rows)[:, None]).ravel()
        size = np.bincount(cell, minlength=rows * k).reshape(rows, k)
        right = np.bincount(cell, weights=correct[drawn].ravel(), minlength=rows * k).reshape(rows, k)
        _, sure, right, _ = _sums(values, size, right, bins)
        found.append(np.abs(sure - right).sum(-1) / n)
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    estimate = expected_calibration_error(confidence, correct, bins=bins)
    return float(max(0, min(low, 2 * estimate - high))), float(max(high, 2 * estimate - low))


def calibration_metrics(log_probs: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """How good log-probabilities [N, C] are: {"log_loss", "brier", "ece", "ece_interval"}."""
    sure = np.exp(log_probs.max(-1)), log_probs.argmax(-1) == labels
    return {
        "log_loss": float(-log_probs[np.arange(len(labels)), labels].mean()),
        "brier": brier(log_probs, labels),
        "ece": expected_calibration_error(*sure),
        "ece_interval": list(ece_interval(*sure, seed=seed)),
    }


def reliability(confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15) -> list[dict[str, Any]]:
    """The bins of `expected_calibration_error` that hold images, least sure first, as plain numbers.

    Returns:
        For each {"n", "confidence" (mean), "accuracy", "low" and "high" (95 % Wilson), "from" and "to" (confidences)}.
    """
    values, size, right = _counted(confidence, correct)
    n, sure, right, index = (x[0] for x in _sums(values, size, right, bins))
    found = []
    for b in np.flatnonzero(n):
        low, high = wilson_interval(int(right[b]), int(n[b]))
        inside = values[index == b]
        row = {"n": int(n[b]), "confidence": float(sure[b] / n[b]), "accuracy": float(right[b] / n[b])}
        found.append(row | {"low": low, "high": high, "from": float(inside[0]), "to": float(inside[-1])})
    return found


def _surest_first(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct confidences [K], descending, and the answers and the errors at each or above."""
    values, size, right = _counted(confidence, correct)
    return values[::-1], size[0, ::-1].cumsum(), (size - right)[0, ::-1].cumsum()


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the images answered [K] and of these answers that are wrong [K], the surest images first."""
    _, given, errors = _surest_first(confidence, correct)
    return given / len(confidence), errors / given


def choose_threshold(confidence: np.ndarray, correct: np.ndarray, *, max_error: float) -> float | None:
    """The threshold that gives the most answers of which at most the share `max_error` is wrong on these images.

    Answers are given at `confidence >= threshold`, so equal confidences go together.

    Returns:
        Half-way between the last confidence answered and the next one, so that rounding elsewhere changes no answer; 0
        where all may be answered; None where no threshold does it.
    """
    values, given, errors = _surest_first(confidence, correct)
    fine = np.flatnonzero(errors / given <= max_error)
    if not len(fine):
        return None
    if fine[-1] == len(values) - 1:
        return 0.0
    last, following = values[fine[-1]], values[fine[-1] + 1]
    between = (last + following) / 2
    return float(between if between > following else last)


def count_answers(given: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """What is said where `given` (bool [N]): {"answered", "coverage", "errors", "error", "interval" (Wilson, of error)}."""
    n, answers = len(given), int(given.sum())
    errors = int((given & ~correct).sum())
    return {
        "answered": answers,
        "coverage": answers / n if n else None,
        "errors": errors,
        "error": errors / answers if answers else None,
        "interval": list(wilson_interval(errors, answers)),
    }


def answered(confidence: np.ndarray, correct: np.ndarray, threshold: float | None) -> dict[str, Any]:
    """`count_answers` and {"threshold"}, for answers at `confidence >= threshold`; all are given where it is None."""
    given = np.full(len(confidence), True) if threshold is None else confidence >= threshold
    return {"threshold": threshold} | count_answers(given, correct)
