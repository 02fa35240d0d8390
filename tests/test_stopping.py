"""A run that is asked to end, a run folder that two want, and files that are links or devices."""

import errno
import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny  # noqa: F401
from folders import write_images

from jaxcats.common import io
from jaxcats.common.cli import run_command
from jaxcats.common.errors import UserError
from jaxcats.common.io import write_text
from jaxcats.common.signals import Stopped, Stopping
from jaxcats.train import __main__ as train_command
from jaxcats.train import loop

CONFIG = """
report: false
export: false
model: {backbone: tiny, pretrained: false, head: linear}
data: {size: 32}
checkpoint: {every_epochs: 100}
phases:
  all: {epochs: 40, lr: 1.0e-3, freeze: nothing, bn: train, augment: flip, batch_size: 8}
"""
PROGRAM = (
    "import sys, tiny; from jaxcats.common.cli import run_command; from jaxcats.train.__main__ import main; "
    "sys.exit(run_command(main, sys.argv[1:]))"
)


@pytest.fixture
def place(tmp_path, own_cache) -> Path:
    write_images(tmp_path / "photos", train=32, valid=10)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


def start(place: Path, name: str, *flags: str) -> subprocess.Popen:
    words = ["--config", place / "c.yaml", "--data.root", place / "photos", "--workdir", place / name, *flags]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until_training(place: Path, name: str, child: subprocess.Popen) -> None:
    log, deadline = place / name / "metrics.jsonl", time.monotonic() + 100
    while not (log.exists() and log.stat().st_size):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "driver"), [(signal.SIGTERM, "scan"), (signal.SIGINT, "stream")])
def test_a_run_asked_to_end_saves_says_how_to_go_on_and_goes_on_to_the_bit(place, signum, driver):
    how = "--phases.all.driver", driver
    first = start(place, "run", *how)
    until_training(place, "run", first)
    with pytest.raises(UserError, match=f"process {first.pid} on .* is training in it now"):
        io.lock_folder(place / "run")
    first.send_signal(signum)
    said = first.communicate(timeout=100)[1]
    assert first.returncode == 128 + signum, said
    assert "which is saved." in said
    assert f"To continue from the last checkpoint: python -m jaxcats.train --resume --workdir {place / 'run'}" in said
    assert "Traceback" not in said
    again = start(place, "run", "--resume", *how)
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    assert "Resuming at step" in out
    whole = start(place, "whole", *how)
    assert "errors of" in whole.communicate(timeout=200)[0]
    assert (place / "run" / "predictions.csv").read_bytes() == (place / "whole" / "predictions.csv").read_bytes()
    assert losses(place / "run") == losses(place / "whole")


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in rows if "loss" in r]


def evaluations(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["step"] for r in rows if "valid_loss" in r]


