"""Data sets of TFDS as folders, from TFDS's own mock data; stopped half-way and resumed."""

import contextlib
import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcats.common.cli import run_command
from jaxcats.data.index import scan

SCRIPTS = Path(__file__).parents[1] / "scripts"
DATA = {"cats_vs_dogs": ["train"], "oxford_iiit_pet": ["train", "test"], "imagenette/320px": ["train", "validation"]}
PROGRAM = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import prepare_data
import tensorflow_datasets as tfds
from jaxcats.common.cli import run_command

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
with tfds.testing.mock_data(num_examples={n}, data_dir=sys.argv[sys.argv.index('--data_dir') + 1]):
    sys.exit(run_command(prepare_data.main))
"""


class Killed(BaseException):
    """In place of SIGKILL, where it is tried at many moments: a process for each would take minutes."""


@pytest.fixture(scope="module")
def module():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import prepare_data
    finally:
        sys.path.remove(str(SCRIPTS))
    return prepare_data


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """What TFDS writes down of prepared data sets: the mock data has their splits only from there."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    for name, splits in DATA.items():
        builder = tfds.builder(name, data_dir=str(folder))
        known = [tfds.core.SplitInfo(name=split, shard_lengths=[40], num_bytes=1) for split in splits]
        builder.info.set_splits(tfds.core.splits.SplitDict(known))
        Path(builder.data_dir).mkdir(parents=True)
        builder.info.write_to_directory(builder.data_dir)
    return folder


@pytest.fixture
def prepare(module, data_dir, capfd):
    """The command in this process: its exit code and what it wrote on stdout and stderr."""
    import tensorflow_datasets as tfds

    def run(*argv: object, n: int = 40) -> tuple[int, str, str]:
        capfd.readouterr()
        with tfds.testing.mock_data(num_examples=n, data_dir=str(data_dir)):
            code = run_command(module.main, [*map(str, argv), "--data_dir", str(data_dir)])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def mistake(prepare):
    """The line that tells of a mistake."""

    def run(*argv: object, n: int = 40) -> str:
        code, _, err = prepare(*argv, n=n)
        assert code == 2
        assert "Traceback" not in err
        return err.splitlines()[-1]

    return run


def files(root: Path) -> dict[str, str]:
    found = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def facts(root: Path) -> dict:
    return json.loads((root / "prepared.json").read_text())


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("cats_vs_dogs", ["--valid", 10], {"train": 30, "valid": 10}),
        ("oxford_iiit_pet", [], {"train": 40, "valid": 40}),
        ("imagenette/320px", [], {"train": 40, "valid": 40}),
    ],
)
def test_a_data_set_becomes_a_folder(name, options, counts, prepare, mistake, tmp_path):
    out = tmp_path / "out"
    code, said, err = prepare(name, "--out", out, *options)
    assert code == 0, err
    assert facts(out)["complete"]
    assert facts(out)["counts"] == counts
    assert facts(out)["settings"]["splits"] == DATA[name]
    if name == "cats_vs_dogs":
        assert "leaves out 1,738 corrupt images" in said
        index = scan(out, cache_dir=tmp_path / "cache")
        assert index.classes == ("cat", "dog")
        assert {name: len(split) for name, split in index.splits.items()} == counts
        assert not index.bad
    (out / "mine.txt").touch()
    before = files(out)
    assert "complete already" in prepare(name, "--out", out, *options, "--splits", *reversed(DATA[name]))[1]
    assert "was begun with" in mistake(name, "--out", out, *options, "--seed", 1)
    if len(DATA[name]) > 1:
        assert "was begun with" in mistake(name, "--out", out, *options, "--splits", "train")
    assert files(out) == before


@pytest.mark.parametrize(
    "name", ["cats_vs_dogs", *(pytest.param(n, marks=pytest.mark.slow) for n in DATA if n != "cats_vs_dogs")]
)
def test_killed_half_way_and_resumed_is_the_same_folder(name, prepare, data_dir, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--valid", "10"] if DATA[name] == ["train"] else []
    assert prepare(name, "--out", whole, *options)[0] == 0
    code = PROGRAM.format(scripts=str(SCRIPTS), left=23, n=40)
    argv = [name, "--out", str(killed), *options, "--data_dir", str(data_dir)]
    env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, env=env)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not facts(killed)["complete"]
    assert 20 < len(files(killed)) < len(files(whole))
    assert prepare(name, "--out", killed, *options)[0] == 0
    assert files(killed) == files(whole)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_the_same_folder(prepare, tmp_path, monkeypatch):
    """Begun with settings that can't be, and with others that can: marker, split, 8 images and the marker again."""
    whole = tmp_path / "whole"
    good = ["--seed", 1, "--valid", 3]
    assert prepare("cats_vs_dogs", "--out", whole, *good, n=8)[0] == 0
    renamed = os.replace

    def die(left: int, *, after: bool):
        def replace(source, target):
            nonlocal left
            left -= 1
            if left == 0:
                if after:
                    renamed(source, target)
                else:
                    shutil.copy(source, f"{str(source)[:-4]}9.tmp")  # as left by a process that is no more
                raise Killed
            renamed(source, target)

        return replace

    for moment in range(1, 14):
        for after in (False, True):
            killed = tmp_path / f"{moment}{after}"
            with monkeypatch.context() as patch, contextlib.suppress(Killed):
                patch.setattr(os, "replace", die(moment, after=after))
                prepare("cats_vs_dogs", "--out", killed, n=8)  # 2,000 of 8
                prepare("cats_vs_dogs", "--out", killed, *good, n=8)
            assert (files(killed) == files(whole)) == (moment == 13 or (moment == 12 and after))
            code, _, err = prepare("cats_vs_dogs", "--out", killed, *good, n=8)
            assert code == 0, (moment, after, err)
            assert files(killed) == files(whole), (moment, after)


