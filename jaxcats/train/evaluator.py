"""Exact evaluation: the logits of every image of a split, each computed once, from cached features or from the pixels."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxcats import models
from jaxcats.common.compile_cache import jit
from jaxcats.common.errors import RunError
from jaxcats.core import mesh
from jaxcats.core.step import make_eval_step, normalise
from jaxcats.data.images import Preprocess
from jaxcats.data.index import Split
from jaxcats.train.drivers import Batches, array_batches, image_batches, one_batch_late
from jaxcats.train.experiment import head_on_features

ARRAY_BATCH = 1024  # rows per evaluation call on features


class Evaluator:
    """`(params, batch_stats) -> logits float32 [n, C]` of a split.

    Args:
        model: the network.
        split: n images.
        features: float32 [n, F] of them; None: the images are decoded and go through the whole network.
        preprocess: what evaluation does to an image.
        batch_size: images per call.
        workers: decoding threads; None: one per core.
    """

    def __init__(
        self,
        model: models.Model,
        split: Split,
        *,
        features: np.ndarray | None = None,
        preprocess: Preprocess,
        batch_size: int,
        workers: int | None,
    ):
        self.split = split
        self.arrays = None if features is None else {"label": split.labels, "features": features}
        self.decoding: dict[str, Any] = {"preprocess": preprocess, "batch_size": batch_size, "workers": workers}
        on_features = features is not None
        self.eval_step = _eval_program(model, preprocess, on_features, mesh.has_many_devices())

    def __call__(self, params: Any, batch_stats: Any) -> np.ndarray:
        batches = array_batches(self.arrays, ARRAY_BATCH) if self.arrays else image_batches(self.split, **self.decoding)
        return run_evaluation(self.eval_step, params, batch_stats, batches, n=len(self.split))


def run_evaluation(eval_step: Callable, params: Any, batch_stats: Any, batches: Batches, *, n: int) -> np.ndarray:
    """Logits float32 [n, C] of every image once, in the order of their index.

    Args:
        eval_step: `(params, batch_stats, batch) -> (logits [B, C], anything)`.
        params: weights.
        batch_stats: running averages of BatchNorm.
        batches: padded and masked batches that hold each of the n images once.
        n: images.
    """

    def logits_of(batch: dict[str, np.ndarray]) -> Any:
        return eval_step(params, batch_stats, mesh.place_batch(batch, len(batch["mask"])))[0]

    logits, seen = None, 0
    for rows, values in one_batch_late(batches, logits_of):
        logits = np.zeros((n, values.shape[1]), np.float32) if logits is None else logits
        logits[rows] = values
        seen += len(rows)
    if logits is None or seen != n:
        raise RunError(f"The evaluation saw {seen} of {n} images.")
    return logits


@functools.cache  # A notebook evaluates the same network after every fit: one program for all.
def _eval_program(model: models.Model, preprocess: Preprocess, on_features: bool, many_devices: bool) -> Callable:
    """The jitted evaluation step; `many_devices` is part of the key alone."""
    apply_fn = head_on_features(model) if on_features else model.apply
    eval_step = make_eval_step(apply_fn=apply_fn, preprocess=normalise(preprocess.mean, preprocess.std))
    return jit(eval_step, convolutions=not on_features, **mesh.replicated_outputs())
