"""Which pictures to look at: rows of a table of log-probabilities, for galleries.

Everywhere: log_probs float [N, C], labels int [N], the answer int rows into them, at most n, ties by row.
"""

import numpy as np


def rand_by_correct(
    log_probs: np.ndarray, labels: np.ndarray, correct: bool, *, n: int = 4, seed: int = 0
) -> np.ndarray:
    """Up to n random pictures that were judged right (or wrong), none twice; the same seed gives the same."""
    rows = np.flatnonzero(_right(log_probs, labels) == correct)
    return np.random.default_rng(seed).permutation(rows)[:n]


def most_by_correct(
    log_probs: np.ndarray, labels: np.ndarray, class_index: int, correct: bool, *, n: int = 4
) -> np.ndarray:
    """Pictures of one true class: those judged right, the surest first, or those judged wrong, the most wrong first.

    Surest and most wrong are the highest and the lowest probability of that class.
    """
    labels = np.asarray(labels)
    rows = np.flatnonzero((_right(log_probs, labels) == correct) & (labels == class_index))
    sure = np.asarray(log_probs)[rows, class_index]
    return rows[np.argsort(-sure if correct else sure, kind="stable")[:n]]


def most_uncertain(log_probs: np.ndarray, *, n: int = 4) -> np.ndarray:
    """The smallest margins between the two highest probabilities; with two classes that is the lesson's |p - 0.5|."""
    highest = np.sort(np.exp(np.asarray(log_probs, np.float64)), axis=1)
    return np.argsort(highest[:, -1] - highest[:, -2], kind="stable")[:n]


def top_losses(log_probs: np.ndarray, labels: np.ndarray, *, n: int = 9) -> np.ndarray:
    """The highest losses first: the lowest log-probability of the true class (fastai's Interpretation.top_losses)."""
    return np.argsort(np.asarray(log_probs)[np.arange(len(labels)), labels], kind="stable")[:n]


def _right(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asarray(log_probs).argmax(1) == np.asarray(labels)
