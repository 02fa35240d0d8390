"""Test-time augmentation: each image judged as it is and n times changed at random, the probabilities averaged."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcats import models
from jaxcats.common.compile_cache import jit
from jaxcats.common.errors import UserError
from jaxcats.common.io import progress_bar
from jaxcats.common.stats import log_softmax
from jaxcats.core.step import normalise
from jaxcats.data import augment
from jaxcats.data.images import Preprocess
from jaxcats.data.index import Split
from jaxcats.train.drivers import image_batches
from jaxcats.train.evaluator import run_evaluation
from jaxcats.train.experiment import stable_number


def preset(name: str) -> str:
    """The augmentation that TTA uses for a phase trained with `name`: side_on where that was none."""
    return "side_on" if name == "none" else name


def augmented_probabilities(
    model: models.Model,
    split: Split,
    params: Any,
    batch_stats: Any,
    *,
    preprocess: Preprocess,
    how: str,
    n: int,
    seed: int,
    batch_size: int,
    workers: int | None,
) -> np.ndarray:
    """Mean over n changed versions of the probabilities, float32 [N, C]; each image is decoded once.

    Args:
        model: the network.
        split: N images.
        params: its weights.
        batch_stats: its averages.
        preprocess: what evaluation does.
        how: name of a preset of data.augment, not none.
        n: versions of each image.
        seed: of the changes, which depend on it, on the version and on the image's row alone.
        batch_size: images per call.
        workers: decoding threads.
    """
    chosen = augment.PRESETS.get(how)
    if chosen is None:
        raise UserError(
            f"tta: augment {how!r} can't be used; choose {', '.join(k for k, v in augment.PRESETS.items() if v)}."
        )
    key = jax.random.fold_in(jax.random.key(seed), stable_number("tta"))
    change = augment.make_augment(chosen, key=key, size=preprocess.size)
    prepare = normalise(preprocess.mean, preprocess.std)

    @jit
    def mean_of(params, stats, images, index):
        def once(total, version):
            logits, _ = model.apply(params, stats, prepare(change(images, version, index)), train=False)
            return total + jax.nn.softmax(logits), None

        total, _ = jax.lax.scan(once, jnp.zeros((len(index), model.num_classes), jnp.float32), jnp.arange(n))
        return total / n

    source = augment.source_preprocess(preprocess, chosen)
    with progress_bar(total=len(split), desc="TTA") as bar:

        def step(params, stats, batch):
            bar.update(int(batch["mask"].sum()))
            return mean_of(params, stats, batch["image"], batch["index"]), None

        batches = image_batches(split, preprocess=source, batch_size=batch_size, workers=workers)
        return run_evaluation(step, params, batch_stats, batches, n=len(split))


def combine(logits: np.ndarray, augmented: np.ndarray, *, n: int, weight: float | None = None) -> np.ndarray:
    """Log-probabilities float64 [N, C] of `weight` times the plain answer and the rest of the changed ones.

    Args:
        logits: plain, [N, C].
        augmented: mean probabilities of the n changed versions, [N, C].
        n: how many they were.
        weight: of the plain answer; None: 1 / (n + 1), the plain mean of all (fastai 0.7); fastai v2 has .25 with n 4.
    """
    share = 1 / (n + 1) if weight is None else weight
    mixed = share * np.exp(log_softmax(logits)) + (1 - share) * augmented.astype(np.float64)
    return np.log(np.maximum(mixed, np.finfo(np.float64).tiny))
