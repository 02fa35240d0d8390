"""The measurements of benchmark.py: each takes the options and returns the fields of a JSON line."""

import argparse
import importlib.metadata
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"resnet34": "dogscats.yaml", "efficientnet_lite0": "dogscats_lite0.yaml"}
VERSIONS = ("jax", "jaxlib", "flax", "optax", "tensorflow-cpu", "tensorflow", "numpy", "pillow")
EPOCHS, HEAD_ROWS = 3, 2000


def versions() -> dict[str, str]:
    """Versions of the packages that decide the speed."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def device() -> tuple[str, int]:
    """The name of the device and the peak bytes: of the process on a CPU, otherwise of the device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if "jax" not in sys.modules:
        return "cpu", peak
    import jax

    first = jax.local_devices()[0]
    stats = None if first.platform == "cpu" else first.memory_stats()
    return first.device_kind, stats["peak_bytes_in_use"] if stats else peak


def measure(run: Callable[[], Any], a: argparse.Namespace, *, images: int) -> dict[str, Any]:
    """Measures `--rounds` rounds of about `--seconds` each, after two calls to compile and to warm up.

    Args:
        run: starts one call and returns its arrays; it is called again before the arrays of the last call are ready.
        a: the options.
        images: number of images of a call.
    """
    import jax

    def seconds_of(calls: int) -> float:
        start, pending = time.perf_counter(), None
        for _ in range(calls):
            out = run()
            jax.block_until_ready(pending)
            pending = out
        jax.block_until_ready(pending)
        return time.perf_counter() - start

    first, usual = seconds_of(1), seconds_of(1)
    calls = max(1, round(a.seconds / usual))
    rates = [calls * images / seconds_of(calls) for _ in range(a.rounds)]
    return {"images_per_second": summary(rates), "compile_seconds": round(max(first - usual, 0.0), 2)}


def summary(values: list[float], digits: int = 2) -> dict[str, float]:
    """The median and the best of some rates."""
    return {"median": round(statistics.median(values), digits), "best": round(max(values), digits)}


def configuration(a: argparse.Namespace) -> Any:
    """The configuration for the options."""
    from jaxcats.common.config import Config, DataConfig, ModelConfig, Phase

    head = "linear" if a.what == "step" else "lesson"
    return Config(
        data=DataConfig(size=a.size),
        model=ModelConfig(backbone=a.backbone, head=head, pretrained=False),
        phases={"head": Phase(epochs=EPOCHS, precompute=True, batch_size=a.batch)},
        precision=a.dtype,
        feature_batch=a.batch,
    )


