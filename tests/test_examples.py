"""User functions: the examples do what they say, the run folder keeps the names of the functions, errors name the mistake."""

import functools
import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny  # noqa: F401

import jaxcats as jc
from jaxcats.common.cli import run_command
from jaxcats.data.augment import per_image
from jaxcats.evaluate.run import load_run
from jaxcats.models import efficientnet_lite
from jaxcats.train import __main__ as train_command
from jaxcats.train.user_functions import UserFunctions, function_name

EXAMPLES = Path(__file__).parent.parent / "scripts" / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
SMALL = [
    "--model.backbone",
    "tiny",
    "--model.pretrained",
    "false",
    "--data.size",
    "32",
    "--phases.head.batch_size",
    "4",
]
BARE = ["--report", "false", "--export", "false"]


def example(name):
    """The names of an example, without running its main."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs an example as `python scripts/examples/NAME.py ...`; returns its exit code, stdout and stderr."""

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [f"scripts/examples/{name}.py", *map(str, argv)])
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
            code = 0
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def learn(pictures, tmp_path):
    data = jc.ImageClassifierData.from_paths(pictures, size=32, batch_size=4)
    return jc.Learner.pretrained("tiny", data, precompute=True, pretrained=False, workdir=tmp_path / "kept")


def epochs(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "valid_loss" in row]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) < 40
    assert len(FILES) == 5


def test_a_loss_of_the_user(script, pictures, tmp_path):
    run = tmp_path / "run"
    argv = [
        *SMALL,
        "--data.root",
        pictures,
        "--workdir",
        run,
        "--phases.head.epochs",
        "1",
        "--phases.head.precompute",
        "true",
    ]
    code, out, _ = script("loss", *argv, *BARE)
    assert code == 0
    assert "User functions: head: loss_fn loss.focal" in out
    names = {"head": {"loss_fn": "loss.focal"}}
    assert json.loads((run / "versions.json").read_text())["own"] == names
    assert json.loads((run / "metrics.json").read_text())["checkpoint"]["own"] == names
    loaded = load_run(run)
    assert loaded.user_functions == names

    plain = ["--resume", "--workdir", str(run)]
    assert run_command(train_command.main, plain) == 2
    assert train_command.train_main(loss_fn=lambda logits, labels: logits.sum(1), argv=plain) == 2
    code, out, _ = script("loss", *plain)
    assert code == 0
    assert "Finished already" in out


def test_what_resuming_with_another_loss_says(script, pictures, tmp_path, capsys):
    run = tmp_path / "run"
    argv = [*SMALL, *BARE, "--data.root", str(pictures), "--workdir", str(run), "--phases.head.epochs", "1"]
    assert run_command(train_command.main, argv) == 0
    assert script("loss", *argv, "--resume")[0] == 2
    focal = example("loss")["focal"]
    assert train_command.train_main(loss_fn=functools.partial(focal, gamma=1.0), argv=[*argv, "--resume"]) == 2
    message = capsys.readouterr().err
    assert "(none; now head: loss_fn loss.focal(gamma=1.0))" in message
    assert message.count("\n") == 1


def test_the_loss_is_what_is_minimised(learn):
    focal = example("loss")["focal"]
    learn.fit(0.01, loss_fn=functools.partial(focal, gamma=0.0))  # the cross-entropy, by another way
    rows = [row["loss"] for row in learn.sched.rows if "loss" in row]
    other = jc.Learner.pretrained("tiny", learn.data, precompute=True, pretrained=False)
    other.fit(0.01)
    np.testing.assert_allclose(rows, [row["loss"] for row in other.sched.rows if "loss" in row], rtol=1e-3)
    third = jc.Learner.pretrained("tiny", learn.data, precompute=True, pretrained=False)
    third.fit(0.01, loss_fn=focal)
    assert third.sched.rows[0]["loss"] < rows[0]
    assert (
        third.lr_find(loss_fn=focal, iterations=5).curves[0].losses[0] < other.lr_find(iterations=5).curves[0].losses[0]
    )


