"""The commands as a new user meets them: a slip is one line that names the thing and the way out, and exit code 2."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny  # noqa: F401
from PIL import Image

from jaxcats.common import cli
from jaxcats.common.cli import from_file, run_command
from jaxcats.common.config import Phase
from jaxcats.evaluate import __main__ as evaluate_command
from jaxcats.evaluate import predictions
from jaxcats.evaluate import run as run_module
from jaxcats.export import __main__ as export_command
from jaxcats.train import __main__ as train_command

TINY = [
    "--model.backbone",
    "tiny",
    "--model.pretrained",
    "false",
    "--model.head",
    "linear",
    "--data.size",
    "32",
    "--phases.head.batch_size",
    "4",
    "--phases.head.epochs",
    "1",
    "--report",
    "false",
    "--export",
    "false",
]


def write_images(root: Path, *, train: int, valid: int, classes=("cats", "dogs")) -> Path:
    """Writes `train` and `valid` images in all, spread over the classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("valid", valid)):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count // len(classes)):
                Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory, compiled) -> Path:
    """One cache folder for the runs of this file."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "xla").symlink_to(compiled)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache) -> Path:
    """A trained run with its images beside it, for `run_folder` to copy."""
    top = tmp_path_factory.mktemp("trained")
    write_images(top / "pictures", train=8, valid=4)
    argv = [*TINY, "--data.root", top / "pictures", "--workdir", top / "run", "--cache_dir", cache]
    assert run_command(train_command.main, [str(a) for a in argv]) == 0
    return top / "run"


@pytest.fixture
def run(cache, pictures, tmp_path):
    """run(*argv): trains on `images`, which must succeed; the run folder."""

    def do(*argv, workdir=None) -> Path:
        workdir = workdir or tmp_path / "run"
        argv = [*TINY, "--data.root", pictures, "--workdir", workdir, "--cache_dir", cache, *argv]
        assert run_command(train_command.main, [str(a) for a in argv]) == 0
        return workdir

    return do


@pytest.fixture
def run_folder(trained, tmp_path) -> Path:
    """The test's own copy of a trained run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def mistake(capfd, tmp_path, monkeypatch):
    """mistake(command, *argv): the one line of a user's mistake, without its "error: ".

    The current folder is a fresh one, so that a default run folder lands there.
    """
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(command, *argv) -> str:
        capfd.readouterr()
        code = run_command(command.main, [str(a) for a in argv])
        err = capfd.readouterr().err
        assert code == 2, err
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return run


def said(message: str, *words: object) -> None:
    for word in words:
        assert str(word) in message


# --- the images ---


def test_a_missing_folder(mistake, tmp_path):
    said(
        mistake(train_command, *TINY, "--data.root", tmp_path / "absent"),
        tmp_path / "absent",
        "no such folder",
        "give the folder",
    )


def test_a_folder_without_train_and_valid(mistake, pictures):
    said(
        mistake(train_command, *TINY, "--data.root", pictures / "train"),
        pictures / "train",
        "train/",
        "valid/",
        "valid_fraction",
    )


def test_no_class_folders(mistake, pictures):
    loose = pictures / "train"
    for image in list(loose.glob("*/*.jpg")):
        image.rename(loose / image.name)
    for folder in list(loose.iterdir()):
        if folder.is_dir():
            folder.rmdir()
    said(
        mistake(train_command, *TINY, "--data.root", pictures),
        loose,
        "24 images but no class folders",
        "cats/ and dogs/",
    )


def test_an_empty_class(mistake, pictures):
    shutil.rmtree(pictures / "valid" / "dogs")
    (pictures / "valid" / "dogs").mkdir()
    said(
        mistake(train_command, *TINY, "--data.root", pictures),
        pictures / "valid" / "dogs",
        "no images",
        "add some, or remove",
    )


def test_one_class(mistake, tmp_path):
    root = write_images(tmp_path / "one", train=4, valid=2, classes=("cats",))
    said(mistake(train_command, *TINY, "--data.root", root), root, "cats; a classifier needs at least two")