def random_network(a: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """(model, preprocess, params, batch_stats) with random weights."""
    import jax

    from jaxcats.train.experiment import create_model

    model, preprocess = create_model(configuration(a), 2)
    return model, preprocess, *jax.jit(model.init)(jax.random.key(0))


def spread(a: argparse.Namespace) -> tuple[Callable, Callable]:
    """Functions that put the state (replicated) and a batch (split by row) on --devices devices; no-ops for one device."""
    import jax

    from jaxcats.core import mesh

    if a.devices == 1:
        return lambda tree: tree, lambda tree: tree
    if jax.device_count() != a.devices:
        sys.exit(f"--devices {a.devices}: there are {jax.device_count()}.")
    return lambda tree: jax.device_put(tree, mesh.replicated()), lambda tree: jax.device_put(tree, mesh.by_row())


def images_on_host(a: argparse.Namespace, size: int) -> Any:
    """Random images, uint8 [B, S, S, 3]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (a.batch, size, size, 3), np.uint8)


def run_step(a: argparse.Namespace) -> dict[str, Any]:
    """Measures a train step of all layers with a linear head: SGD with momentum, BatchNorm on batch statistics."""
    import jax
    import numpy as np

    from jaxcats.common.compile_cache import jit, keep_freed_memory
    from jaxcats.core import optim, schedules
    from jaxcats.core import state as state_module
    from jaxcats.core.step import make_train_step, normalise

    keep_freed_memory()  # as the train command does
    model, preprocess, params, stats = random_network(a)
    put, put_batch = spread(a)
    groups = model.groups(params)
    trainable = optim.trainable_mask(groups, "nothing")
    tx = optim.make_tx("sgd", schedules=[schedules.constant(1e-3)] * 3, groups=groups, momentum=0.9)
    step = make_train_step(
        apply_fn=model.apply,
        tx=tx,
        trainable=trainable,
        preprocess=normalise(preprocess.mean, preprocess.std),
        key=jax.random.key(0),
        bn_train=True,
    )
    jitted, state = jit(step, donate_argnums=0), put(state_module.create(params, stats, tx, trainable=trainable))
    rows = np.arange(a.batch, dtype=np.int32)
    batch = {"image": images_on_host(a, preprocess.size), "label": rows % 2, "mask": rows >= 0, "index": rows}

    def run() -> Any:
        nonlocal state
        state, metrics = jitted(state, put_batch(batch))
        return metrics

    return measure(run, a, images=a.batch) | {"size": preprocess.size, "dtype": model.dtype}


def run_features(a: argparse.Namespace) -> dict[str, Any]:
    """Measures the frozen backbone up to pooled features, on random images or with --root on files, cache included."""
    from jaxcats.common.compile_cache import enable_compilation_cache
    from jaxcats.train import features

    model, preprocess, params, stats = random_network(a)
    facts = {"size": preprocess.size, "dtype": model.dtype}
    if not a.root:
        put, put_batch = spread(a)
        program, (params, stats) = features.feature_program(model, preprocess), put((params, stats))
        images = images_on_host(a, preprocess.size)
        return measure(lambda: program(params, stats, put_batch(images)), a, images=a.batch) | facts
    split, seconds = files_split(a), []
    arguments = {
        "params": params,
        "batch_stats": stats,
        "preprocess": preprocess,
        "batch_size": a.batch,
        "workers": None,
    }
    with tempfile.TemporaryDirectory() as folder:
        enable_compilation_cache(Path(folder))
        for turn in range(a.rounds + 1):  # the first one compiles
            start = time.perf_counter()
            features.backbone_features(model, split, **arguments, cache_dir=Path(folder, str(turn)))
            seconds.append(time.perf_counter() - start)
    return {"images_per_second": summary([len(split) / s for s in seconds[1:]])} | facts | {"images": len(split)}


def files_split(a: argparse.Namespace) -> Any:
    """A Split, without labels, of the JPEG files below --root, or of --limit of them, spread evenly."""
    import hashlib

    import numpy as np

    from jaxcats.data.index import Split

    files = sorted(p.relative_to(a.root).as_posix() for p in Path(a.root).rglob("*.jpg"))
    if a.limit:
        files = files[:: max(1, len(files) // a.limit)][: a.limit]
    if not files:
        sys.exit(f"--root {a.root}: no *.jpg in it.")
    # This also brings the files into memory, so that the disk is not measured.
    hashes = tuple(hashlib.sha256(Path(a.root, name).read_bytes()).hexdigest() for name in files)
    return Split(Path(a.root), tuple(files), np.zeros(len(files), np.int32), hashes)


def run_decode(a: argparse.Namespace) -> dict[str, Any]:
    """Measures files to uint8 batches."""
    import dataclasses

    from jaxcats import models
    from jaxcats.data.pipeline import evaluation_batches

    split, known = files_split(a), models.create(a.backbone, 2).preprocess
    preprocess, seconds = dataclasses.replace(known, size=a.size or known.size), []
    for _ in range(a.rounds + 1):  # the first one imports TensorFlow
        start = time.perf_counter()
        for _batch in evaluation_batches(split, preprocess=preprocess, batch_size=a.batch):
            pass
        seconds.append(time.perf_counter() - start)
    rates = summary([len(split) / s for s in seconds[1:]])
    return {"images_per_second": rates, "size": preprocess.size, "images": len(split)}


def head_experiment(a: argparse.Namespace) -> tuple[Any, Any, Any, dict[str, Any]]:
    """An experiment on random features and labels: (experiment, params, batch_stats, features by split)."""
    import jax
    import numpy as np

    from jaxcats.data.index import FolderIndex, Split
    from jaxcats.train import experiment

    config, rng = configuration(a), np.random.default_rng(0)
    splits, feats = {}, {}
    model, preprocess = experiment.create_model(config, 2)
    rows = a.limit or HEAD_ROWS
    for name, n in (("train", rows), ("valid", max(rows // 2, 1))):
        splits[name] = Split(Path("."), ("",) * n, rng.integers(0, 2, n, np.int32), ("",) * n)
        feats[name] = rng.standard_normal((n, model.feature_size), np.float32)
    index = FolderIndex(Path("."), ("a", "b"), splits, (), 0.0, 0)
    params, stats = jax.jit(model.init)(jax.random.key(0))
    exp = experiment.Experiment(config, index, model, preprocess, experiment.cache_folder_of(config))
    return exp, params, stats, feats


def run_head(a: argparse.Namespace) -> dict[str, Any]:
    """Measures three epochs of the lesson's head with an evaluation after each, by the drivers of the train command."""
    import jax

    from jaxcats.core.scan import epoch_order
    from jaxcats.core.state import copy
    from jaxcats.train import drivers, evaluator, experiment

    exp, params, stats, feats = head_experiment(a)
    plan, valid = experiment.plans(exp)[0], exp.index.splits["valid"]
    step, create = experiment.make_phase(exp, plan)
    drive = drivers.make_driver(exp, plan, step, feats["train"])
    options = {"features": feats["valid"], **drivers.decoding(exp)}
    begin, seconds, n = create(params, stats), [], len(feats["train"])
    trained = EPOCHS * plan.steps_per_epoch * min(a.batch, n)
    for _ in range(a.rounds + 1):
        state = jax.block_until_ready(copy(begin))
        start = time.perf_counter()
        for epoch in range(EPOCHS):
            order = epoch_order(n, batch_size=a.batch, seed=0, epoch=epoch)
            for new, sums in drive(state, order, epoch):
                state = new
                jax.device_get(sums)
            evaluator.evaluate_split(exp.model, valid, state.params, state.batch_stats, **options)
        seconds.append(time.perf_counter() - start)
    return warm(seconds, trained) | {"rows": n, "width": exp.model.feature_size, "epochs": EPOCHS}


def warm(seconds: list[float], images: int) -> dict[str, Any]:
    """The rates of all rounds but the first, which compiles."""
    usual = statistics.median(seconds[1:])
    rates = summary([images / s for s in seconds[1:]])
    facts = {"compile_seconds": round(max(seconds[0] - usual, 0.0), 2), "seconds": round(usual, 4)}
    return {"images_per_second": rates} | facts


def run_lr_find(a: argparse.Namespace) -> dict[str, Any]:
    """Measures lr_find of 100 iterations on cached features: the program, and the whole call, which traces it again."""
    import jax

    from jaxcats.common.compile_cache import jit
    from jaxcats.core import scan
    from jaxcats.train import experiment, lr_finder

    exp, params, stats, feats = head_experiment(a)
    plan = experiment.plans(exp)[0]
    calls = []
    for _ in range(a.rounds + 1):
        start = time.perf_counter()
        stopped = lr_finder.find_lr(exp, plan, (params, stats), feats["train"]).curves[0].stopped
        calls.append(time.perf_counter() - start)
    params, stats = ({"backbone": {}, "head": tree["head"]} for tree in (params, stats))
    sweep = lr_finder.Sweep()
    rates = lr_finder.group_rates(plan, sweep)
    step, create = experiment.make_phase(exp, plan, rates=rates, params=params)
    program, seconds = jit(scan.make_range_test(step, iterations=sweep.iterations)), []
    begin = scan.begin_range_test(create(params, stats))
    order = lr_finder.cycled_order(exp, plan, sweep.iterations, seed=0)
    [(arrays, order)] = lr_finder.chunks(exp, plan, order, feats["train"])
    for _ in range(a.rounds + 1):
        start = time.perf_counter()
        test, losses = program(begin, arrays, order)
        jax.device_get((losses, test.reason))
        seconds.append(time.perf_counter() - start)
    trained = int(test.count) * order.shape[1]
    whole = {"median": round(statistics.median(calls[1:]), 4), "first": round(calls[0], 3)}
    return warm(seconds, trained) | {"iterations": int(test.count), "call_seconds": whole, "stopped": stopped}


def run_ceiling(a: argparse.Namespace) -> dict[str, Any]:
    """Measures the limits of the machine: matrix products, a copy of 256 MB, and with --root the decoder of Pillow."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxcats.common.compile_cache import jit

    dtype = jnp.bfloat16 if a.dtype == "bfloat16" else jnp.float32
    precision = None if a.dtype == "bfloat16" else "highest"  # not TF32, because the results are called float32

    def best(run: Callable[[], Any]) -> float:  # seconds of the fastest call
        jax.block_until_ready(run())
        end, fastest = time.perf_counter() + a.seconds, float("inf")
        while time.perf_counter() < end:
            start = time.perf_counter()
            jax.block_until_ready(run())
            fastest = min(fastest, time.perf_counter() - start)
        return fastest

    product = jit(partial(jnp.matmul, precision=precision))
    side, flops = a.size or 2048, {}
    for m, k, n in (
        (side // 2,) * 3,
        (side,) * 3,
        (4 * side, side // 2, side // 8),
        (16 * side, side // 8, side // 32),
    ):
        x, y = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        flops[f"{m}x{k}x{n}"] = round(2 * m * k * n / best(partial(product, x, y)) / 1e9, 1)
    large = 256 << 20
    x = jnp.zeros(large // 4, jnp.float32)
    copies = {"device": best(partial(jax.jit(lambda x: x + 1), x))}
    if x.devices() == set(jax.devices("cpu")[:1]):  # into existing memory, with a thread per core
        halves = [np.array_split(np.ones(large // 4, np.float32), os.cpu_count() or 1) for _ in range(2)]
        with ThreadPoolExecutor() as pool:
            copies["host"] = best(lambda: list(pool.map(np.copyto, *halves)))
    moved = {k: round(2 * large / s / 1e9, 2) for k, s in copies.items()}
    limits = {"gflop_per_second": {"best": max(flops.values()), **flops}, "copy_gb_read_and_written_per_second": moved}
    return limits | ({"images_per_second": decoder_rate(a)} if a.root else {})


def decoder_rate(a: argparse.Namespace) -> dict[str, float]:
    """Files per second that Pillow decodes at full size, with a thread per core."""
    from PIL import Image

    split = files_split(a)
    files, rates = [Path(split.root, p) for p in split.paths], []

    def decode(path: Path) -> None:
        with Image.open(path) as image:
            image.load()

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for _ in range(a.rounds):
            start = time.perf_counter()
            list(pool.map(decode, files))
            rates.append(len(files) / (time.perf_counter() - start))
    return summary(rates)


RUNS = {
    "step": run_step,
    "features": run_features,
    "decode": run_decode,
    "head": run_head,
    "lr_find": run_lr_find,
    "ceiling": run_ceiling,
}