def test_a_learner_saves_the_name_of_the_loss(learn, script, capsys):
    focal = example("loss")["focal"]
    learn.fit(0.01, loss_fn=focal)
    learn.fit(0.01)
    folder = learn.save("one")
    again = jc.Learner.pretrained("tiny", learn.data, precompute=True, pretrained=False, workdir=learn.workdir)
    again.load("one")
    again.fit(0.01)
    folder = again.save("two")
    assert run_command(train_command.main, ["--resume", "--workdir", str(folder), *BARE]) == 2
    assert "fit1: loss_fn loss.focal; now none" in capsys.readouterr().err


def test_an_augmentation_of_the_user(script, pictures, tmp_path):
    argv = [*SMALL, *BARE, "--data.root", pictures, "--phases.head.epochs", "1", "--phases.head.precompute", "false"]
    losses = {}
    for name, more in (("a", []), ("b", []), ("after", ["--phases.head.augment", "flip"])):
        code, out, err = script("augmentation", *argv, *more, "--workdir", tmp_path / name)
        assert code == 0, err
        assert "head: augment augmentation.cutout" in out
        losses[name] = epochs(tmp_path / name)[0]["train_loss"]
    assert losses["a"] == losses["b"] != losses["after"]
    assert run_command(train_command.main, [*map(str, argv), "--workdir", str(tmp_path / "plain")]) == 0
    assert epochs(tmp_path / "plain")[0]["train_loss"] != losses["a"]
    code, _, err = script("augmentation", *argv, "--phases.head.precompute", "true", "--workdir", tmp_path / "c")
    assert code == 2
    assert "augmentation.cutout has no effect" in err


def test_cutout_depends_on_seed_epoch_and_image_alone():
    cutout = example("augmentation")["cutout"]
    images = np.full((4, 30, 30, 3), 200, np.uint8)
    apply = per_image(cutout, key=jax.random.key(0))
    first = np.asarray(apply(images, 0, np.arange(4)))
    assert first.shape == images.shape
    assert set(np.unique(first)) == {127.0, 200.0}
    assert 0 < (first[0] == 127).mean() <= 1 / 9
    np.testing.assert_array_equal(apply(images[2:], 0, np.array([2, 3])), first[2:])
    assert not np.array_equal(apply(images, 1, np.arange(4)), first)
    assert not np.array_equal(first[0], first[1])


def test_a_metric_of_the_user(pictures, tmp_path, capsys):
    learn = example("metric")["train"](pictures, "tiny", pretrained=False, workdir=tmp_path)
    out = capsys.readouterr().out
    for row, line in zip(learn.history, out.splitlines()[1:4], strict=True):
        assert f"cost {row['metrics']['cost']:.5g}" in line
    logits, labels = learn.logits(), learn.data.val_y
    metrics = learn.history[-1]["metrics"]
    predicted = logits.argmax(1)
    assert metrics["cost"] == ((labels == 0) & (predicted == 1)).sum() + 5 * ((labels == 1) & (predicted == 0)).sum()
    assert set(metrics) == {"cost", "cautious cost"}


def test_a_metric_is_logged_in_a_run_folder(pictures, tmp_path, capsys):
    argv = [
        *SMALL,
        *BARE,
        "--data.root",
        str(pictures),
        "--workdir",
        str(tmp_path / "run"),
        "--phases.head.epochs",
        "1",
    ]
    assert (
        train_command.train_main(metrics=lambda logits, labels: {"answers": len(labels), "odd": np.nan}, argv=argv) == 0
    )
    assert "answers 10   odd -" in capsys.readouterr().out
    assert epochs(tmp_path / "run")[0]["metrics"] == {"answers": 10.0, "odd": None}
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["own_metrics"] == {"answers": 10.0, "odd": None}
    assert run_command(train_command.main, ["--resume", "--workdir", str(tmp_path / "run")]) == 0  # it decides nothing