def test_a_corrupt_image_is_skipped_counted_and_named(run, pictures, capfd):
    cut = pictures / "valid" / "dogs" / "dogs.0.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    (pictures / "train" / "cats" / "text.png").write_text("no image")
    workdir = run()
    out = capfd.readouterr().out
    said(out, "24 training and 9 validation images", "skipped train/cats/text.png: ", "skipped valid/dogs/dogs.0.jpg: ")
    listed = json.loads((workdir / "bad_files.json").read_text())
    assert [b["path"] for b in listed] == ["train/cats/text.png", "valid/dogs/dogs.0.jpg"]
    assert all(b["reason"] for b in listed)
    found = json.loads((workdir / "metrics.json").read_text())
    assert (found["n"], found["bad_files"]) == (9, 2)
    assert cut.exists()


def test_a_corrupt_image_ends_the_run_when_it_should(mistake, pictures):
    (pictures / "train" / "cats" / "text.png").write_text("no image")
    message = mistake(train_command, *TINY, "--data.root", pictures, "--data.on_bad_file", "fail")
    said(message, "1 of 35", "train/cats/text.png", "on_bad_file to skip")


def test_a_name_with_a_line_break_stays_on_one_line(mistake, pictures):
    (pictures / "train" / "cats" / "two\nlines.png").write_text("no image")
    said(
        mistake(train_command, *TINY, "--data.root", pictures, "--data.on_bad_file", "fail"),
        "lines.png",
        "on_bad_file to skip",
    )


# --- the settings ---


WRONG = [
    (["--data.rot", "x"], ["--data.rot", "Did you mean '--data.root'"]),
    (["--phases.head.epochs", "many"], ["phases.head.epochs", "many"]),
    (["--data.size", "8"], ["data.size", "8", "32 to 2048"]),
    (["--model.backbone", "resnet35", "--data.root", "IMAGES"], ["resnet35", "resnet34"]),
    (
        ["--model.weights", "absent.pth", "--data.root", "IMAGES"],
        ["absent.pth", "does not exist", ".safetensors"],
    ),
    (
        ["--model.weights", "package:no_such_thing/a.pth", "--data.root", "IMAGES"],
        ["no_such_thing", "not installed"],
    ),
    (["--config", "absent.yaml"], ["absent.yaml", "No such file"]),
    (["--resume"], ["--resume", "--workdir"]),
    (["--resume", "--config", "c.yaml"], ["--resume", "--workdir"]),
    (["--resume", "--workdir", "absent"], ["--resume", "absent", "--config"]),
    (["--workdir"], ["--workdir"]),
]


@pytest.mark.parametrize(("argv", "words"), WRONG, ids=[" ".join(argv) for argv, _ in WRONG])
def test_wrong_settings(argv, words, mistake, pictures):
    Path("c.yaml").write_text("model: {backbone: tiny, pretrained: false}\n")
    argv = [str(pictures) if a == "IMAGES" else a for a in argv]
    said(
        mistake(train_command, *(["--model.backbone", "resnet18"] if "--model.weights" in argv else []), *argv), *words
    )


def test_a_file_that_is_not_yaml_at_all(mistake, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"seed: \0\1")
    said(mistake(train_command, "--config", file), file, "can't be read as YAML")


def test_a_run_folder_that_cannot_be_written(mistake, pictures, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("")
    for workdir in (taken, taken / "run"):
        said(
            mistake(train_command, *TINY, "--data.root", pictures, "--workdir", workdir),
            "--workdir",
            workdir,
            "can't be written",
        )
    assert taken.read_text() == ""


def test_a_folder_with_other_things_in_it_is_left_alone(mistake, pictures, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    said(
        mistake(train_command, *TINY, "--data.root", pictures, "--workdir", tmp_path / "other"),
        "not empty",
        "Name a new folder",
    )
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "slip", [["--data.root", "absent"], ["--model.pretrained", "true"]], ids=["pictures", "weights"]
)
def test_a_mended_slip_may_use_the_same_run_folder(slip, mistake, run, pictures, tmp_path):
    """Whoever mistypes something corrects it and presses return: nothing has been trained yet."""
    workdir = tmp_path / "run"
    mistake(train_command, *TINY, "--data.root", pictures, "--workdir", workdir, *slip)
    assert json.loads((run(workdir=workdir) / "metrics.json").read_text())["n"] == 10


def test_no_network_gives_the_three_ways_out_and_nothing_else(pictures, tmp_path):
    with socket.socket() as s:  # bound and never listening: connections are refused at once
        s.bind(("127.0.0.1", 0))
        env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{s.getsockname()[1]}", "HF_HOME": str(tmp_path / "hub")}
        env.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-m", "jaxcats.train", "--data.root", str(pictures), "--workdir", str(tmp_path / "run")],
            capture_output=True,
            text=True,
            env=env,
            timeout=120,
        )
    assert done.returncode == 1, done.stderr  # it may be there tomorrow
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("stopped: ")
    said(done.stderr, "resnet34", "model.weights", "efficientnet_lite0", "model.pretrained: false")


