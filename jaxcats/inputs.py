"""What feeds a phase: features or pictures, as batches or resident on the device; the drivers; exact evaluation."""

import functools
import hashlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL

from jaxcats import distributed, models
from jaxcats.compiling import compiler_options, jit
from jaxcats.config import Phase
from jaxcats.core import mesh, scan
from jaxcats.core.state import tree_hash
from jaxcats.core.step import make_eval_step, normalise
from jaxcats.data import augment, features
from jaxcats.data.index import Split
from jaxcats.data.preprocess import TRANSFORM_VERSION, Preprocess
from jaxcats.errors import RunError, UserError
from jaxcats.job import Plan, Setup, augmentation, head_on_features
from jaxcats.storage.log import progress_bar

ARRAY_BATCH = 1024  # rows per evaluation call on features

Batches = Iterator[dict[str, np.ndarray]]


def picture_batches(
    split: Split, *, preprocess: Preprocess, batch_size: int, workers: int | None, rows: np.ndarray | None = None
) -> Batches:
    """Evaluation batches of pictures; the first use of TensorFlow in the process."""
    from jaxcats.data.pipeline import evaluation_batches

    if mesh.several():
        return shared_batches(split, preprocess=preprocess, batch_size=batch_size, workers=workers, rows=rows)
    return evaluation_batches(split, preprocess=preprocess, batch_size=batch_size, indices=rows, workers=workers)


