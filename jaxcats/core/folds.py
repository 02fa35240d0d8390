"""Folds for cross-validation: which rows are held out together."""

from collections.abc import Sequence

import numpy as np

from jaxcats.core.scan import epoch_order


def stratified_folds(labels: np.ndarray, hashes: Sequence[str], *, folds: int, seed: int) -> np.ndarray:
    """The fold of each row, int64 [n] from 0 to folds - 1, with nearly the same number of each class in every fold.

    Rows with the same hash are in the same fold, so that no model is trained on a copy of a row that it is tested on. It is a
    pure function of its arguments and does not depend on the order of the rows.
    """
    _, first, content = np.unique(np.asarray(hashes), return_index=True, return_inverse=True)
    shuffled = np.random.default_rng(seed).random(len(first))
    fold = np.empty(len(first), np.int64)
    fold[np.lexsort((shuffled, np.asarray(labels)[first]))] = np.arange(len(first)) % folds
    return fold[content]


def fold_orders(fold: np.ndarray, *, batch_size: int, epochs: int, seed: int) -> np.ndarray:
    """The rows of each step when each fold is held out in turn: int32 [folds, epochs, steps, B], without rows of that fold.

    Every fold trains for the same number of steps, that of the fold with the fewest rows, so one program can run all.
    """
    training = [np.flatnonzero(fold != k).astype(np.int32) for k in range(fold.max() + 1)]
    least = min(map(len, training))
    size = min(batch_size, least)
    return np.stack(
        [
            [rows[epoch_order(len(rows), batch_size=size, seed=seed, epoch=e)][: least // size] for e in range(epochs)]
            for rows in training
        ]
    )
