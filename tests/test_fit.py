"""Whole runs on a tiny network: what is written, what is frozen, and the same bits after kill -9."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny  # noqa: F401
from folders import write_images

from jaxcats.common.cli import parse, run_command
from jaxcats.common.stats import wilson_interval
from jaxcats.evaluate import __main__ as evaluate_command
from jaxcats.train import __main__ as train_command
from jaxcats.train import experiment, loop
from jaxcats.train.checkpoint import Checkpoints
from jaxcats.train.features import precompute
from jaxcats.train.loop import Progress, TrainingLoop
from jaxcats.train.run_folder import RunLog

BASE = [
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
    "--phases.head.batch_size",
    "4",
]
TWO_PHASES = """
report: false
export: false
model: {backbone: tiny, pretrained: false}
data: {size: 32}
phases:
  head: {epochs: 2, precompute: true, batch_size: 4}
  all: {epochs: 2, lr: [1.0e-3, 1.0e-2, 1.0e-1], freeze: nothing, bn: train, augment: side_on, batch_size: 4}
"""


def config_of(*argv):
    return parse([str(a) for a in argv], prog="x", description="x")[0]


def run(*argv) -> int:
    return run_command(train_command.main, [str(a) for a in argv])


def last_state(workdir: Path):
    saved = Checkpoints(workdir / "checkpoints", read_only=True)
    config = job_config(workdir)
    model, _ = experiment.create_model(config, 2)
    step = saved.pick("last")
    name = saved.meta(step)["phase"]
    return saved.restore(
        step, experiment.abstract_state(model, experiment.PhasePlan(0, name, config.phases[name], 0, 0, 1))
    )


def job_config(workdir: Path):
    return config_of("--config", workdir / "config.yaml")


def log_of(workdir: Path):
    clock = {"seconds", "images_per_second"}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def test_a_run_leaves_what_it_promises(pictures, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run(*BASE, "--data.root", pictures, "--workdir", workdir) == 0
    out = capsys.readouterr().out
    assert "of 10 (" in out
    assert "95 % interval" in out
    found = json.loads((workdir / "metrics.json").read_text())
    assert found["n"] == 10
    assert found["interval"] == list(wilson_interval(10 - found["errors"], 10))
    assert {"imports", "index", "head.features", "head.train", "evaluate", "total"} <= set(found["seconds"])
    rows = list(csv.DictReader((workdir / "predictions.csv").open()))
    assert len(rows) == 10
    assert sum(r["label"] != r["predicted"] for r in rows) == found["errors"]
    for r in rows:
        assert math.isclose(float(r["p_cats"]) + float(r["p_dogs"]), 1, abs_tol=1e-6)
        assert r["predicted"] == max(("cats", "dogs"), key=lambda c: float(r[f"p_{c}"]))
    loss = -np.mean([math.log(float(r[f"p_{r['label']}"])) for r in rows])
    assert math.isclose(found["log_loss"], loss, rel_tol=1e-5)
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "versions.json").read_text())["weights"]["source"] == "random"
    epochs = [r for r in log_of(workdir) if "epoch" in r]
    assert [r["epoch"] for r in epochs] == [0, 1, 2]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(pictures, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(*BASE, "--data.root", pictures, "--workdir", tmp_path / name, "--seed", seed) == 0
    texts = {n: (tmp_path / n / "predictions.csv").read_text() for n in "abc"}
    assert texts["a"] == texts["b"]
    assert texts["a"] != texts["c"]


def test_a_warm_run_reads_no_image_and_imports_no_tensorflow(pictures, tmp_path):
    code = "import tiny, sys; from jaxcats.train.__main__ import main; main(sys.argv[1:]); print('TF', 'tensorflow' in sys.modules)"
    printed = []
    for name in ("cold", "warm"):
        argv = [*BASE, "--data.root", pictures, "--workdir", tmp_path / name]
        printed.append(in_process(code, *argv).stdout)
    assert "TF True" in printed[0]
    assert "TF False" in printed[1]
    assert "34 features from the cache" in printed[1]
    same = [(tmp_path / n / "predictions.csv").read_bytes() for n in ("cold", "warm")]
    assert same[0] == same[1]


def test_input_threads_and_a_warm_cache_change_no_bit(tmp_path, pictures, monkeypatch):
    (tmp_path / "two.yaml").write_text(TWO_PHASES)
    left = []
    for cache, threads in (("a", 1), ("b", 8), ("b", 8)):  # the last finds b's features
        monkeypatch.setenv("JAXCATS_CACHE", str(tmp_path / cache))
        workdir = tmp_path / f"run{len(left)}"
        argv = ["--config", tmp_path / "two.yaml", "--data.root", pictures, "--workdir", workdir]
        assert run(*argv, "--data.workers", threads) == 0
        state = last_state(workdir)
        left.append((jax.tree.map(np.asarray, state), log_of(workdir), (workdir / "predictions.csv").read_bytes()))
    for state, log, predictions in left[1:]:
        jax.tree.map(np.testing.assert_array_equal, state, left[0][0])
        assert (log, predictions) == left[0][1:]


def in_process(code, *argv, check=True):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, env=env, timeout=300
    )
    assert not check or done.returncode == 0, done.stderr
    return done


KILLED = """
import os, signal, sys, tiny
from jaxcats.train.__main__ import main
from jaxcats.train.loop import TrainingLoop
at, log_step_metrics = int(sys.argv[1]), TrainingLoop.log_step_metrics

