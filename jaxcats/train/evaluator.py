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


def evaluate_split(
    model: models.Model, split: Split, params: Any, batch_stats: Any, *, features: np.ndarray | None, **decoding: Any
) -> np.ndarray:
    """Logits float32 [n, C] of the n images of a split.

    Args:
        model: the network.
        split: n images.
        params: weights.
        batch_stats: running averages of BatchNorm.
        features: float32 [n, F] of the images; None: the images are decoded and go through the whole network.
        **decoding: preprocess, batch_size and workers, as of `drivers.image_batches`.
    """
    eval_step = _eval_program(model, decoding["preprocess"], features is not None, mesh.has_many_devices())
    if features is None:
        batches = image_batches(split, **decoding)
    else:
        batches = array_batches({"label": split.labels, "features": features}, ARRAY_BATCH)
    return run_evaluation(eval_step, params, batch_stats, batches, n=len(split))


def run_evaluation(eval_step: Callable, params: Any, batch_stats: Any, batches: Batches, *, n: int) -> np.ndarray:
    """Logits float32 [n, C] of every image once, in the order of their index.

    Args:
        eval_step: `(params, batch_stats, batch) -> (logits [B, C], anything)`.
        params: weights.
        batch_stats: running averages of BatchNorm.
        batches: padded and masked batches that hold each of the n images once.
        n: images.

    Raises:
        RunError: the batches did not hold each image once.
    """

    def logits_of(batch: dict[str, np.ndarray]) -> Any:
        return eval_step(params, batch_stats, mesh.place_batch(batch, len(batch["mask"])))[0]

    parts, logits = zip(*one_batch_late(batches, logits_of), strict=True)
    rows = np.concatenate(parts)
    order = np.argsort(rows)
    if not np.array_equal(rows[order], np.arange(n)):
        raise RunError(f"The evaluation saw {len(np.unique(rows))} of {n} images.")
    return np.concatenate(logits).astype(np.float32)[order]


@functools.cache  # A notebook evaluates the same network after every fit: one program for all.
def _eval_program(model: models.Model, preprocess: Preprocess, on_features: bool, many_devices: bool) -> Callable:
    """The jitted evaluation step; `many_devices` is used only in the cache's key."""
    apply_fn = head_on_features(model) if on_features else model.apply
    eval_step = make_eval_step(apply_fn=apply_fn, preprocess=normalise(preprocess.mean, preprocess.std))
    return jit(eval_step, convolutions=not on_features, **mesh.replicated_outputs())
