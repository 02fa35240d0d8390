"""Counts, and how far they can be trusted."""

import math
from collections.abc import Mapping
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


def table_row(row: Mapping[str, Any]) -> str:
    """One line of the epoch table, under `table_head`."""
    n, errors = row["n"], row["errors"]
    low, high = row["interval"]
    d = percent_digits(n)
    accuracy = f"{100 * (n - errors) / n:.{d}f} %  ({100 * low:.{d}f} to {100 * high:.{d}f})"
    return (
        f"{row['phase']:>10} {row['epoch']:>5}   {row['train_loss']:>10.5f}  {row['valid_loss']:>10.5f}   "
        f"{errors:>6,} of {n:<7,} {accuracy:<31} {row['seconds']:>7.1f} s  {row['images_per_second']:>9,.0f}"
    )


def table_head() -> str:
    """Names of the columns of the epoch table."""
    return (
        f"{'phase':>10} {'epoch':>5}   {'train loss':>10}  {'valid loss':>10}   {'errors':>6}    {'':7} "
        f"{'accuracy (95 % interval)':<31} {'time':>7}    {'images/s':>9}"
    )