def log_and_die(self, *arguments):
    log_step_metrics(self, *arguments)
    if self.progress.step >= at:
        self.checkpoints.wait()  # so that there is a checkpoint to continue from
        os.kill(os.getpid(), signal.SIGKILL)

TrainingLoop.log_step_metrics = log_and_die
main(sys.argv[2:])
"""


@pytest.fixture
def orders(monkeypatch):
    """The rows of every step that the drivers are given from here on, as [epoch, rows]."""
    seen, make = [], loop.make_driver

    def noting(*args):
        drive = make(*args)

        def noted(state, order, epoch):
            seen.extend([epoch, rows.tolist()] for rows in order)
            return drive(state, order, epoch)

        return noted

    monkeypatch.setattr(loop, "make_driver", noting)
    return seen


@pytest.mark.parametrize(
    "how",
    [
        ["--phases.head.precompute", "true", "--chunk_steps", "2"],
        pytest.param(["--phases.head.precompute", "true", "--phases.head.driver", "stream"], marks=pytest.mark.slow),
        ["--phases.head.freeze", "nothing", "--phases.head.bn", "train", "--phases.head.augment", "side_on"],
        pytest.param(
            [
                "--phases.head.freeze",
                "first",
                "--phases.head.augment",
                "flip",
                "--phases.head.driver",
                "scan",
                "--chunk_steps",
                "2",
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["scan-features", "stream-features", "stream-images", "scan-images"],
)
def test_killed_in_the_middle_of_an_epoch_and_resumed_ends_with_the_same_bits(how, pictures, tmp_path, orders):
    if "--phases.head.precompute" not in how:
        how = ["--phases.head.precompute", "false", *how]
    argv = [*BASE, *how, "--data.root", pictures, "--checkpoint.every_steps", "2", "--phases.head.epochs", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*argv, "--workdir", whole) == 0
    uninterrupted = list(orders)
    orders.clear()
    killed = in_process(KILLED, 9, *argv, "--workdir", cut, check=False)  # 6 steps an epoch: in the second
    assert killed.returncode == -9
    assert run("--workdir", cut, "--resume") == 0
    assert orders == uninterrupted[8:]  # the last checkpoint was at step 8
    for a, b in zip(jax.tree.leaves(last_state(whole)), jax.tree.leaves(last_state(cut)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert log_of(whole) == log_of(cut)
    assert (whole / "predictions.csv").read_bytes() == (cut / "predictions.csv").read_bytes()


def test_phases_freeze_what_they_say_and_use_their_rates(pictures, tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(TWO_PHASES)
    config = config_of("--config", file, "--data.root", pictures)
    prepared = experiment.setup(config)
    start = experiment.initial_params(prepared)[:2]
    head_only, every = experiment.plans(prepared)
    assert every.first_step == 12
    states = {}
    for plan in (head_only, every):
        folder = tmp_path / plan.name
        with closing(RunLog(folder)) as log, closing(Checkpoints(folder / "checkpoints")) as checkpoints:
            progress = Progress(plan=plan.index, epoch=plan.first_epoch, step=plan.first_step)
            features = precompute(prepared, *start)[0] if plan.phase.precompute else {}
            training = TrainingLoop(prepared, progress, log, checkpoints)
            states[plan.name] = training.run_phase(plan, start, features)
    after = states["head"]
    for a, b in zip(jax.tree.leaves(start[0]["backbone"]), jax.tree.leaves(after.params["backbone"]), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(start[1]["backbone"]), jax.tree.leaves(after.batch_stats["backbone"]), strict=True):
        np.testing.assert_array_equal(a, b)
    changed = jax.tree.map(
        lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()),
        start[0]["backbone"],
        states["all"].params["backbone"],
    )
    assert all(jax.tree.leaves(changed))
    rows = [r for r in log_of(tmp_path / "all") if "lr" in r]
    np.testing.assert_allclose([r["lr"] for r in rows], [[1e-3, 1e-2, 1e-1]] * 12, rtol=1e-6)


def test_best_is_judged_when_asked_for(pictures, tmp_path):
    workdir = tmp_path / "run"
    argv = [
        *BASE,
        "--data.root",
        pictures,
        "--phases.head.epochs",
        "6",
        "--phases.head.lr",
        "0.3",
        "--checkpoint.use",
        "best",
    ]
    assert run(*argv, "--workdir", workdir) == 0
    epochs = [r for r in log_of(workdir) if "epoch" in r]
    best = min(epochs, key=lambda r: (r["errors"], r["valid_loss"]))
    found = json.loads((workdir / "metrics.json").read_text())
    assert (found["errors"], found["checkpoint"]["step"]) == (best["errors"], best["step"])
    assert found["checkpoint"]["valid_used_for"] == ["choosing the best epoch"]
    kept = Checkpoints(workdir / "checkpoints", read_only=True).steps()
    assert kept == sorted({best["step"], epochs[-1]["step"]})


def test_evaluate_repeats_the_result_and_judges_other_folders(pictures, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run(*BASE, "--data.root", pictures, "--workdir", workdir) == 0
    before = (workdir / "predictions.csv").read_bytes()
    assert run_command(evaluate_command.main, ["--run", str(workdir)]) == 0
    assert (workdir / "predictions.csv").read_bytes() == before
    other = tmp_path / "out"
    capsys.readouterr()
    assert (
        run_command(
            evaluate_command.main, ["--run", str(workdir), "--data", str(pictures / "train"), "--out", str(other)]
        )
        == 0
    )
    assert "of 24 (" in capsys.readouterr().out
    assert json.loads((other / "metrics.json").read_text())["n"] == 24
    loose = pictures / "train" / "cats"
    assert (
        run_command(evaluate_command.main, ["--run", str(workdir), "--data", str(loose), "--out", str(other / "loose")])
        == 0
    )
    rows = list(csv.DictReader((other / "loose" / "predictions.csv").open()))
    assert len(rows) == 12
    assert {r["label"] for r in rows} == {""}


def test_a_test_split_is_judged_only_when_asked_for(pictures, tmp_path, capsys):
    for path in sorted(pictures.glob("*/*/*.jpg")):  # cats.3.jpg of valid gets another number
        path.rename(pictures / path.name.replace(".", ".9" if path.parts[-3] == "valid" else ".", 1))
    for part in ("train", "valid"):
        shutil.rmtree(pictures / part)
    workdir = tmp_path / "run"
    rule = ["--data.labels", r"^(?P<label>cats|dogs)\.", "--data.valid_fraction", "0.3"]
    assert run(*BASE, "--data.root", pictures, "--workdir", workdir, *rule, "--data.test_fraction", "0.2") == 0
    judged = {r["path"] for r in csv.DictReader((workdir / "predictions.csv").open())}
    assert len(judged) == 10
    before = (workdir / "metrics.json").read_bytes()
    assert run_command(evaluate_command.main, ["--run", str(workdir), "--split", "test"]) == 0
    assert "Test images: neither training nor a choice has used them." in capsys.readouterr().out
    tested = {r["path"] for r in csv.DictReader((workdir / "evaluations/test/predictions.csv").open())}
    assert len(tested) == 6
    assert not tested & judged
    assert json.loads((workdir / "evaluations/test/metrics.json").read_text())["split"] == "test"
    assert (workdir / "metrics.json").read_bytes() == before
    assert run_command(evaluate_command.main, ["--run", str(workdir), "--split", "test", "--data", "x"]) == 2
    for path in list(pictures.glob("*.jpg")):  # the same images under other names, and so in another order
        path.rename(path.with_name(path.name.replace(".", f".x{9 - int(path.stem[-1])}", 1)))
    assert run_command(evaluate_command.main, ["--run", str(workdir)]) == 0
    assert len({r["path"] for r in csv.DictReader((workdir / "predictions.csv").open())} & judged) == 0
    assert json.loads((workdir / "metrics.json").read_text())["errors"] == json.loads(before)["errors"]
    assert (
        run(*BASE, "--data.root", pictures, "--workdir", workdir, *rule, "--data.test_fraction", "0.2", "--resume") == 2
    )
    assert "the images have changed since this run was started" in capsys.readouterr().err
    seeded = [*rule, "--data.test_fraction", "0.2", "--seed", "1", "--data.manifest", tmp_path / "split.json"]
    for name, more in (("a", []), ("b", ["--seed", "2"])):  # one split, whatever the training's seed
        assert run(*BASE, "--data.root", pictures, "--workdir", tmp_path / name, *seeded, *more) == 0
    same = [{r["path"] for r in csv.DictReader((tmp_path / n / "predictions.csv").open())} for n in "ab"]
    assert same[0] == same[1]
    changed = ["--data.test_fraction", "0.3", "--resume"]
    assert run(*BASE, "--data.root", pictures, "--workdir", workdir, *rule, *changed) == 2
    assert "data.test_fraction: 0.2 -> 0.3" in capsys.readouterr().err


def test_a_run_on_a_grown_folder_outlives_the_cache(tmp_path, monkeypatch, capsys):
    """Old images keep their sides as others come; which these are can't be found out again from the images alone."""
    root = tmp_path / "photos"
    write_images(tmp_path / "a", train=16, valid=16)
    (tmp_path / "a" / "train").rename(root)
    argv = [*BASE, "--data.root", root, "--data.valid_fraction", 0.3, "--phases.head.epochs", 1]
    assert run(*argv, "--workdir", tmp_path / "first") == 0
    for picture in sorted((tmp_path / "a" / "valid").glob("*/*")):
        picture.rename(root / picture.parent.name / f"new-{picture.name}")
    assert run(*argv, "--workdir", tmp_path / "second") == 0
    before = (tmp_path / "second" / "predictions.csv").read_bytes()
    monkeypatch.setenv("JAXCATS_CACHE", str(tmp_path / "elsewhere"))
    assert run("--resume", "--workdir", tmp_path / "second") == 0
    assert (tmp_path / "second" / "predictions.csv").read_bytes() == before
    shutil.rmtree(tmp_path / "elsewhere")
    assert run(*argv, "--workdir", tmp_path / "third") == 0  # split afresh, for want of anything else
    assert (tmp_path / "third" / "predictions.csv").read_bytes() != before
    assert run_command(evaluate_command.main, ["--run", str(tmp_path / "second")]) == 0
    assert run("--resume", "--workdir", tmp_path / "second") == 0
    assert run_command(evaluate_command.main, ["--run", str(tmp_path / "second")]) == 0
    assert (tmp_path / "second" / "predictions.csv").read_bytes() == before


