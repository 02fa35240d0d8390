"""Numbers that several folders compute: errors with their interval, log loss, Brier score, smoothed losses."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


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
    """Decimals of a percentage that n images can resolve, at least one."""
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
    """Errors, accuracy with its interval, and log loss.

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

    With two classes it uses the second class alone (0 to 1); else it sums over the classes (0 to 2), as scikit-learn.
    """
    truth = np.arange(log_probs.shape[1]) == np.asarray(labels)[:, None]
    squares = ((np.exp(log_probs) - truth) ** 2).sum(-1)
    return float(squares.mean() / (2 if log_probs.shape[1] == 2 else 1))


def smooth(losses: Sequence[float] | np.ndarray, beta: float = 0.98) -> np.ndarray:
    """The exponential average a_i = beta a_{i-1} + (1 - beta) loss_i, divided by 1 - beta^i: float64 [m] -> [m]."""
    average, out = 0.0, np.empty(len(losses))
    for i, loss in enumerate(losses):
        average = beta * average + (1 - beta) * float(loss)
        out[i] = average / (1 - beta ** (i + 1))
    return out
