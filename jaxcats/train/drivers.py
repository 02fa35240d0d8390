"""What feeds a phase: features or images, as batches or resident on the device; the drivers; exact evaluation."""

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
from jaxcats.train.experiment import Experiment, PhasePlan, augmentation

Batches = Iterator[dict[str, np.ndarray]]


def image_batches(
    split: Split, *, preprocess: Preprocess, batch_size: int, workers: int | None, rows: np.ndarray | None = None
) -> Batches:
    """Evaluation batches of images; the first use of TensorFlow in the process."""
    from jaxcats.data.pipeline import evaluation_batches

    if mesh.has_many_devices():
        return shared_batches(split, preprocess=preprocess, batch_size=batch_size, workers=workers, rows=rows)
    return evaluation_batches(split, preprocess=preprocess, batch_size=batch_size, indices=rows, workers=workers)


def shared_batches(
    split: Split, *, preprocess: Preprocess, batch_size: int, workers: int | None, rows: np.ndarray | None = None
) -> Batches:
    """The same batches, their size a multiple of the number of devices, with the images of this process's part alone."""
    rows = np.arange(len(split)) if rows is None else rows
    size = mesh.round_up_to_devices(batch_size)
    order = np.full(-(-len(rows) // size) * size, -1, np.int32)
    order[: len(rows)] = rows
    return _with_own_images(split, order.reshape(-1, size), preprocess=preprocess, workers=workers)


def _with_own_images(
    split: Split, order: np.ndarray, *, preprocess: Preprocess, workers: int | None
) -> Generator[dict[str, np.ndarray], None, None]:
    from jaxcats.data.pipeline import training_batches

    own = order[:, mesh.local_slice(order.shape[1])]
    read = training_batches(split, preprocess=preprocess, order=own, workers=workers)
    for all_rows, batch in zip(order, read, strict=True):
        mask = all_rows >= 0
        label = np.where(mask, split.labels[all_rows], 0).astype(np.int32)
        yield {"image": batch["image"], "label": label, "mask": mask, "index": all_rows.copy()}


def decoding(setup: Experiment) -> dict[str, Any]:
    """The arguments of `image_batches` that a Setup decides."""
    config = setup.config
    return {"preprocess": setup.preprocess, "batch_size": config.feature_batch, "workers": config.data.workers}


def _unmask(batch: dict[str, np.ndarray], out: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    return batch["index"][batch["mask"]], np.asarray(out)[batch["mask"]]


def array_batches(arrays: dict[str, np.ndarray], batch_size: int) -> Batches:
    """Padded and masked evaluation batches of arrays that have a row per image."""
    n = len(arrays["label"])
    size = mesh.round_up_to_devices(min(batch_size, n))
    for at in range(0, n, size):
        rows = np.arange(at, at + size)
        mask = rows < n
        keep = np.where(mask, rows, 0)
        yield {k: v[keep] for k, v in arrays.items()} | {"mask": mask, "index": keep.astype(np.int32)}


def source(setup: Experiment, plan: PhasePlan) -> Preprocess:
    """What a phase's training images go through before its augmentation."""
    return augment.source_preprocess(setup.preprocess, augmentation(plan.phase))


def resident(setup: Experiment, plan: PhasePlan, feats: np.ndarray | None) -> dict[str, np.ndarray]:
    """Arrays with a row per training image, for the scan driver: features, or the images themselves."""
    split = setup.index.splits["train"]
    n = len(split)
    arrays = {"label": split.labels, "index": np.arange(n, dtype=np.int32), "mask": np.ones(n, bool)}
    if feats is not None:
        return arrays | {"features": feats}
    how: dict[str, Any] = decoding(setup) | {"preprocess": source(setup, plan)}
    images = np.zeros((n, how["preprocess"].size, how["preprocess"].size, 3), np.uint8)
    for batch in image_batches(split, **how):
        image = np.asarray(mesh.gather_rows(batch["image"], len(batch["mask"])))
        images[batch["index"][batch["mask"]]] = image[batch["mask"]]
    return arrays | {"image": images}


def streamed(setup: Experiment, plan: PhasePlan, order: np.ndarray) -> Generator[dict[str, np.ndarray], None, None]:
    """Training batches of images, decoded on the fly: one per row of `order`."""
    from jaxcats.data.pipeline import training_batches

    split, workers = setup.index.splits["train"], setup.config.data.workers
    if mesh.has_many_devices():
        return _with_own_images(split, order, preprocess=source(setup, plan), workers=workers)
    return training_batches(split, preprocess=source(setup, plan), order=order, workers=workers)


def scans(phase: Phase) -> bool:
    """Whether the phase's driver scans over arrays on the device."""
    return phase.driver == "scan" or (phase.driver == "auto" and phase.precompute)


def make_driver(setup: Experiment, plan: PhasePlan, step: Callable, feats: np.ndarray | None) -> Callable:
    """`(state, order, epoch) -> iterator of (state, metrics [k])` for the phase's driver."""
    if scans(plan.phase):
        arrays = mesh.replicate(resident(setup, plan, feats))
        scan_steps = jit(
            scan.make_scan(step), convolutions=feats is None, donate_argnums=0, **mesh.replicated_outputs()
        )
        return lambda state, order, epoch: scan.scan_epoch(
            scan_steps, state, arrays, order=order, chunk=setup.config.chunk_steps, place=mesh.place_order
        )
    batch = min(plan.phase.batch_size, len(setup.index.splits["train"]))
    if mesh.has_many_devices() and batch % jax.device_count():
        raise UserError(
            f"phases.{plan.name}.batch_size: a batch of {batch} doesn't divide among {jax.device_count()} devices; "
            f"make it a multiple of {jax.device_count()}."
        )
    jitted = jit(step, convolutions=feats is None, donate_argnums=0, **mesh.replicated_outputs())
    rows = None if feats is None else resident(setup, plan, feats)

    def batches(order: np.ndarray) -> Batches:
        if rows is None:
            return streamed(setup, plan, order)
        return ({k: v[chosen] for k, v in rows.items()} for chosen in order)

    def placed(order: np.ndarray) -> Iterator[dict[str, Any]]:
        return (mesh.place_batch(batch, order.shape[1]) for batch in batches(order))

    return lambda state, order, epoch: scan.stream_epoch(jitted, state, placed(order))