def test_a_cache_folder_that_cannot_be_written_costs_warnings_only(run, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    workdir = run("--cache_dir", tmp_path / "file" / "cache")  # under a file, because root may write into any folder
    err = capfd.readouterr().err
    assert "can't be written" in err
    assert "Traceback" not in err
    assert json.loads((workdir / "metrics.json").read_text())["n"] == 10


# --- evaluating ---


@pytest.mark.parametrize("kind", ["absent", "a file", "another folder"])
def test_evaluate_needs_a_run_folder(kind, mistake, tmp_path):
    run = tmp_path / "x"
    if kind == "a file":
        run.write_text("")
    elif kind == "another folder":
        run.mkdir()
    said(
        mistake(evaluate_command, "--run", run), f"--run {run}", "no config.yaml", "expected a folder that train wrote"
    )


def test_evaluate_says_which_flag_is_missing_or_unknown(mistake):
    said(mistake(evaluate_command), "run", "required")
    said(mistake(evaluate_command, "--runs", "x"), "--runs", "Did you mean '--run'")


def test_evaluate_on_other_classes(mistake, run_folder, tmp_path):
    other = write_images(tmp_path / "other", train=4, valid=2, classes=("cats", "horses"))
    message = mistake(evaluate_command, "--run", run_folder, "--data", other / "train")
    said(message, other / "train", "missing dogs", "unknown horses", "expected exactly cats, dogs")


def test_evaluate_on_nothing(mistake, run_folder, tmp_path):
    said(mistake(evaluate_command, "--run", run_folder, "--data", tmp_path / "absent"), "absent", "no such folder")
    (tmp_path / "empty").mkdir()
    said(mistake(evaluate_command, "--run", run_folder, "--data", tmp_path / "empty"), "empty", "no images")


def test_evaluate_where_it_cannot_write(mistake, run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    said(
        mistake(evaluate_command, "--run", run_folder, "--out", tmp_path / "file"),
        tmp_path / "file",
        "can't be written",
    )


def test_a_run_without_checkpoints(mistake, run_folder):
    shutil.rmtree(run_folder / "checkpoints")
    said(mistake(evaluate_command, "--run", run_folder), run_folder, "no checkpoint", "train")
    (run_folder / "checkpoints").mkdir()
    said(mistake(evaluate_command, "--run", run_folder), run_folder, "no complete checkpoint", "train")


def test_a_checkpoint_that_is_not_there(mistake, run_folder):
    said(mistake(evaluate_command, "--run", run_folder, "--checkpoint", "7"), "--checkpoint 7", "last, best", "2")


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in range(0, len(content), 100):
        content[at] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, alter, Path.unlink], ids=["cut", "altered", "gone"])
@pytest.mark.parametrize("part", ["state/ocdbt.process_0/d/*", "meta/metadata"])
def test_a_damaged_checkpoint(part, damage, mistake, run_folder):
    damage(max((run_folder / "checkpoints").glob(f"*/{part}"), key=lambda p: p.stat().st_size))
    message = mistake(evaluate_command, "--run", run_folder)
    said(message, run_folder / "checkpoints" / "2", "remove that folder")
    assert "bound method" not in message


def test_damaged_metrics_of_a_checkpoint_are_a_mistake_too(mistake, run_folder):
    cut(next((run_folder / "checkpoints").glob("*/metrics/metrics")))
    said(mistake(evaluate_command, "--run", run_folder), run_folder / "checkpoints")


@pytest.mark.parametrize("content", [b"phases: [", b"- a\n", b"\xff\xfe", b"seed: \0", b"data: {sise: 3}\n"])
@pytest.mark.parametrize("command", ["evaluate", "resume"])
def test_a_damaged_config_in_the_run(content, command, mistake, run_folder):
    (run_folder / "config.yaml").write_bytes(content)
    if command == "evaluate":
        message = mistake(evaluate_command, "--run", run_folder)
    else:
        message = mistake(train_command, "--resume", "--workdir", run_folder)
    said(message, run_folder / "config.yaml")
    assert (run_folder / "config.yaml").read_bytes() == content


