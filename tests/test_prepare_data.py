"""Data sets of TFDS as folders, from TFDS's own mock data; stopped half-way and resumed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcats.data.index import scan

SCRIPTS = Path(__file__).parents[1] / "scripts"
PROGRAM = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import prepare_data
import tensorflow_datasets as tfds

write, left = prepare_data.write_bytes, {left}

def write_and_die(path, data):
    global left
    left -= 1
    if left == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / f".{{path.name}}.1.tmp").write_bytes(data[:9])  # half of it
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)

prepare_data.write_bytes = write_and_die
with tfds.testing.mock_data(num_examples={n}):
    sys.exit(prepare_data.main(sys.argv[1:]))
"""


def prepare(*argv: object, left: int = -1, n: int = 40) -> subprocess.CompletedProcess:
    code = PROGRAM.format(scripts=str(SCRIPTS), left=left, n=n)
    env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    return subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, env=env)


def files(root: Path) -> dict[str, str]:
    found = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.mark.parametrize(
    ("name", "splits", "counts"),
    [
        ("cats_vs_dogs", ["--valid", 10, "--splits", "train"], {"train": 30, "valid": 10}),
        pytest.param("oxford_iiit_pet", ["--splits", "train", "test"], {"train": 40, "valid": 40}, marks=pytest.mark.slow),
        pytest.param("imagenette/320px", ["--splits", "train", "validation"], {"train": 40, "valid": 40}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_data_set_killed_half_way_and_resumed_is_the_same_folder(name, splits, counts, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = prepare(name, "--out", whole, *splits)
    assert done.returncode == 0, done.stderr
    facts = json.loads((whole / "prepared.json").read_text())
    assert facts["complete"]
    assert facts["counts"] == counts
    assert prepare(name, "--out", killed, *splits, left=23).returncode == -signal.SIGKILL
    assert not json.loads((killed / "prepared.json").read_text())["complete"]
    assert 20 < len(files(killed)) < len(files(whole))
    done = prepare(name, "--out", killed, *splits)
    assert done.returncode == 0, done.stderr
    assert files(killed) == files(whole)
    if name == "cats_vs_dogs":
        assert "leaves out 1,738 corrupt pictures" in done.stdout
        index = scan(whole, cache_dir=tmp_path / "cache")
        assert index.classes == ("cat", "dog")
        assert {name: len(split) for name, split in index.splits.items()} == counts
        assert not index.bad
    else:
        (whole / "mine.txt").touch()
        assert "complete already" in prepare(name, "--out", whole, *splits).stdout
        assert "was begun with" in prepare(name, "--out", whole, *splits, "--seed", 1).stderr
        assert (whole / "mine.txt").exists()


def test_what_cannot_be_is_said(tmp_path):
    (tmp_path / "mine.txt").touch()
    done = prepare("cats_vs_dogs", "--out", tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        f"error: {tmp_path}: holds something else; give a new or an empty folder.",
    )
    done = prepare("cats_vs_dog", "--out", tmp_path / "new")
    assert done.returncode == 2
    assert "no such data set. Did you mean 'cats_vs_dogs'?" in done.stderr
