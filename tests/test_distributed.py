"""One answer on one device, on several, and in several processes; and what happens when one of them dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from folders import write_images

from jaxcats.common import distributed
from jaxcats.common.config import Config, DistributedConfig, validate
from jaxcats.common.errors import UserError

CONFIG = """
report: false
model: {backbone: tiny, pretrained: false, head: linear}
data: {size: 32}
phases:
  head: {epochs: 1, precompute: true, batch_size: 8}
  all: {epochs: 1, lr: [1.0e-5, 1.0e-4, 1.0e-3], freeze: nothing, bn: train, augment: side_on, batch_size: 8}
"""
PROGRAM = (
    "import sys, tiny; from jaxcats.common.cli import run_command; from jaxcats.train.__main__ import main; "
    "sys.exit(run_command(main, sys.argv[1:]))"
)


@pytest.fixture
def place(tmp_path, own_cache) -> Path:
    write_images(tmp_path / "photos", train=32, valid=22)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


def start(place: Path, name: str, *flags: object, devices: int = 1, before: str = "") -> subprocess.Popen:
    words = ["--config", place / "c.yaml", "--data.root", place / "photos", "--workdir", place / name, *flags]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, "-c", before + PROGRAM, *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(*children: subprocess.Popen, seconds: float = 200) -> list[str]:
    said = [child.communicate(timeout=seconds)[0] for child in children]
    assert all(child.returncode == 0 for child in children), said
    return said


def at_a_free_port(n: int) -> list[object]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.num_processes", n]


def together(place: Path, name: str, n: int, *flags: object) -> list[subprocess.Popen]:
    shared = at_a_free_port(n)
    return [start(place, name, *flags, *shared, "--distributed.process_id", i) for i in range(n)]


def same(place: Path, one: str, other: str) -> None:
    from safetensors.numpy import load_file

    a, b = (load_file(place / name / "model" / "model.safetensors") for name in (one, other))
    for key in a.keys() - {"temperature"}:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-5, atol=1e-5, err_msg=key)
    rows = [(place / name / "predictions.csv").read_text().splitlines() for name in (one, other)]
    assert [r.split(",")[:3] for r in rows[0]] == [r.split(",")[:3] for r in rows[1]]
    assert len(rows[0]) == 23  # every validation image once, and the head


@pytest.mark.slow
def test_two_devices_give_the_answer_of_one(place):
    ended(start(place, "one"))
    ended(start(place, "two", devices=2))
    same(place, "one", "two")


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_several_processes_give_the_answer_of_one_and_only_the_first_speaks(place, n):
    ended(start(place, "one"))
    first, *others = ended(*together(place, "many", n))
    same(place, "one", "many")
    assert "Results:" in first
    assert not any("Results:" in said or "epoch" in said for said in others)


def first_checkpoint(run: Path) -> None:
    deadline = time.monotonic() + 120
    while not any(p.name.isdigit() for p in run.glob("checkpoints/*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


LONG = ("--phases.all.epochs", 30)


@pytest.mark.slow
def test_what_two_processes_began_one_goes_on_with(place):
    ended(start(place, "one", *LONG))
    children = together(place, "many", 2, *LONG)
    first_checkpoint(place / "many")
    for child in children:
        child.kill()
        child.communicate()
    (said,) = ended(start(place, "many", *LONG, "--resume"))
    assert "Resuming at step" in said
    same(place, "one", "many")


@pytest.mark.slow
def test_when_one_dies_the_others_end_within_a_minute_and_all_resume(place):
    ended(start(place, "one", *LONG))
    children = together(place, "many", 4, *LONG)
    first_checkpoint(place / "many")
    children[2].send_signal(signal.SIGKILL)
    for child in children:
        child.communicate(timeout=60)
        assert child.returncode != 0
    ended(*together(place, "many", 4, *LONG, "--resume"))
    same(place, "one", "many")


@pytest.mark.slow
def test_one_that_is_asked_to_end_has_all_save_the_same_step_and_leave(place):
    often = (*LONG, "--checkpoint.every_epochs", 100)
    ended(start(place, "one", *often))
    children = together(place, "many", 2, *often)
    first_checkpoint(place / "many")  # of the first phase
    children[1].send_signal(signal.SIGTERM)
    said = [child.communicate(timeout=100)[0] for child in children]
    assert [child.returncode for child in children] == [143, 143], said
    assert all("which is saved" in words for words in said)
    (said,) = ended(start(place, "many", *often, "--resume"))
    assert "Resuming at step" in said
    same(place, "one", "many")


CTRL_C_IN_THE_SECOND_EVALUATION = """
import signal, tiny
from jaxcats.train import loop
whole, calls = loop.evaluate_split, []
def struck(*arguments, **options):
    calls.append(None)
    if len(calls) == 2:
        signal.raise_signal(signal.SIGINT)
    return whole(*arguments, **options)
