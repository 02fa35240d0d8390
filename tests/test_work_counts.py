"""What makes runs fast, guarded by counts, which a busy machine cannot change: programs, compilations, transfers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny  # noqa: F401
from jax import monitoring

from jaxcats import models
from jaxcats.common import compile_cache
from jaxcats.common.cli import run_command
from jaxcats.core import optim, state
from jaxcats.core.step import make_train_step, normalise
from jaxcats.train import __main__ as train_command
from jaxcats.train import drivers, evaluator

SMALL = [
    "--report",
    "false",
    "--export",
    "false",
    "--model.backbone",
    "tiny",
    "--model.pretrained",
    "false",
    "--data.size",
    "32",
]
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations():
    """A list that grows by one with every program that is compiled, or fetched compiled from the cache."""
    found = []

    def listen(event, seconds, **_):
        if event == COMPILED:
            found.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield found
    monitoring.unregister_event_duration_listener(listen)


def run(pictures, workdir, *argv):
    words = [*SMALL, "--data.root", str(pictures), "--workdir", str(workdir), *argv]
    assert run_command(train_command.main, words) == 0


def train_step(name):
    """(step, state, batch) of a train step of a whole network, BatchNorm on the batch."""
    model = models.create(name, 2, head="linear")
    params, stats = (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree) for tree in models.shapes(model))
    trainable, tx = optim.trainable_mask(model.groups(params), "nothing"), optax.sgd(0.1)
    prepare = normalise(model.preprocess.mean, model.preprocess.std)
    step = make_train_step(
        apply_fn=model.apply, tx=tx, trainable=trainable, preprocess=prepare, key=jax.random.key(0), bn_train=True
    )
    rows = np.arange(2, dtype=np.int32)
    batch = {"image": np.zeros((2, 224, 224, 3), np.uint8), "label": rows, "index": rows, "mask": rows >= 0}
    return step, state.create(params, stats, tx, trainable=trainable), batch


@pytest.mark.parametrize("precompute", ["true", "false"])
def test_later_epochs_compile_nothing(precompute, pictures, tmp_path, compilations):
    counts = []
    for epochs in ("2", "5"):
        before = len(compilations)
        how = ["--phases.head.epochs", epochs, "--phases.head.precompute", precompute, "--phases.head.batch_size", "4"]
        run(pictures, tmp_path / epochs, *how)
        counts.append(len(compilations) - before)
    assert counts[0] > 0
    assert counts[1] <= counts[0]  # fewer, where a notebook or a test has compiled some before


def test_an_epoch_on_features_is_one_program_and_one_read(pictures, tmp_path, monkeypatch):
    launched, read = [], []
    jit, get = drivers.jit, jax.device_get

    def counting_jit(fun, **options):
        compiled = jit(fun, **options)

        def call(*args):
            launched.append(fun.__name__)
            return compiled(*args)

        call.lower = compiled.lower
        return call

    def counting_get(tree):
        read.append(tree)
        return get(tree)

    monkeypatch.setattr(drivers, "jit", counting_jit)
    monkeypatch.setattr(evaluator, "jit", counting_jit)
    monkeypatch.setattr(jax, "device_get", counting_get)
    how = ["--phases.head.epochs", "3", "--phases.head.precompute", "true", "--phases.head.batch_size", "4"]
    run(pictures, tmp_path / "run", *how)
    assert launched.count("scan_steps") == 3  # six steps each
    sums = [tree for tree in read if isinstance(tree, dict) and "loss" in tree]
    assert len(sums) == 3
    assert launched.count("eval_step") <= 4  # one per epoch, and the final one


def test_features_that_are_cached_trace_no_network(pictures, tmp_path, monkeypatch):
    how = ["--model.backbone", "resnet18", "--phases.head.precompute", "true", "--phases.head.batch_size", "4"]
    run(pictures, tmp_path / "cold", *how)

    def refuse(*_args, **_options):
        raise AssertionError("the backbone was traced")

    monkeypatch.setattr(models.Model, "_feature_map", refuse)
    run(pictures, tmp_path / "warm", *how)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_a_train_step_for_cpu_has_no_grouped_convolution(name):
    """XLA runs those on one core, 10 to 38 times slower than the shifted sums in their place, their gradients too."""
    step, begin, batch = train_step(name)
    text = jax.jit(step).trace(begin, batch).lower(lowering_platforms=("cpu",)).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert lines
    for line in lines:
        assert "feature_group_count = 1 " in line
        assert "batch_group_count = 1 " in line


def test_sums_over_pixels_for_cpu_are_matrix_products():
    """Of BatchNorm's sums over pixels no `reduce` over an image is left: XLA runs those on one core."""
    step, begin, batch = train_step("efficientnet_lite0")
    text = jax.jit(step).trace(begin, batch).lower(lowering_platforms=("cpu",)).as_text()
    over_pixels = [
        line for line in text.splitlines() if "stablehlo.reduce(" in line and "dimensions = [0, 1, 2]" in line
    ]
    assert not over_pixels


def test_programs_with_convolutions_get_the_compilers_options_and_others_do_not():
    options = compile_cache.compiler_options("cpu")
    with_them = compile_cache.jit(lambda x: x + 1).lower(1.0).compile()
    assert with_them(1.0) == 2
    assert options is None or list(options) == ["xla_cpu_experimental_ynn_fusion_type"]
    assert compile_cache.compiler_options("gpu") is None