def shared_batches(
    split: Split, *, preprocess: Preprocess, batch_size: int, workers: int | None, rows: np.ndarray | None = None
) -> Batches:
    """The same batches, their size a multiple of the number of devices, with the images of this process's part alone."""
    rows = np.arange(len(split)) if rows is None else rows
    size = mesh.up_to_devices(batch_size)
    order = np.full(-(-len(rows) // size) * size, -1, np.int32)
    order[: len(rows)] = rows
    return _with_own_images(split, order.reshape(-1, size), preprocess=preprocess, workers=workers)


def _with_own_images(
    split: Split, order: np.ndarray, *, preprocess: Preprocess, workers: int | None
) -> Generator[dict[str, np.ndarray], None, None]:
    from jaxcats.data.pipeline import training_batches

    own = order[:, mesh.own_part(order.shape[1])]
    read = training_batches(split, preprocess=preprocess, order=own, workers=workers)
    for all_rows, batch in zip(order, read, strict=True):
        mask = all_rows >= 0
        label = np.where(mask, split.labels[all_rows], 0).astype(np.int32)
        yield {"image": batch["image"], "label": label, "mask": mask, "index": all_rows.copy()}


def decoding(setup: Setup) -> dict[str, Any]:
    """The arguments of `picture_batches` that a Setup decides."""
    config = setup.config
    return {"preprocess": setup.preprocess, "batch_size": config.feature_batch, "workers": config.data.workers}


def feature_program(model: models.Model, preprocess: Preprocess) -> Callable:
    """Jitted `(params, batch_stats, images uint8 [N,H,W,3]) -> features float32 [N,F]`, the backbone frozen.

    On CPU the batch goes through the network a few pictures at a time, inside one program: their activations stay in the
    cache and reuse the same memory, where those of a whole batch are mapped and faulted in anew at every call.
    """
    prepare = normalise(preprocess.mean, preprocess.std)

    def features_of(params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        n = len(images)
        part = next(k for k in (4, 2, 1) if n % k == 0) if jax.default_backend() == "cpu" else n
        if part == n:
            return model.features(params, batch_stats, prepare(images))
        parts = images.reshape(n // part, part, *images.shape[1:])
        return jax.lax.map(lambda x: model.features(params, batch_stats, prepare(x)), parts).reshape(n, -1)

    return jit(mesh.each_device(features_of), **mesh.whole_results())


def backbone_features(
    model: models.Model,
    split: Split,
    *,
    params: Any,
    batch_stats: Any,
    preprocess: Preprocess,
    batch_size: int,
    workers: int | None,
    cache_dir: Path,
) -> features.Cached:
    """Pooled features [n, F] of a split's pictures, from the cache where their content and the backbone are known."""
    run = feature_program(model, preprocess)
    only = {"backbone": params["backbone"], "head": {}}, {"backbone": batch_stats["backbone"], "head": {}}

    def compute(rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        pending = None  # read one batch late, so that the device and the decoder overlap
        with progress_bar(total=len(rows), desc="features") as bar:
            for batch in picture_batches(
                split, preprocess=preprocess, batch_size=batch_size, workers=workers, rows=rows
            ):
                out = run(*only, mesh.place_images(batch["image"], len(batch["mask"])))
                if pending:
                    yield _unmask(*pending)
                pending = batch, out
                bar.update(int(batch["mask"].sum()))
            if pending:
                yield _unmask(*pending)

    weights = tree_hash({"params": only[0], "batch_stats": only[1]})
    shape = jax.ShapeDtypeStruct((mesh.up_to_devices(batch_size), preprocess.size, preprocess.size, 3), np.uint8)
    facts = {
        "backbone": model.name,
        "head": model.head,
        "dtype": model.dtype,
        "weights": weights,
        "preprocess": preprocess.to_dict(),
        "transform": TRANSFORM_VERSION,
        "pillow": PIL.__version__,
        "batch_size": batch_size,  # changes the last bits
        "program": source_hash(models.registry.get(model.name)) or _lowered(run, *jax.eval_shape(lambda: only), shape),
        "compiler": compiler_options(jax.default_backend()),
        "platform": jax.default_backend(),
    }
    if mesh.several():
        facts["devices"] = jax.device_count()
    got = features.cached_features(
        split.hashes,
        facts=facts,
        width=model.feature_size,
        compute=compute,
        cache_dir=cache_dir,
        agree=distributed.any_of,
    )
    for path in got.damaged:
        print(f"{path}: damaged, removed and computed again.", file=sys.stderr)
    return got


@functools.cache
def source_hash(backbone: models.Backbone) -> str | None:
    """Hash of the code that makes a backbone's features; None for one from outside this package, or without the code.

    It stands for the program in the cache's key: lowering the network to hash that takes a second of every run.
    """
    build = backbone.build
    if not getattr(build, "func", build).__module__.startswith(f"{models.__name__}."):
        return None
    try:
        own = inspect.getsource(feature_program) + inspect.getsource(normalise)
        files = sorted(Path(models.__file__).parent.glob("*.py"))
        code = [own, *(path.read_text(encoding="utf-8") for path in files)]
    except OSError:
        return None
    code += [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def _lowered(run: Callable, *shapes: Any) -> str:
    """Hash of a program's text. Of shapes alone: arrays that a checkpoint gave back say where they lie."""
    return hashlib.sha256(run.lower(*shapes).as_text().encode()).hexdigest()


def _join(parts: list[Split]) -> Split:
    return Split(
        root=parts[0].root,
        paths=sum((s.paths for s in parts), ()),
        labels=np.concatenate([s.labels for s in parts]),
        hashes=sum((s.hashes for s in parts), ()),
    )


def precompute(setup: Setup, params: Any, batch_stats: Any) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Features of train and valid by split name, and how many were {"reused", "computed"}."""
    parts = list(setup.index.splits.values())
    ends = np.cumsum([len(s) for s in parts])
    got = backbone_features(
        setup.model, _join(parts), params=params, batch_stats=batch_stats, cache_dir=setup.cache, **decoding(setup)
    )
    by_split = dict(zip(setup.index.splits, np.split(got.features, ends[:-1]), strict=True))
    return by_split, {"reused": got.reused, "computed": got.computed}


def _unmask(batch: dict[str, np.ndarray], out: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    return batch["index"][batch["mask"]], np.asarray(out)[batch["mask"]]


def array_batches(arrays: dict[str, np.ndarray], batch_size: int) -> Batches:
    """Padded and masked evaluation batches of arrays that have a row per picture."""
    n = len(arrays["label"])
    size = mesh.up_to_devices(min(batch_size, n))
    for at in range(0, n, size):
        rows = np.arange(at, at + size)
        mask = rows < n
        keep = np.where(mask, rows, 0)
        yield {k: v[keep] for k, v in arrays.items()} | {"mask": mask, "index": keep.astype(np.int32)}


def source(setup: Setup, plan: Plan) -> Preprocess:
    """What a phase's training pictures go through before its augmentation."""
    return augment.source_preprocess(setup.preprocess, augmentation(plan.phase))


def resident(setup: Setup, plan: Plan, feats: np.ndarray | None) -> dict[str, np.ndarray]:
    """Arrays with a row per training picture, for the scan driver: features, or the pictures themselves."""
    split = setup.index.splits["train"]
    n = len(split)
    arrays = {"label": split.labels, "index": np.arange(n, dtype=np.int32), "mask": np.ones(n, bool)}
    if feats is not None:
        return arrays | {"features": feats}
    how: dict[str, Any] = decoding(setup) | {"preprocess": source(setup, plan)}
    images = np.zeros((n, how["preprocess"].size, how["preprocess"].size, 3), np.uint8)
    for batch in picture_batches(split, **how):
        image = np.asarray(mesh.gathered(batch["image"], len(batch["mask"])))
        images[batch["index"][batch["mask"]]] = image[batch["mask"]]
    return arrays | {"image": images}


def streamed(setup: Setup, plan: Plan, order: np.ndarray) -> Generator[dict[str, np.ndarray], None, None]:
    """Training batches of pictures, decoded on the fly: one per row of `order`."""
    from jaxcats.data.pipeline import training_batches

    split, workers = setup.index.splits["train"], setup.config.data.workers
    if mesh.several():
        return _with_own_images(split, order, preprocess=source(setup, plan), workers=workers)
    return training_batches(split, preprocess=source(setup, plan), order=order, workers=workers)


def scans(phase: Phase) -> bool:
    """Whether the phase's driver scans over arrays on the device."""
    return phase.driver == "scan" or (phase.driver == "auto" and phase.precompute)


def run_evaluation(eval_step: Callable, params: Any, batch_stats: Any, batches: Batches, *, n: int) -> np.ndarray:
    """Logits float32 [n, C] of every picture once, in the order of their index."""
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
        raise RunError(f"The evaluation saw {seen} of {n} pictures.")
    return logits


@functools.cache  # a notebook judges the same network after every fit: one program for all
def _eval_program(
    model: models.Model, backbone: models.Backbone, preprocess: Preprocess, on_features: bool, several: bool
) -> Callable:
    """The jitted evaluation step; `backbone` is what the model's name stands for now, `several` whether devices share it."""
    apply_fn = head_on_features(model) if on_features else model.apply
    step = make_eval_step(apply_fn=apply_fn, preprocess=normalise(preprocess.mean, preprocess.std))
    return jit(step, convolutions=not on_features, **mesh.whole_results())


class Evaluator:
    """`(params, batch_stats) -> logits [n, C]` of a split, from features where there are some, else from the pictures."""

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
        self.step = _eval_program(model, models.registry.get(model.name), preprocess, feats is not None, mesh.several())

    def __call__(self, params: Any, batch_stats: Any) -> np.ndarray:
        batches = (
            array_batches(self.arrays, ARRAY_BATCH) if self.arrays else picture_batches(self.split, **self.decoding)
        )
        return run_evaluation(self.step, params, batch_stats, batches, n=len(self.split))


def make_driver(setup: Setup, plan: Plan, step: Callable, feats: np.ndarray | None) -> Callable:
    """`(state, order, epoch) -> iterator of (state, metrics [k])` for the phase's driver."""
    if scans(plan.phase):
        arrays = mesh.everywhere(resident(setup, plan, feats))
        scan_steps = jit(scan.make_scan(step), convolutions=feats is None, donate_argnums=0, **mesh.whole_results())
        return lambda state, order, epoch: scan.scan_epoch(
            scan_steps, state, arrays, order=order, chunk=setup.config.chunk_steps, place=mesh.place_order
        )
    batch = min(plan.phase.batch_size, len(setup.index.splits["train"]))
    if mesh.several() and batch % jax.device_count():
        raise UserError(
            f"phases.{plan.name}.batch_size: a batch of {batch} doesn't divide among {jax.device_count()} devices; "
            f"make it a multiple of {jax.device_count()}."
        )
    jitted = jit(step, convolutions=feats is None, donate_argnums=0, **mesh.whole_results())
    rows = None if feats is None else resident(setup, plan, feats)

    def batches(order: np.ndarray) -> Batches:
        if rows is None:
            return streamed(setup, plan, order)
        return ({k: v[chosen] for k, v in rows.items()} for chosen in order)

    def placed(order: np.ndarray) -> Iterator[dict[str, Any]]:
        return (mesh.place_batch(batch, order.shape[1]) for batch in batches(order))

    return lambda state, order, epoch: scan.stream_epoch(jitted, state, placed(order))