def test_a_second_signal_or_one_outside_the_steps_ends_at_once():
    stopping = Stopping()
    before = signal.getsignal(signal.SIGTERM)
    with stopping.listen():
        with pytest.raises(Stopped) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == 143
    stopping = Stopping()
    with stopping.listen(), stopping.patient():
        assert not stopping.asked()
        signal.raise_signal(signal.SIGINT)
        assert stopping.asked()
        assert "step 7, which is saved" in str(stopping.leave(7))
        with pytest.raises(Stopped, match="by the keyboard"):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_where_python_would_lose_the_exception_it_comes_a_moment_later(tmp_path, monkeypatch):
    """In a finaliser it would be swallowed; in an import it may come out as an ImportError, with the module half there."""

    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    (tmp_path / "struck.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    stopping = Stopping()
    with stopping.listen():
        for strike in (lambda: Dying(), lambda: importlib.import_module("struck")):
            with pytest.raises(Stopped):  # noqa: PT012  it is the wait that it breaks off
                strike()
                time.sleep(60)
    assert sys.modules["struck"].whole
    stopping.signum = signal.SIGTERM  # where a library has swallowed it all the same, the next safe place raises it
    with pytest.raises(Stopped), stopping.patient():
        pass


@pytest.mark.parametrize(
    ("strike", "nth", "step", "signum", "every"),
    [
        ("evaluate", 2, 8, signal.SIGTERM, 100),
        ("evaluate", 2, 8, signal.SIGTERM, 1),  # with a checkpoint due at that very step, after the evaluation
        ("evaluate", 3, 12, signal.SIGINT, 2),  # likewise, as at the end of every phase
        ("read", 5, 6, signal.SIGTERM, 100),
        ("read", 5, 6, signal.SIGINT, 100),
    ],
)
def test_struck_in_a_step_or_an_evaluation_it_goes_on_to_the_bit(
    place, monkeypatch, capsys, strike, nth, step, signum, every
):
    """The steps of an epoch are saved before an evaluation, so that it can't outlast the time that a machine leaves."""
    words = ["--config", place / "c.yaml", "--data.root", place / "photos", "--phases.all.epochs", "3"]
    words += ["--checkpoint.every_epochs", every]

    def command(name: str, *more: str) -> int:
        return run_command(train_command.main, [str(w) for w in (*words, "--workdir", place / name, *more)])

    owner, name = (loop, "evaluate_split") if strike == "evaluate" else (loop.TrainingLoop, "log_step_metrics")
    whole, calls = getattr(owner, name), []

    def struck(*arguments, **options):
        calls.append(None)
        if len(calls) == nth:
            signal.raise_signal(signum)
        return whole(*arguments, **options)

    assert command("whole") == 0
    monkeypatch.setattr(owner, name, struck)
    assert command("run") == 128 + signum
    said = capsys.readouterr().err
    assert f"stopped as asked, at step {step}, which is saved." in said
    assert f"To continue from the last checkpoint: python -m jaxcats.train --resume --workdir {place / 'run'}" in said
    if strike == "evaluate":  # which is where it goes on, and is struck once more
        nth = len(calls) + 1
        assert command("run", "--resume") == 128 + signum
        assert f"stopped as asked, at step {step}, which is saved." in capsys.readouterr().err
    monkeypatch.setattr(owner, name, whole)
    assert command("run", "--resume") == 0
    assert f"Resuming at step {step} (epoch {(step - 1) // 4})" in capsys.readouterr().out
    assert (place / "run" / "predictions.csv").read_bytes() == (place / "whole" / "predictions.csv").read_bytes()
    assert losses(place / "run") == losses(place / "whole")
    assert evaluations(place / "run") == evaluations(place / "whole") == [4, 8, 12]


def test_before_the_first_checkpoint_it_says_so(place, monkeypatch, capsys):
    monkeypatch.setattr(loop, "initial_params", lambda setup: signal.raise_signal(signal.SIGTERM))
    words = ["--config", place / "c.yaml", "--data.root", place / "photos", "--workdir", place / "run"]
    assert run_command(train_command.main, [str(w) for w in words]) == 143
    assert f"To start again: python -m jaxcats.train --resume --workdir {place / 'run'}" in capsys.readouterr().err


def test_a_folder_is_one_process_s_and_free_when_it_ends(tmp_path):
    with (tmp_path / io.LOCK).open("w+") as other:
        other.write("process 7 on elsewhere")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="process 7 on elsewhere is training in it now"):
            io.lock_folder(tmp_path)
    program = f"import pathlib, signal, jaxcats.common.io as io; io.lock_folder(pathlib.Path({str(tmp_path)!r})); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline()
        for _ in range(2):
            with pytest.raises(UserError, match=f"process {child.pid} on .* is training in it now"):
                io.lock_folder(tmp_path)
        child.kill()
    io.lock_folder(tmp_path)
    io.lock_folder(tmp_path)  # this process's own
    io.unlock_folder(tmp_path)


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    io.lock_folder(tmp_path)
    io.unlock_folder(tmp_path)


def test_links_stay_links_and_devices_stay_devices(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "there" / "a.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "there" / "a.txt").read_text() == "new"
    write_text(Path(os.devnull), "gone")
    assert not Path(os.devnull).is_file()
