"""Which images to look at: rows of a table of log-probabilities, for galleries and for likely label errors.

Everywhere: log_probs float [N, C], labels int [N]; the result is at most n row numbers, int, ties in the order of the rows.
"""

import math
from collections.abc import Sequence

import numpy as np


def rand_by_correct(log_probs: np.ndarray, labels: np.ndarray, correct: bool, *, n: int, seed: int = 0) -> np.ndarray:
    """Up to n random images that were predicted right (or wrong), none twice; the same seed gives the same images."""
    rows = np.flatnonzero(_right(log_probs, labels) == correct)
    return np.random.default_rng(seed).permutation(rows)[:n]


def most_by_correct(log_probs: np.ndarray, labels: np.ndarray, label: int, correct: bool, *, n: int) -> np.ndarray:
    """Images of one actual class: the right ones, the most confident first, or the wrong ones, the most wrong first.

    Most confident and most wrong are the highest and the lowest probability of that class.
    """
    rows = np.flatnonzero((_right(log_probs, labels) == correct) & (labels == label))
    score = log_probs[rows, label]
    return rows[np.argsort(-score if correct else score, kind="stable")[:n]]


def most_uncertain(log_probs: np.ndarray, *, n: int = 4) -> np.ndarray:
    """The images with the smallest margins between the two highest probabilities; with two classes that is the lesson's |p - 0.5|."""
    ordered = np.sort(np.exp(log_probs), axis=1)
    return np.argsort(ordered[:, -1] - ordered[:, -2], kind="stable")[:n]


def top_losses(log_probs: np.ndarray, labels: np.ndarray, *, n: int = 9) -> np.ndarray:
    """The highest losses first: the lowest log-probability of the actual class (fastai's Interpretation.top_losses)."""
    return np.argsort(log_probs[np.arange(len(labels)), labels], kind="stable")[:n]


def label_errors(log_probs: np.ndarray, labels: np.ndarray, *, most: float = 0.05) -> np.ndarray:
    """Images whose label looks wrong because another class is likelier; the lowest probability of the label comes first.

    At most the share `most` of all images, unless more are confident: such an image's likeliest class has at least
    the mean probability that this class has over the images labelled with it (Northcutt et al., confident learning, arXiv:1911.00068).

    Args:
        log_probs: from networks that haven't seen the image (out of fold).
        labels: as given.
        most: share of the images.
    """
    rows = np.flatnonzero(~_right(log_probs, labels))
    rows = rows[np.argsort(log_probs[rows, labels[rows]], kind="stable")]
    probs, classes = np.exp(log_probs), range(log_probs.shape[1])
    typical = np.array([probs[labels == c, c].mean() if (labels == c).any() else np.inf for c in classes])
    best = log_probs[rows].argmax(1)
    confident = int((probs[rows, best] >= typical[best]).sum())
    return rows[: max(math.ceil(most * len(labels)), confident)]


def knn_outlier_score(features: np.ndarray, hashes: Sequence[str], *, known: int, k: int = 10) -> np.ndarray:
    """How unlike all others an image is: the cosine distance to its k-th nearest training image, float [N].

    Features are standardised with the training images' mean and deviation; copies of the image itself don't count. After Sun et al.,
    arXiv:2204.06507.

    Args:
        features: float [N, F], the training images first.
        hashes: N hashes of the images' content.
        known: number of training images; at least two different ones.
        k: which neighbour; a nearer one where there are fewer than k.
    """
    from sklearn.neighbors import NearestNeighbors

    std = features[:known].std(0)
    scaled = (features - features[:known].mean(0)) / np.where(std > 0, std, 1)
    _, content = np.unique(hashes, return_inverse=True)
    unique = np.unique(content[:known], return_index=True)[1]
    k = min(k, len(unique) - 1)
    distance, nearest = NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(scaled[unique]).kneighbors(scaled)
    distance[content[unique][nearest] == content[:, None]] = np.inf
    return np.sort(distance, axis=1)[:, k - 1]


def _right(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return log_probs.argmax(1) == labels