loop.evaluate_split = struck
"""


@pytest.mark.slow
def test_ctrl_c_at_one_during_an_evaluation_ends_it_at_once_and_all_resume(place):
    """It must not begin a checkpoint: the others know of nothing, and it would wait for them for minutes."""
    two_epochs = ("--phases.all.epochs", 2)
    ended(start(place, "one", *two_epochs))
    shared = at_a_free_port(2)
    children = [
        start(place, "many", *two_epochs, *shared, "--distributed.process_id", i, before=before)
        for i, before in enumerate(("", CTRL_C_IN_THE_SECOND_EVALUATION))
    ]
    said = [child.communicate(timeout=100)[0] for child in reversed(children)]
    assert children[1].returncode == 130, said
    assert children[0].returncode != 0, said
    assert "Traceback" not in said[0]
    ended(*together(place, "many", 2, *two_epochs, "--resume"))
    same(place, "one", "many")


def refused(*children: subprocess.Popen) -> list[str]:
    """The errors of processes that all end with 2, and none of them with anything but its one line."""
    said = [child.communicate(timeout=100)[0] for child in children]
    assert [child.returncode for child in children] == [2] * len(children), said
    return [next(line for line in words.splitlines() if line.startswith("error: ")) for words in said]


def apart(place: Path, name: str, ours: tuple, theirs: tuple) -> list[subprocess.Popen]:
    """Two processes with flags of their own."""
    shared = at_a_free_port(2)
    return [
        start(place, name, *flags, *shared, "--distributed.process_id", i) for i, flags in enumerate((ours, theirs))
    ]


def test_processes_with_other_settings_are_refused_before_anything_is_made(place):
    for line in refused(*apart(place, "many", (), ("--phases.all.lr", "0.5"))):
        assert (
            line
            == "error: The settings or the versions of process 1 differ from those of process 0; all must have the same."
        )
    assert not (place / "many").exists()


@pytest.mark.slow
def test_processes_with_other_images_are_refused(place):
    write_images(place / "fewer", train=30, valid=22)
    for line in refused(*apart(place, "many", (), ("--data.root", place / "fewer"))):
        assert "The images or the precision of process 1 differ" in line


@pytest.mark.slow
def test_one_that_cannot_start_stops_the_others(place):
    first, second = refused(*apart(place, "many", (), ("--data.root", place / "nowhere")))
    assert first == "error: Process 1 has stopped; its own output gives the reason."
    assert "no such folder" in second


def settings(**given):
    return DistributedConfig(**given)


def test_half_of_the_settings_and_a_number_out_of_range_are_said():
    with pytest.raises(UserError, match="belong together"):
        distributed.start(settings(coordinator="a:1"))
    with pytest.raises(UserError, match="process_id: 2 can't be used"):
        distributed.start(settings(coordinator="a:1", num_processes=2, process_id=2))
    with pytest.raises(UserError, match="num_processes: 0 can't be used; expected at least 1"):
        validate(Config(distributed=settings(coordinator="a:1", num_processes=0, process_id=0)))
    for wrong in ("nonsense", "a:", ":1", "a:b", "a:99999"):
        with pytest.raises(UserError, match=f"coordinator: '{wrong}' can't be used; expected HOST:PORT"):
            validate(Config(distributed=settings(coordinator=wrong, num_processes=2, process_id=0)))


def test_alone_nothing_is_started(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    distributed.start(settings())
    assert distributed.is_primary()
    assert not distributed.is_multiprocess()