def test_settings_that_cannot_be_are_not_kept(prepare, mistake, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert prepare("cats_vs_dogs", "--out", whole, "--valid", 5, n=20)[0] == 0
    assert mistake("cats_vs_dogs", "--out", out, n=20) == "error: --valid 2000: can't be held out of 20 images."
    # Killed after it held out, and before the first image.
    (out / "split.json").write_text('{"version": 1, "fraction": 0.5, "seed": 0, "sides": {}}')
    (out / ".split.json.1.tmp").write_text("{")
    code, _, err = prepare("cats_vs_dogs", "--out", out, "--valid", 5, n=20)
    assert code == 0, err
    assert files(out) == files(whole)
    # An image, or anything else, keeps them.
    assert mistake("cats_vs_dogs", "--out", tmp_path / "other", n=20)
    (tmp_path / "other" / "mine.txt").touch()
    assert "was begun with" in mistake("cats_vs_dogs", "--out", tmp_path / "other", "--valid", 5, n=20)


def test_killed_while_it_wrote_the_first_file_is_an_empty_folder(prepare, tmp_path):
    (tmp_path / ".prepared.json.1.tmp").write_text("{")
    assert prepare("oxford_iiit_pet", "--out", tmp_path)[0] == 0
    assert not (tmp_path / ".prepared.json.1.tmp").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cats_vs_dogs", ["--splits", "nope"], "--splits: 'nope' is not one of train."),
        ("oxford_iiit_pet", ["--splits", "train", "tset"], "--splits: 'tset' is not one of train, test. Did you mean 'test'?"),
        ("oxford_iiit_pet", ["--splits", "test"], "--splits test: has to have train among them."),
        ("cats_vs_dogs", ["--valid", 0], "--valid 0: one image at least has to be held out."),
        ("imagenette/320px", ["--valid", -1], "--valid -1: one image at least has to be held out."),
        ("cats_vs_dogs", ["--valid", 40], "--valid 40: can't be held out of 40 images."),
        ("cats_vs_dogs", ["--valid", "ten"], "--valid: expected a whole number, got 'ten'."),
        ("cats_vs_dogs", ["--vlid", 5], "--vlid: there is no such option. Did you mean '--valid'?"),
        ("cats_vs_dog", [], "cats_vs_dog: TFDS has no such data set. Did you mean 'cats_vs_dogs'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(name, options, message, mistake, tmp_path):
    assert mistake(name, "--out", tmp_path / "new", *options) == f"error: {message}"


def test_what_tfds_cannot_open_is_said(mistake, tmp_path):
    for name in ("cats_vs_dogs/nope", "cats_vs_dogs:9.9.9", "cats_vs_dogs/a=b", "cats_vs_dogs/"):
        said = mistake(name, "--out", tmp_path / "new")
        assert said.startswith(f"error: {name}: TFDS can't open it (")
    assert not (tmp_path / "new").exists()


def test_what_tfds_cannot_prepare_is_said(module, capfd, tmp_path):
    (tmp_path / "mine.txt").touch()
    argv = ["cats_vs_dogs", "--out", str(tmp_path / "new"), "--data_dir", str(tmp_path / "mine.txt")]
    assert run_command(module.main, argv) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: cats_vs_dogs: TFDS can't prepare it (")


def test_a_folder_that_cannot_be_is_said(mistake, tmp_path):
    (tmp_path / "mine.txt").touch()
    for out in (tmp_path, tmp_path / "mine.txt"):
        said = mistake("cats_vs_dogs", "--out", out)
        assert said == f"error: {out}: holds something else; give a new or an empty folder."


def test_the_script_itself_says_it_in_one_line(data_dir, capfd, monkeypatch):
    import tensorflow_datasets as tfds

    script = str(SCRIPTS / "prepare_data.py")
    monkeypatch.setattr(sys, "argv", [script, "cats_vs_dogs", "--out", "/proc/x", "--data_dir", str(data_dir)])
    with tfds.testing.mock_data(data_dir=str(data_dir)), pytest.raises(SystemExit) as left:
        runpy.run_path(script, run_name="__main__")
    assert left.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: /proc/x: ")


def test_the_keyboard_stops_it_in_one_line_and_it_goes_on(module, prepare, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = module.write_bytes

    def interrupted(path, data):
        if path.name.endswith("000009.jpg"):
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_bytes", interrupted)
        code, _, err = prepare("imagenette/320px", "--out", out)
    assert (code, err.splitlines()[-1]) == (130, "stopped by the keyboard; the same command goes on.")
    assert not facts(out)["complete"]
    assert prepare("imagenette/320px", "--out", out)[0] == 0
    assert facts(out)["complete"]