def test_a_network_of_the_user(script, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(efficientnet_lite, "STAGES", efficientnet_lite.STAGES[:1])  # all of them take long to compile
    argv = [
        "--model.backbone",
        "mine",
        "--model.pretrained",
        "false",
        "--data.size",
        "32",
        "--data.root",
        pictures,
        *BARE,
    ]
    argv += ["--phases.head.epochs", "1", "--workdir", tmp_path / "run"]
    code, out, _ = script("backbone", "train", *argv)
    assert code == 0
    assert "mine (random weights)" in out
    assert f"scripts/examples/backbone.py evaluate --run {tmp_path / 'run'}\n" in out
    code, out, _ = script("backbone", "evaluate", "--run", tmp_path / "run")
    assert code == 0
    assert "of 10 (" in out


def test_a_step_of_the_user(script, pictures):
    argv = [*SMALL, "--phases.head.epochs", "2", "--data.root", pictures]
    code, out, _ = script("step", *argv)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == [
        f"epoch {e}, {n}" for e in (0, 1) for n in ("last", "average")
    ]


def test_the_average_of_a_step_of_the_user(script, pictures, monkeypatch):
    """With a learning rate of almost 0 the weights and their average stay equal, so both lines are equal."""
    argv = [*SMALL, "--phases.head.epochs", "2", "--phases.head.lr", "1e-12", "--data.root", pictures]
    _, out, _ = script("step", *argv)
    last, average = (line.split(": ")[1] for line in out.splitlines()[:2])
    assert last == average
    _, out, _ = script("step", *argv[:-4], "--phases.head.lr", "1", *argv[-2:])
    last, average = (line.split(": ")[1] for line in out.splitlines()[:2])
    assert last != average  # three steps move the average by a seventh of the way


def test_a_wrong_argument_of_an_example_is_one_line(script, tmp_path):
    for name, *argv in (("metric", tmp_path / "none"), ("step", "--data.root", tmp_path / "none")):
        code, _, error = script(name, *argv)
        assert (code, error.count("\n")) == (2, 1)
        assert "no such folder" in error


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"loss_fn": lambda logits, labels: logits.mean()}, r"returns .*shape=\(\).*; expected a loss for each"),
        ({"loss_fn": lambda logits, labels: (logits[:, 0], labels)}, "returns \\(.*; expected a loss"),
        ({"loss_fn": "focal"}, "loss_fn: 'focal' can't be used; expected a function"),
        ({"loss_fn": lambda x, y: y * 1.0, "label_smoothing": 0.1}, "label_smoothing: has no effect with"),
        ({"augment": lambda image, key: image[1:]}, r"shape=\(31, 32, 3\).*; expected an image of the size"),
        ({"metrics": lambda logits, labels: 0.5}, r"returns 0\.5; expected a dictionary"),
        ({"metrics": lambda logits, labels: {"a": "high"}}, r"returns \{'a': 'high'\}; expected a dictionary"),
    ],
)
def test_a_wrong_function_is_named_before_anything_is_computed(learn, own, message, monkeypatch):
    learn.precompute = False
    monkeypatch.setattr("jaxcats.learner.learner.TrainingLoop", None)
    with pytest.raises(jc.UserError, match=message):
        learn.fit(0.01, **own)
    assert not learn.history


def test_names_say_where_a_function_is_from():
    class Loss:
        def __call__(self, logits, labels): ...

    assert function_name(functools.partial(jnp.sum, 1, b=2, a="x")) == f"{function_name(jnp.sum)}(1, a='x', b=2)"
    assert function_name(Loss()).endswith("names_say_where_a_function_is_from.<locals>.Loss")
    assert UserFunctions().names(jc.Config()) == {}


@pytest.mark.slow
def test_the_network_of_the_user_gets_the_published_weights():
    example("backbone")
    mine, theirs = (jc.models.create(name, 2) for name in ("mine", "efficientnet_lite0"))
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    maps = [model.feature_map(*jc.models.load_pretrained(model), images) for model in (mine, theirs)]
    np.testing.assert_allclose(np.square(maps[0]), maps[1], rtol=1e-5, atol=1e-6)
