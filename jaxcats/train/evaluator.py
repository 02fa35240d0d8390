"""What feeds a phase: features or images, as batches or resident on the device; the drivers; exact evaluation."""

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
from jaxcats.models import registry
from jaxcats.train.drivers import Batches, _unmask, array_batches, image_batches
from jaxcats.train.experiment import head_on_features

ARRAY_BATCH = 1024  # rows per evaluation call on features


def run_evaluation(eval_step: Callable, params: Any, batch_stats: Any, batches: Batches, *, n: int) -> np.ndarray:
    """Logits float32 [n, C] of every image once, in the order of their index."""
    logits, pending, seen = None, None, 0

    def take(batch, out):
        nonlocal logits, seen
        rows, values = _unmask(batch, out)
        logits = np.zeros((n, values.shape[1]), np.float32) if logits is None else logits
        logits[rows] = values
        seen += len(rows)

    for batch in batches:
        out, _ = eval_step(params, batch_stats, mesh.place_batch(batch, len(batch["mask"])))
        if pending:
            take(*pending)
        pending = batch, out
    if pending:
        take(*pending)
    if logits is None or seen != n:
        raise RunError(f"The evaluation saw {seen} of {n} images.")
    return logits


@functools.cache  # a notebook judges the same network after every fit: one program for all
def _eval_program(
    model: models.Model, backbone: models.Backbone, preprocess: Preprocess, on_features: bool, several: bool
) -> Callable:
    """The jitted evaluation step; `backbone` is what the model's name stands for now, `several` whether devices share it."""
    apply_fn = head_on_features(model) if on_features else model.apply
    step = make_eval_step(apply_fn=apply_fn, preprocess=normalise(preprocess.mean, preprocess.std))
    return jit(step, convolutions=not on_features, **mesh.replicated_outputs())


class Evaluator:
    """`(params, batch_stats) -> logits [n, C]` of a split, from features where there are some, else from the images."""

    def __init__(
        self,
        model: models.Model,
        split: Split,
        *,
        feats: np.ndarray | None = None,
        preprocess: Preprocess,
        batch_size: int,
        workers: int | None,
    ):
        self.split, self.arrays = split, None if feats is None else {"label": split.labels, "features": feats}
        self.decoding = {"preprocess": preprocess, "batch_size": batch_size, "workers": workers}
        self.step = _eval_program(
            model, registry.get(model.name), preprocess, feats is not None, mesh.has_many_devices()
        )

    def __call__(self, params: Any, batch_stats: Any) -> np.ndarray:
        batches = array_batches(self.arrays, ARRAY_BATCH) if self.arrays else image_batches(self.split, **self.decoding)
        return run_evaluation(self.step, params, batch_stats, batches, n=len(self.split))