def test_another_fraction_after_a_start_that_failed_is_split_anew(pictures, tmp_path):
    (tmp_path / "root").mkdir()
    for kind in ("cats", "dogs"):
        (pictures / "train" / kind).rename(tmp_path / "root" / kind)
    argv = [*BASE, "--data.root", tmp_path / "root", "--workdir", tmp_path / "run", "--phases.head.epochs", 1]
    assert run(*argv, "--data.valid_fraction", 0.2, "--phases.head.lr", 1e38) == 1
    assert (tmp_path / "run" / "split.json").exists()
    assert run(*argv, "--data.valid_fraction", 0.4) == 0
    assert json.loads((tmp_path / "run" / "split.json").read_text())["fraction"] == 0.4


def test_resume_refuses_a_changed_training_field_by_name(pictures, tmp_path, capsys):
    workdir = tmp_path / "run"
    argv = [*BASE, "--data.root", pictures, "--workdir", workdir]
    assert run(*argv) == 0
    assert run("--workdir", workdir, "--resume", "--phases.head.lr", "0.5") == 2
    assert "phases.head.lr: 0.01 -> 0.5" in capsys.readouterr().err
    assert run("--workdir", workdir, "--resume", "--data.workers", "1") == 0
    assert run(*argv) == 2
    assert "--resume" in capsys.readouterr().err
    next((pictures / "train" / "cats").iterdir()).unlink()
    assert run("--workdir", workdir, "--resume") == 2
    assert "images have changed" in capsys.readouterr().err


def test_a_loss_that_is_not_a_number_ends_the_run_with_the_step(pictures, tmp_path, capsys):
    argv = [*BASE, "--data.root", pictures, "--workdir", tmp_path / "run", "--phases.head.lr", "1e30"]
    assert run(*argv) == 1
    message = capsys.readouterr().err
    assert "step" in message
    assert "lower learning rate (phases.head.lr" in message
