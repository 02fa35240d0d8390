"""Faults that reviews found, each shut out by a test: what a run folder, a slip or a full disk once did wrongly."""

import csv
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny  # noqa: F401
import yaml
from folders import write_images
from PIL import Image

from jaxcats import models
from jaxcats.common.cli import from_file, parse, run_command
from jaxcats.common.config import Config, Phase
from jaxcats.core import state as state_module
from jaxcats.evaluate import __main__ as evaluate_command
from jaxcats.evaluate import run as run_module
from jaxcats.models import registry
from jaxcats.models.conv import ConvNorm
from jaxcats.train import __main__ as train_command
from jaxcats.train import experiment
from jaxcats.train import features as features_module
from jaxcats.train.checkpoint import Checkpoints

TINY = {
    "model.backbone": "tiny",
    "model.pretrained": "false",
    "model.head": "linear",
    "data.size": "32",
    "phases.head.batch_size": "4",
    "phases.head.epochs": "1",
    "report": "false",
    "export": "false",
}
BACKBONE_LEARNS = {"phases.head.precompute": "false", "phases.head.bn": "train", "phases.head.lr": "0.1"}


def flags(settings) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def command(which, *argv) -> int:
    return run_command(which.main, [str(a) for a in argv])


def fit(pictures, workdir, settings=None, *options) -> int:
    """The exit code of a training run on some images."""
    settings = TINY | {"data.root": pictures, "workdir": workdir} | (settings or {})
    return command(train_command, *flags(settings), *options)


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def predictions(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def edit(workdir: Path, key: str, value) -> None:
    """Changes one dotted key of a run's config.yaml, as an editor would."""
    tree = yaml.safe_load((workdir / "config.yaml").read_text())
    *sections, last = key.split(".")
    section = tree
    for name in sections:
        section = section[name]
    assert section[last] != value
    section[last] = value
    (workdir / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def differs(a, b):
    """Tree of bools: which leaves of two trees are not equal."""
    return jax.tree.map(lambda x, y: not np.array_equal(x, y), a, b)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compiled) -> Path:
    """A folder with images/ and the run/ trained on them, for `trial` to copy."""
    top = tmp_path_factory.mktemp("trained")
    write_images(top / "pictures", train=8, valid=4)
    (top / "cache").mkdir()
    (top / "cache" / "xla").symlink_to(compiled)
    assert fit(top / "pictures", top / "run", {"cache_dir": top / "cache"}) == 0
    return top


@pytest.fixture
def trial(trained, tmp_path) -> Path:
    """The test's own copy of the images and of the run, whose config.yaml names the copied images."""
    for part in ("pictures", "run"):
        shutil.copytree(trained / part, tmp_path / "trial" / part)
    edit(tmp_path / "trial" / "run", "data.root", str(tmp_path / "trial" / "pictures"))
    return tmp_path / "trial"


@pytest.fixture
def complaint(capfd):
    """complaint(command, *argv, code=2): the one line on stderr of a command that must fail."""

    def run(which, *argv, code=2, begins="error: ") -> str:
        capfd.readouterr()
        found = command(which, *argv)
        err = capfd.readouterr().err
        assert found == code, err
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith(begins)
        return lines[0].removeprefix(begins)

    return run


@pytest.fixture
def setup_of(pictures):
    """setup_of(settings): the Setup of a run on `images`, which isn't run."""

    def make(settings=None):
        argv = flags(TINY | {"phases.head.precompute": "true", "data.root": pictures} | (settings or {}))
        return experiment.setup(parse(argv, prog="x", description="x")[0])

    return make


@pytest.fixture
def retiny():
    """retiny(module, **fields): registers another module as "tiny"; the usual one is back after the test."""
    usual = registry.get("tiny")

    def again(module, **fields):
        models.register("tiny", dataclasses.replace(usual, build=lambda dtype: module(dtype=dtype), **fields))

    yield again
    models.register("tiny", usual)


# --- what a run folder holds ---


SAVER = """
import sys
from pathlib import Path
import jax
from test_regressions import small_state
from jaxcats.train.checkpoint import Checkpoints

assert len(jax.devices()) == 2
state = jax.device_put(small_state(), jax.devices()[1])
assert {d for leaf in jax.tree.leaves(state) for d in leaf.devices()} == {jax.devices()[1]}
store = Checkpoints(Path(sys.argv[1]))
store.save(state, {"step": 7, "phase": "head"})
store.close()
"""


def small_state() -> state_module.TrainState:
    """A state whose bits don't depend on the process that makes it; some of them odd."""
    params = {"backbone": {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}, "head": {}}
    params["head"]["bias"] = np.array([1e-45, -0.0, np.inf, 3.4e38], np.float32)
    stats = {"backbone": {"mean": np.arange(4, dtype=np.float32) / 3}, "head": {}}
    trainable = {"backbone": {"kernel": False}, "head": {"bias": True}}
    params, stats = jax.tree.map(jnp.asarray, (params, stats))
    return state_module.create(params, stats, optax.adam(1e-3), trainable=trainable, step=7)


def test_a_checkpoint_of_another_machine_restores_here(tmp_path):
    """Orbax wants the devices that saved, unless it is told where to put the arrays: runs could not leave the GPU."""
    folder = tmp_path / "checkpoints"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", SAVER, str(folder)], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(jax.devices()) == 1
    store = Checkpoints(folder, read_only=True)
    assert_same_bits(store.restore(7, jax.eval_shape(small_state)), small_state())
    store.close()


def test_resume_notices_an_edited_config(trial, complaint):
    """The saved config.yaml was compared with itself, so that an edited one changed a run halfway unseen."""
    edit(trial / "run", "phases.head.lr", 0.5)
    before = (trial / "run" / "config.yaml").read_text()
    assert "phases.head.lr: 0.01 -> 0.5" in complaint(train_command, "--resume", "--workdir", trial / "run")
    assert (trial / "run" / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("key", "value", "change"),
    [("data.size", 40, "data.size: 32 -> 40"), ("model.head", "lesson", "model.head: 'linear' -> 'lesson'")],
)
def test_evaluate_notices_an_edited_config(key, value, change, trial, complaint):
    """Images of another size go through the network without a murmur, and the number is another."""
    edit(trial / "run", key, value)
    before = (trial / "run" / "metrics.json").read_text()
    assert change in complaint(evaluate_command, "--run", trial / "run")
    assert (trial / "run" / "metrics.json").read_text() == before


def test_a_config_may_be_edited_where_it_decides_nothing(trial):
    edit(trial / "run", "data.workers", 1)
    before = (trial / "run" / "predictions.csv").read_bytes()
    for words in ([evaluate_command, "--run"], [train_command, "--resume", "--workdir"]):
        (trial / "run" / "predictions.csv").unlink()
        assert command(*words, trial / "run") == 0
        assert (trial / "run" / "predictions.csv").read_bytes() == before


def test_resume_notices_renamed_images(trial, complaint):
    """The same images in another order make other batches, and so other weights."""
    first = min((trial / "pictures" / "train" / "cats").iterdir())
    first.rename(first.with_name("zz.jpg"))
    message = complaint(train_command, "--resume", "--workdir", trial / "run")
    assert "images have changed" in message
    assert str(trial / "pictures") in message


def test_the_images_of_a_run_may_move(trial):
    before = (trial / "run" / "predictions.csv").read_bytes()
    (trial / "pictures").rename(trial / "moved")
    assert command(train_command, "--resume", "--workdir", trial / "run", "--data.root", trial / "moved") == 0
    assert (trial / "run" / "predictions.csv").read_bytes() == before
    assert from_file(trial / "run" / "config.yaml").data.root == str(trial / "moved")
    assert command(evaluate_command, "--run", trial / "run") == 0


def test_evaluate_notices_changed_images(trial, complaint, tmp_path, capfd):
    """Its number would look like training's, and be of other images."""
    result, before = trial / "run" / "metrics.json", metrics_of(trial / "run")
    (trial / "pictures" / "valid" / "dogs" / "dogs.0.jpg").unlink()
    message = complaint(evaluate_command, "--run", trial / "run")
    assert "have changed since" in message
    assert "--data" in message
    assert json.loads(result.read_text()) == before
    out = tmp_path / "out"
    assert command(evaluate_command, "--run", trial / "run", "--data", trial / "pictures" / "valid", "--out", out) == 0
    assert "of 3 (" in capfd.readouterr().out
    assert metrics_of(out)["n"] == 3


@pytest.mark.parametrize("line", ["3", "null", "[1, 2]", '{"loss": 1.0}', '{"step": 1, "lo'])
def test_a_line_of_the_log_that_is_no_row_does_not_stop_a_resume(line, trial):
    log = trial / "run" / "metrics.jsonl"
    rows = log.read_text()
    assert rows
    log.write_text(rows + line + "\n")
    assert command(train_command, "--resume", "--workdir", trial / "run") == 0
    assert log.read_text() == rows


# --- numbers ---


def saved_states(workdir: Path) -> dict[int, state_module.TrainState]:
    """The states of all checkpoints of a run of one phase, by step."""
    config = from_file(workdir / "config.yaml")
    model, _ = experiment.create_model(config, 2)
    target = experiment.abstract_state(model, experiment.PhasePlan(0, "head", config.phases["head"], 0, 0, 1))
    store = Checkpoints(workdir / "checkpoints", read_only=True)
    found = {step: store.restore(step, target) for step in store.steps()}
    store.close()
    return found


def test_weights_that_are_no_numbers_are_not_saved(pictures, tmp_path, capfd):
    """The loss of a step is of the weights before it: a number still, when those after it, which are saved, are none."""
    workdir = tmp_path / "run"
    settings = BACKBONE_LEARNS | {"model.head": "lesson", "phases.head.freeze": "nothing", "phases.head.bn": "frozen"}
    settings |= {"phases.head.lr": "1e38", "phases.head.epochs": "2", "checkpoint.every_steps": "1"}
    assert fit(pictures, workdir, settings) == 1
    assert "lower learning rate (phases.head.lr" in capfd.readouterr().err
    assert saved_states(workdir) == {}
    assert command(evaluate_command, "--run", workdir) == 2
    out, err = capfd.readouterr()
    assert "no complete checkpoint" in err
    assert "errors of" not in out


def test_answers_that_are_no_numbers_are_no_result(pictures, tmp_path, capfd):
    """Weights near the largest float are numbers, and what they compute is not: nan was counted as one class."""
    workdir = tmp_path / "run"
    settings = {"model.head": "lesson", "chunk_steps": "1"}
    settings |= {"phases.head.lr": "1e38", "phases.head.epochs": "2", "checkpoint.every_steps": "1"}
    assert fit(pictures, workdir, settings) == 1
    assert "lower learning rate (phases.head.lr" in capfd.readouterr().err
    found = saved_states(workdir)
    assert found
    assert all(np.isfinite(leaf).all() for state in found.values() for leaf in jax.tree.leaves(state.params))
    assert command(evaluate_command, "--run", workdir) == 1
    out, err = capfd.readouterr()
    assert "not numbers" in err
    assert "errors of" not in out
    assert not (workdir / "metrics.json").exists()


class Half(nn.Module):
    """Two of the package's convolutions in a given precision; "tiny" itself ignores the precision."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        for i in range(2):
            x = nn.relu(ConvNorm(8, stride=2, padding=1, dtype=self.dtype, name=f"conv{i}")(x, train=train))
        return x


def test_a_run_in_bfloat16_keeps_float32_weights_and_its_precision(pictures, tmp_path, retiny, capfd):
    """Half-size floats are for the arithmetic; whoever judges or resumes the run must not compute it otherwise."""
    retiny(Half, first_group=("conv0",), stride=4)
    workdir, out = tmp_path / "run", tmp_path / "out"
    settings = BACKBONE_LEARNS | {"precision": "bfloat16", "phases.head.freeze": "nothing"}
    assert fit(pictures, workdir, settings) == 0
    run = run_module.load_run(workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    plan = experiment.PhasePlan(0, "head", run.phase, 0, 0, 1)
    state = checkpoints.restore(run.step, experiment.abstract_state(run.model, plan))
    leaves = jax.tree.leaves((state.params, state.batch_stats, state.opt_state))
    assert {x.dtype for x in leaves if x.ndim} == {np.dtype("float32")}
    assert len([x for x in leaves if x.ndim]) == 2 * 3 + 2 + 2 * 2 + 2 * 3 + 2  # params, averages, momentum
    split = run_module.training_index(run).splits["valid"]
    single = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="float32"))
    assert not np.array_equal(run.logits(split), single.logits(split))  # or this test would see nothing
    before, bits = metrics_of(workdir), (workdir / "predictions.csv").read_bytes()
    assert command(evaluate_command, "--run", workdir, "--out", out) == 0
    after = metrics_of(out)
    assert {k: after[k] for k in ("n", "errors", "log_loss")} == {k: before[k] for k in ("n", "errors", "log_loss")}
    assert (out / "predictions.csv").read_bytes() == bits
    (workdir / "predictions.csv").unlink()
    capfd.readouterr()
    assert command(train_command, "--resume", "--workdir", workdir) == 0
    assert "bfloat16" in capfd.readouterr().out
    assert (workdir / "predictions.csv").read_bytes() == bits


@pytest.mark.parametrize("bn", ["train", "frozen"])
def test_batch_norm_learns_averages_apart_from_what_is_frozen(bn, setup_of):
    """bn: train moves the averages of frozen layers too, but never their scale and bias; bn: frozen moves none."""
    setup = setup_of(BACKBONE_LEARNS | {"phases.head.freeze": "first", "phases.head.bn": bn})
    params, stats, _ = experiment.initial_params(setup)
    step, create = experiment.make_phase(setup, experiment.plans(setup)[0])
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (4, 32, 32, 3), np.uint8), "label": np.array([0, 1, 0, 1], np.int32)}
    batch |= {"mask": np.ones(4, bool), "index": np.arange(4, dtype=np.int32)}
    state, _ = jax.jit(step)(create(params, stats), batch)
    moved = differs(params["backbone"], state.params["backbone"])
    assert not any(jax.tree.leaves([moved["conv0"], moved["bn0"]]))
    assert all(jax.tree.leaves([moved[name] for name in ("conv1", "bn1", "conv2", "bn2")]))
    averages = jax.tree.leaves(differs(stats["backbone"], state.batch_stats["backbone"]))
    assert averages == [bn == "train"] * 6  # a mean and a variance each


# --- the feature cache and the registry ---


class Tanh(nn.Module):
    """Tiny with another activation: the same weights, other features."""

    dtype: jnp.dtype = jnp.float32
    widths: tuple[int, ...] = (4, 8, 8)

    @nn.compact
    def __call__(self, x, *, train):
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=2, use_bias=False, name=f"conv{i}")(x)
            x = nn.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{i}")(x))
        return x.astype(jnp.float32)


def test_features_are_reused_for_the_same_program_only(setup_of, retiny, tmp_path):
    """The weights alone don't decide features: the network's code does, and the batch size decides the last bits."""
    params, stats, _ = experiment.initial_params(setup_of())

    def features(**settings):
        found, counts = features_module.precompute(setup_of(settings), params, stats)
        return counts, np.concatenate([found["train"], found["valid"]]).tobytes()

    none, all_of_them = {"reused": 0, "computed": 34}, {"reused": 34, "computed": 0}
    counts, relu = features()
    assert counts == none
    assert features() == (all_of_them, relu)
    assert features(feature_batch=8)[0] == none
    retiny(Tanh)
    counts, tanh = features()
    assert counts == none
    assert features() == (all_of_them, tanh)
    assert features(cache_dir=tmp_path / "another") == (none, tanh)  # so these are its own features


def test_a_name_can_be_registered_again_with_other_layers(pictures, tmp_path, retiny):
    """The shapes of a name were remembered, so that a notebook's second try trained into the first one's tree."""
    model = models.create("tiny", 2, head="linear")
    assert models.shapes(model)[0]["backbone"]["conv1"]["kernel"].shape == (3, 3, 4, 8)

    class Other(Tanh):
        widths: tuple[int, ...] = (6, 8)

    retiny(Other, stride=4)
    assert models.shapes(model)[0]["backbone"]["conv1"]["kernel"].shape == (3, 3, 4, 8)  # a model holds its backbone
    params, stats = models.shapes(models.create("tiny", 2, head="linear"))
    assert params["backbone"]["conv1"]["kernel"].shape == (3, 3, 6, 8)
    assert set(stats["backbone"]) == {"bn0", "bn1"}
    assert fit(pictures, tmp_path / "run") == 0
    assert command(evaluate_command, "--run", tmp_path / "run") == 0
    (state,) = saved_states(tmp_path / "run").values()
    assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, params)


# --- one line ---


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_folder_that_may_not_be_read_is_one_line(complaint, pictures, monkeypatch, tmp_path):
    """Monkeypatched, because root may read everything."""
    denied = PermissionError(errno.EACCES, "Permission denied", "some/folder")
    monkeypatch.setattr(train_command, "open_run", raising(denied))
    argv = flags(TINY | {"data.root": pictures, "workdir": tmp_path / "run"})
    assert complaint(train_command, *argv) == "some/folder: Permission denied"

    usual = Path.is_file

    def is_file(path, **kwargs):
        if path.name == "config.yaml":
            raise denied
        return usual(path, **kwargs)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert complaint(evaluate_command, "--run", tmp_path) == "some/folder: Permission denied"


def test_a_full_disk_is_one_line_and_no_mistake_of_the_user(complaint, pictures, monkeypatch, tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "some/file")
    monkeypatch.setattr(train_command, "open_run", raising(full))
    argv = flags(TINY | {"data.root": pictures, "workdir": tmp_path / "run"})
    message = complaint(train_command, *argv, code=1, begins="stopped: ")
    assert "some/file" in message
    assert "No space left" in message


EMPTY = {
    "seed:": "seed",
    "precision:": "precision",
    "data: {root: }": "data.root",
    "phases: {head: {epochs: }}": "phases.head.epochs",
    "phases: {head: {optimizer: }}": "phases.head.optimizer",
}


@pytest.mark.parametrize(("text", "key"), EMPTY.items(), ids=EMPTY.values())
def test_a_value_left_empty_is_named(text, key, complaint, tmp_path):
    """YAML reads nothing as null, which the parser refused in Python's words or took for the default."""
    file = tmp_path / "c.yaml"
    file.write_text(text + "\n")
    message = complaint(train_command, "--config", file, "--print_config")
    assert f"{key}: None can't be used; expected" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:\n", Config()),
        ("checkpoint:\nseed: 0\n", Config()),
        ("data: {size: }\n", Config()),
        ("phases: {head: }\n", Config(phases={"head": Phase()})),
        ("phases: {head: {lr: 0.5}}\nmodel:\n", Config(phases={"head": Phase(lr=0.5)})),
    ],
)
def test_a_section_left_empty_means_its_defaults(text, expected, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert from_file(file) == expected


@pytest.mark.parametrize("value", ["[]", "''", "0", "false"])
def test_a_phase_that_is_no_mapping_is_refused(value, complaint, tmp_path):
    """An empty list is as little a phase as a full one; only nothing at all means the defaults."""
    file = tmp_path / "c.yaml"
    file.write_text(f"phases: {{head: {value}}}\n")
    message = complaint(train_command, "--config", file, "--print_config")
    assert "phases.head" in message
    assert "key: value" in message


@pytest.mark.parametrize("name", ["fine-tune", "items", "get"])
def test_a_phase_that_can_be_no_name_is_refused(name, complaint, tmp_path):
    """The parser keeps phases as attributes: a hyphen got lost, and its own methods hid these two."""
    file = tmp_path / "c.yaml"
    file.write_text(f"phases: {{{name}: {{epochs: 1}}}}\n")
    message = complaint(train_command, "--config", file, "--print_config")
    assert f"'{name}'" in message
    assert "letters, digits and _" in message


@pytest.mark.parametrize(
    ("weights", "words"),
    [("hf:my owner/re po/file", "my owner/re po"), ("package:__main__/x", "__main__")],
    ids=["hf", "package"],
)
def test_weights_that_can_be_no_source_are_one_line(weights, words, complaint, pictures, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as in a script; importlib raises at that
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = TINY | {"model.pretrained": "true", "model.weights": weights}
    argv = flags(settings | {"data.root": pictures, "workdir": tmp_path / "run"})
    assert words in complaint(train_command, *argv)


# --- judging other folders ---


@pytest.mark.parametrize("words", [["--data", "~/x"], ["--data=~/x"]], ids=["two-words", "one-word"])
def test_a_folder_in_the_home_folder_is_judged_as_labelled(words, trial, tmp_path, monkeypatch, capfd):
    """The shell leaves the ~ of --data=~/x alone, and a folder not found has no class folders: predictions only."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(trial / "pictures" / "train", tmp_path / "home" / "x")
    out = tmp_path / "out"
    assert command(evaluate_command, "--run", trial / "run", *words, "--out", out) == 0
    assert "of 8 (" in capfd.readouterr().out
    assert metrics_of(out)["n"] == 8
    assert [r["label"] for r in predictions(out)] == ["cats"] * 4 + ["dogs"] * 4


def test_nested_folders_without_labels_are_predicted_on(trial, tmp_path, complaint, capfd):
    """A refusal names the way out; then, without labels, there is no metrics.json, and none is said to be written."""
    top, out = tmp_path / "loose", tmp_path / "out"
    for place, seed in (("part1/a.jpg", 1), ("part2/b.jpg", 2)):
        (top / place).parent.mkdir(parents=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(top / place)
    argv = ["--run", trial / "run", "--data", top, "--out", out]
    message = complaint(evaluate_command, *argv)
    assert "unknown part1, part2" in message
    assert "--unlabelled" in message
    assert command(evaluate_command, *argv, "--unlabelled") == 0
    said = capfd.readouterr().out
    assert "2 images without labels" in said
    assert str(out) in said
    assert "metrics.json" not in said
    assert [p.name for p in out.iterdir()] == ["predictions.csv"]
    assert [(r["path"], r["label"]) for r in predictions(out)] == [("part1/a.jpg", ""), ("part2/b.jpg", "")]
