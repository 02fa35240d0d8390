"""Test-time augmentation: each image is predicted as it is and n times randomly changed, and the probabilities are averaged."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcats.common.compile_cache import jit
from jaxcats.common.errors import UserError
from jaxcats.common.io import progress_bar
from jaxcats.common.stats import log_softmax
from jaxcats.core.step import normalise
from jaxcats.data import augment
from jaxcats.data.index import Split
from jaxcats.evaluate.run import Run
from jaxcats.train.drivers import image_batches
from jaxcats.train.evaluator import run_evaluation
from jaxcats.train.experiment import stable_number


def tta_preset(name: str) -> str:
    """The augmentation that TTA uses for a phase that was trained with `name`: side_on if `name` is "none"."""
    return "side_on" if name == "none" else name


def evaluate_with_tta(
    run: Run, split: Split, logits: np.ndarray, *, n: int, weight: float | None, preset: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Averages the probabilities of the plain image and of n changed versions; each image is decoded once.

    The changes depend on the run's seed, on the version and on the image's row alone.

    Args:
        run: a trained run.
        split: N images.
        logits: of the plain images, [N, C].
        n: number of changed versions of each image.
        weight: of the plain image; None: 1 / (n + 1), the mean of all versions (fastai 0.7); fastai v2 has .25 with n 4.
        preset: name of an augmentation, as from `tta_preset`.

    Returns:
        Log-probabilities float64 [N, C], and the facts for metrics.json.
    """
    changes = augment.PRESETS.get(preset)
    if changes is None:
        names = ", ".join(name for name, value in augment.PRESETS.items() if value)
        raise UserError(f"tta: augment {preset!r} can't be used; choose {names}.")
    key = jax.random.fold_in(jax.random.key(run.config.seed), stable_number("tta"))
    change = augment.make_augment(changes, key=key, size=run.preprocess.size)
    prepare = normalise(run.preprocess.mean, run.preprocess.std)

    @jit
    def mean_probabilities(params, batch_stats, images, index):
        def add_version(total, version):
            logits, _ = run.model.apply(params, batch_stats, prepare(change(images, version, index)), train=False)
            return total + jax.nn.softmax(logits), None

        zeros = jnp.zeros((len(index), run.model.num_classes), jnp.float32)
        total, _ = jax.lax.scan(add_version, zeros, jnp.arange(n))
        return total / n

    with progress_bar(total=len(split), desc="TTA") as bar:

        def step(params, batch_stats, batch):
            bar.update(int(batch["mask"].sum()))
            return mean_probabilities(params, batch_stats, batch["image"], batch["index"]), None

        decoding: dict[str, Any] = run.decoding | {"preprocess": augment.source_preprocess(run.preprocess, changes)}
        batches = image_batches(split, **decoding)
        augmented = run_evaluation(step, run.params, run.batch_stats, batches, n=len(split)).astype(np.float64)
    weight = 1 / (n + 1) if weight is None else weight
    mixed = weight * np.exp(log_softmax(logits)) + (1 - weight) * augmented
    return np.log(np.maximum(mixed, np.finfo(np.float64).tiny)), {"versions": n, "weight": weight, "augment": preset}