def test_a_config_that_is_not_the_checkpoints_does_not_advise_to_remove_it(mistake, run_folder):
    file = run_folder / "config.yaml"
    file.write_text(file.read_text().replace("head: linear", "head: lesson"))
    message = mistake(evaluate_command, "--run", run_folder)
    said(message, "config.yaml")
    assert "Remove" not in message


def test_evaluate_names_the_images_that_it_skips(run_folder, tmp_path, capfd):
    other = write_images(tmp_path / "other", train=4, valid=2)
    (other / "train" / "cats" / "text.png").write_text("no image")
    out = tmp_path / "out"
    argv = ["--run", str(run_folder), "--data", str(other / "train"), "--out", str(out)]
    assert run_command(evaluate_command.main, argv) == 0
    said(capfd.readouterr().out, "cats/text.png", "of 4 (")
    assert json.loads((out / "metrics.json").read_text())["bad_files"] == 1


def test_evaluate_keeps_what_training_measured(run_folder):
    before = json.loads((run_folder / "metrics.json").read_text())
    assert run_command(evaluate_command.main, ["--run", str(run_folder)]) == 0
    after = json.loads((run_folder / "metrics.json").read_text())
    assert {k: before[k] for k in ("n", "errors", "interval")} == {k: after[k] for k in ("n", "errors", "interval")}
    assert {k: after["seconds"].get(k) for k in ("head.features", "head.train")} == {
        k: before["seconds"][k] for k in ("head.features", "head.train")
    }
    assert after["checkpoint"]["valid_used_for"] == before["checkpoint"]["valid_used_for"]


# --- resuming ---


def test_resume_starts_where_there_is_a_config_and_no_run_yet(run, tmp_path, capfd):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 2\n")
    workdir = run("--config", file, "--resume")
    assert from_file(workdir / "config.yaml").seed == 2
    out = capfd.readouterr().out
    assert "Resuming" not in out
    assert "of 10 (" in out


def test_a_finished_run_resumed_twice_says_the_same(run_folder, capfd):
    before = (run_folder / "predictions.csv").read_bytes()
    rows = (run_folder / "metrics.jsonl").read_text()
    for _ in range(2):
        assert run_command(train_command.main, ["--resume", "--workdir", str(run_folder)]) == 0
        assert "of 4 (" in capfd.readouterr().out
        assert (run_folder / "predictions.csv").read_bytes() == before
        assert (run_folder / "metrics.jsonl").read_text() == rows


def test_a_refused_resume_changes_nothing(run_folder, pictures, mistake):
    before = {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file() and p.name != ".lock"}
    for root, words in ((run_folder / "typo", "no such folder"), (pictures, "the images have changed")):
        said(mistake(train_command, "--resume", "--workdir", run_folder, "--data.root", root), words)
        assert {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file() and p.name != ".lock"} == before
    assert run_command(train_command.main, ["--resume", "--workdir", str(run_folder)]) == 0


def test_what_a_kill_left_half_written_is_swept_by_the_next_start(run_folder):
    left = [run_folder / name for name in (".model.123.tmp", ".model.123.tmp.old", "figures/.a.png.123.tmp")]
    theirs = [run_folder / name for name in (".mine.tmp", ".123.tmp.d")]
    for folder in left + theirs:
        folder.mkdir(parents=True)
        (folder / "model.json").write_text("{}")
    assert (
        run_command(train_command.main, ["--workdir", str(run_folder), "--config", str(run_folder / "config.yaml")])
        == 2
    )
    assert all(path.exists() for path in left)  # a slip changes nothing
    assert run_command(train_command.main, ["--resume", "--workdir", str(run_folder)]) == 0
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in theirs)


