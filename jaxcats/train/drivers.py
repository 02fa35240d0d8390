"""The drivers: how images, or their features, reach the train step; and batches for evaluation and features.

`make_driver` jits a train step and returns a function that runs it over an epoch: `scan` keeps all rows on the device
and runs many steps in one program, `stream` decodes batches while the device works. `image_batches` and `array_batches`
give padded evaluation batches, which `evaluator` and `features` use.
"""

import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np

from jaxcats.common.compile_cache import jit
from jaxcats.common.config import Phase
from jaxcats.common.errors import UserError
from jaxcats.core import mesh, scan
from jaxcats.data import augment
from jaxcats.data.images import Preprocess
from jaxcats.data.index import Split
from jaxcats.train.experiment import Experiment, PhasePlan

Batches = Generator[dict[str, np.ndarray], None, None]


def make_driver(experiment: Experiment, plan: PhasePlan, train_step: Callable, features: np.ndarray | None) -> Callable:
    """`(state, order, epoch) -> iterator of (state, metrics [k])`: runs a train step over the rows of an epoch.

    Args:
        experiment: what all phases share.
        plan: the phase, which decides between scan and stream.
        train_step: from `experiment.make_phase`; jitted here, and its state donated.
        features: float32 [n, F] of the training images in a phase with precompute, else None.
    """
    options: dict[str, Any] = {"convolutions": features is None, "donate_argnums": 0, **mesh.replicated_outputs()}
    if scans(plan.phase):
        arrays = mesh.replicate(resident_arrays(experiment, plan, features))
        scan_steps, chunk = jit(scan.make_scan(train_step), **options), experiment.config.chunk_steps
        return lambda state, order, epoch: scan.scan_epoch(
            scan_steps, state, arrays, order=order, chunk=chunk, place=mesh.place_order
        )
    batch_size, devices = min(plan.phase.batch_size, len(experiment.index.splits["train"])), jax.device_count()
    if mesh.has_many_devices() and batch_size % devices:
        raise UserError(f"phases.{plan.name}.batch_size: {batch_size} does not divide among {devices} devices.")
    jitted = jit(train_step, **options)
    arrays = None if features is None else resident_arrays(experiment, plan, features)

    def batches(order: np.ndarray) -> Iterator[dict[str, Any]]:
        rows = ({k: v[r] for k, v in arrays.items()} for r in order) if arrays else streamed(experiment, plan, order)
        return (mesh.place_batch(batch, order.shape[1]) for batch in rows)

    return lambda state, order, epoch: scan.stream_epoch(jitted, state, batches(order))


def scans(phase: Phase) -> bool:
    """Whether the driver of a phase scans over arrays on the device."""
    return phase.driver == "scan" or (phase.driver == "auto" and phase.precompute)


def resident_arrays(experiment: Experiment, plan: PhasePlan, features: np.ndarray | None) -> dict[str, np.ndarray]:
    """Arrays with a row per training image, for the scan: labels and masks with the features, or with the images."""
    split = experiment.index.splits["train"]
    n = len(split)
    arrays = {"label": split.labels, "index": np.arange(n, dtype=np.int32), "mask": np.ones(n, bool)}
    if features is not None:
        return arrays | {"features": features}
    preprocess = source_preprocess(experiment, plan)
    images = np.zeros((n, preprocess.size, preprocess.size, 3), np.uint8)
    options: dict[str, Any] = decoding(experiment) | {"preprocess": preprocess}
    for batch in image_batches(split, **options):
        pixels = np.asarray(mesh.gather_rows(batch["image"], len(batch["mask"])))
        images[batch["index"][batch["mask"]]] = pixels[batch["mask"]]
    return arrays | {"image": images}


def streamed(experiment: Experiment, plan: PhasePlan, order: np.ndarray) -> Batches:
    """Training batches, decoded while the device works: one per row of `order`, int32 [steps, B]."""
    split, preprocess = experiment.index.splits["train"], source_preprocess(experiment, plan)
    return _local_batches(split, order=order, preprocess=preprocess, workers=experiment.config.data.workers)


def source_preprocess(experiment: Experiment, plan: PhasePlan) -> Preprocess:
    """How the training images of a phase are decoded, before its augmentation on the device."""
    return augment.source_preprocess(experiment.preprocess, augment.PRESETS[plan.phase.augment])


def decoding(experiment: Experiment) -> dict[str, Any]:
    """The arguments of `image_batches` that an Experiment decides."""
    config = experiment.config
    return {"preprocess": experiment.preprocess, "batch_size": config.feature_batch, "workers": config.data.workers}


def image_batches(
    split: Split, *, preprocess: Preprocess, batch_size: int, workers: int | None, rows: np.ndarray | None = None
) -> Batches:
    """Evaluation batches of a split, or of some of its rows; the last one is padded and masked.

    With several devices the batch size is rounded up to a multiple of them, and each process decodes only its own part.
    """
    from jaxcats.data.pipeline import evaluation_batches

    if not mesh.has_many_devices():
        return evaluation_batches(split, preprocess=preprocess, batch_size=batch_size, indices=rows, workers=workers)
    rows = np.arange(len(split)) if rows is None else rows
    size = mesh.round_up_to_devices(batch_size)
    order = np.full(-(-len(rows) // size) * size, -1, np.int32)
    order[: len(rows)] = rows
    return _local_batches(split, order=order.reshape(-1, size), preprocess=preprocess, workers=workers)


def _local_batches(split: Split, *, order: np.ndarray, preprocess: Preprocess, workers: int | None) -> Batches:
    """Batches with the labels of all rows and the images of this process; -1 in `order` is padding."""
    from jaxcats.data.pipeline import training_batches

    local = order[:, mesh.local_slice(order.shape[1])]
    decoded = training_batches(split, preprocess=preprocess, order=local, workers=workers)
    for rows, batch in zip(order, decoded, strict=True):
        mask = rows >= 0
        label = np.where(mask, split.labels[rows], 0).astype(np.int32)
        yield {"image": batch["image"], "label": label, "mask": mask, "index": rows.copy()}


def array_batches(arrays: dict[str, np.ndarray], batch_size: int) -> Batches:
    """Padded and masked evaluation batches of arrays that have a row per image."""
    n = len(arrays["label"])
    size = mesh.round_up_to_devices(min(batch_size, n))
    for start in range(0, n, size):
        rows = np.arange(start, start + size)
        mask = rows < n
        index = np.where(mask, rows, 0)
        yield {k: v[index] for k, v in arrays.items()} | {"mask": mask, "index": index.astype(np.int32)}


def one_batch_late(batches: Batches, run: Callable[..., Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows of the split, values) of `run(batch)` without the padding, read while the device computes the next batch."""
    started = ((batch, run(batch)) for batch in batches)
    for (batch, values), _ in itertools.pairwise(itertools.chain(started, [({}, None)])):
        yield batch["index"][batch["mask"]], np.asarray(values)[batch["mask"]]