def test_the_calibration_of_another_training_is_not_taken(run, tmp_path, capsys):
    """Trained again in the same folder, and killed before its own evaluation: the old metrics.json is of equal steps."""
    old = run(workdir=tmp_path / "old")
    saved = json.loads((old / "metrics.json").read_text())
    assert predictions.read_calibration(old, saved["checkpoint"]) is not None
    new = run("--phases.head.lr", 0.5, workdir=tmp_path / "new")
    checkpoint = run_module.load_run(new).checkpoint
    assert checkpoint["step"] == saved["checkpoint"]["step"]
    for damaged in ("[1]", '"x"', "null"):
        (new / "metrics.json").write_text(f'{{"checkpoint": {damaged}}}')
        assert predictions.read_calibration(new, checkpoint) is None
    shutil.copy(old / "metrics.json", new)
    assert predictions.read_calibration(new, checkpoint) is None
    assert run_command(export_command.main, ["--run", str(new)]) == 0
    assert "No temperature is known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("evaluations", "every", "best"),
    [
        ([(1, 0.5), (3, 0.9), (2, 0.7), (2, 0.6)], 2, 24),  # the best epochs of all, the first and third, weren't saved
        ([(2, 0.5), (2, 0.5), (2, 0.5)], 1, None),  # all the same: any of the saved will do
        ([(3, 0.2), (1, 0.9), (1, 0.8), (2, 0.1)], 1, 18),  # fewest errors, then the lower loss
    ],
    ids=["best-not-saved", "ties", "order"],
)
def test_the_best_epoch_is_one_that_was_saved(evaluations, every, best, run, monkeypatch):
    results = iter(evaluations)

    def summary(logits, labels):
        errors, loss = next(results)
        return {"n": 10, "errors": errors, "accuracy": 1 - errors / 10, "interval": [0.0, 1.0], "log_loss": loss}

    monkeypatch.setattr("jaxcats.common.stats.summary", summary)
    workdir = run(
        "--phases.head.epochs", len(evaluations), "--checkpoint.every_epochs", every, "--checkpoint.use", "best"
    )
    step = json.loads((workdir / "metrics.json").read_text())["checkpoint"]["step"]
    if best:
        assert step == best
    assert (workdir / "checkpoints" / str(step)).is_dir()
    assert run_command(evaluate_command.main, ["--run", str(workdir), "--checkpoint", "best"]) == 0
    assert json.loads((workdir / "metrics.json").read_text())["checkpoint"]["step"] == step


# --- the words ---


def test_jaxcats_alone_lists_its_commands(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    said(out, "usage: jaxcats COMMAND", *cli.COMMANDS)
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == out


def test_an_unknown_command_gets_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    said(err, "error: ", "trian", "Did you mean 'train'", "evaluate")


def test_jaxcats_train_does_what_the_module_does(capsys):
    assert cli.main(["train", "--print_config", "--seed", "4"]) == 0
    printed = capsys.readouterr().out
    train_command.main(["--print_config", "--seed", "4"])
    assert capsys.readouterr().out == printed
    assert cli.main(["train", "--seed", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: seed: ")


def test_a_printed_config_reads_back_to_the_same_run(tmp_path, capsys):
    configs = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert configs
    for file in configs:
        assert (
            run_command(train_command.main, ["--config", str(file), "--data.valid_fraction", "0.25", "--print_config"])
            == 0
        )
        printed = tmp_path / file.name
        printed.write_text(capsys.readouterr().out)
        assert from_file(printed).data.valid_fraction == 0.25
        assert run_command(train_command.main, ["--config", str(printed), "--print_config"]) == 0
        assert capsys.readouterr().out == printed.read_text()


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_is_readable(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    for python in ("<class", "Literal[", "Phase(", "NoneType", "Optional[", "Union[", "dataclass", "see below"):
        assert python not in out
    if command == "train":
        said(out, "--data.root", "--workdir", *(f"--phases.NAME.{name} " for name in Phase.__dataclass_fields__))
        said(out, "{sgd,adam,adamw}", "(default: 0.01)")
    else:
        said(out, "--run", "--data", "--checkpoint")


def test_help_loads_neither_jax_nor_tensorflow_nor_an_image_library():
    code = """
import sys
import jaxcats
try:
    jaxcats.main([sys.argv[1], "--help"])
except SystemExit as stop:
    assert not stop.code
heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "matplotlib", "PIL"}
print("LOADED", sorted(heavy & set(sys.modules)))
"""
    for command in cli.COMMANDS:
        done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "LOADED []"


def test_the_module_ends_with_the_exit_code():
    argv = [sys.executable, "-m", "jaxcats.train", "--data.sise", "3"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --data.sise: there is no such option. Did you mean '--data.size'?\n"
