"""Full disks, odd names, images that change under a run, and what killed processes leave: what is said, and that nothing is lost."""

import csv
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import tiny  # noqa: F401
from folders import write_images
from PIL import Image

from jaxcats.common.cli import run_command
from jaxcats.common.errors import UserError
from jaxcats.data.images import Preprocess
from jaxcats.data.index import scan
from jaxcats.data.pipeline import evaluation_batches
from jaxcats.train import __main__ as train_command
from jaxcats.train import loop

CONFIG = """
model: {backbone: tiny, pretrained: false, head: linear}
data: {size: 32}
export: false
report: false
phases:
  head: {epochs: 2, lr: 1.0e-2, precompute: true, batch_size: 8}
  all: {epochs: 3, lr: 1.0e-3, freeze: nothing, bn: train, augment: flip, batch_size: 8}
"""
PROGRAM = "import sys, tiny, jaxcats; sys.exit(jaxcats.main(['{0}', *sys.argv[1:]]))"


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | more


def run(command: str, *words, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(command), *map(str, words)],
        env=environment(**more),
        capture_output=True,
        timeout=300,
    )


@pytest.fixture
def place(tmp_path, own_cache) -> Path:
    write_images(tmp_path / "photos", train=32, valid=10)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


def small_disk(script: str, disk: Path, size: int, *words, **more: str) -> str:
    """What a shell script printed; a disk of `size` KiB is mounted at `disk`, for this script alone. `GROW` makes it large."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare, of Linux, to make a small disk")
    disk.mkdir(exist_ok=True)
    mount = f'mount -t tmpfs -o size={size}k none "{disk}"'
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk in a namespace of its own")
    grow = f'mount -o remount,size=512m "{disk}"'
    text = f"set -u\n{mount} || exit 9\n{textwrap.dedent(script).replace('GROW', grow)}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", text, "sh", *map(str, words)],
        env=environment(**more),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TRAIN_GROW_AND_RESUME = """
"$@" > "$DISK/../first.out" 2> "$DISK/../first.err"; echo "first $?"
find "$DISK" -name '*.tmp' -not -path '*/checkpoints/*'
GROW
"$@" --resume > "$DISK/../second.out" 2> "$DISK/../second.err"; echo "second $?"
find "$DISK" -name '*tmp*'
cp "$DISK/run/predictions.csv" "$DISK/../after.csv"
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 8, 16, 24, 32, 48, 64, 80, 100, 128, 160, 192, 256])
def test_a_disk_that_fills_while_it_trains_costs_one_line_and_a_resume(place, size):
    """Checkpoints, the log or the first files, wherever it strikes: exit code 1, what to do, no traceback, the same answers."""
    disk = place / "disk"
    words = ["--config", place / "c.yaml", "--data.root", place / "photos", "--workdir", disk / "run"]
    words = [sys.executable, "-c", PROGRAM.format("train"), *words]
    said = small_disk(TRAIN_GROW_AND_RESUME, disk, size, *words, DISK=str(disk))
    assert said.split("\n")[:2] == ["first 1", "second 0"], said + (place / "second.err").read_text()
    assert said.count("\n") == 2, said  # no temporary file was left by either
    complaint = (place / "first.err").read_text()
    (line,) = [line for line in complaint.splitlines() if line.startswith("stopped: ")]
    assert str(disk / "run") in line
    assert "(No space left on device)" in line
    assert line.endswith("Free some space and run the same command again (train: with --resume).")
    assert complaint.strip() == line
    whole = run("train", *words[3:-1], place / "whole")
    assert whole.returncode == 0, whole.stderr
    assert (place / "after.csv").read_bytes() == (place / "whole" / "predictions.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("size", [280, 400, 700, 1000])
def test_a_disk_that_fills_while_the_report_is_written_loses_no_training(place, size):
    disk = place / "disk"
    words = ["--config", place / "c.yaml", "--data.root", place / "photos", "--workdir", disk / "run"]
    words = [sys.executable, "-c", PROGRAM.format("train"), *words, "--report", "true", "--export", "true"]
    said = small_disk(TRAIN_GROW_AND_RESUME, disk, size, *words, DISK=str(disk))
    assert said == "first 1\nsecond 0\n"
    complaint = (place / "first.err").read_text()
    assert "(No space left on device). Free some space" in complaint
    assert "Traceback" not in complaint
    assert "Finished already" in (place / "second.out").read_text()


def test_a_disk_that_fills_while_a_checkpoint_is_saved_leaves_the_one_before_it(place):
    program = """
import sys
import numpy as np
from jaxcats.common.cli import run_command
from jaxcats.train.checkpoint import Checkpoints

def main(argv):
    rng = np.random.default_rng(0)
    state = {"w": rng.normal(size=50_000).astype(np.float32)}  # 200 kB that no codec makes smaller
    store = Checkpoints(argv[0])
    for step in map(int, argv[1:]):
        store.save(state, {"step": step})
        store.wait()
        print("saved", step, flush=True)
    print(store.steps(), np.array_equal(store.restore(store.steps()[-1], state)["w"], state["w"]))
    store.close()

sys.exit(run_command(main, sys.argv[1:]))
"""
    disk = place / "disk"
    script = """
    "$@" "$DISK/c" 1 2; echo "first $?"
    "$@" "$DISK/c"; echo "look $?"
    GROW
    "$@" "$DISK/c" 2; echo "second $?"
    find "$DISK" -name '*tmp*'
    """
    said = small_disk(script + "\n", disk, 400, sys.executable, "-c", program, DISK=str(disk))
    lines = ["saved 1", "first 1", "[1] True", "look 0", "saved 2", "[2] True", "second 0"]
    assert said.splitlines() == lines


@pytest.mark.slow
def test_a_cache_on_a_full_disk_costs_warnings_and_changes_nothing(place):
    disk = place / "disk"
    words = ["--config", place / "c.yaml", "--data.root", place / "photos", "--workdir", place / "run"]
    words = [sys.executable, "-c", PROGRAM.format("train"), *words]
    script = """
    "$@" 2> "$DISK/../err"; echo "rc $?"
    find "$DISK" -name '*.tmp'
    """
    said = small_disk(script, disk, 4, *words, DISK=str(disk), JAXCATS_CACHE=str(disk / "cache"))
    assert "\nrc 0\n" in said
    assert not said.split("\nrc 0\n")[1]
    complaint = (place / "err").read_text()
    assert all(line.startswith(("warning: ", "note: ")) for line in complaint.splitlines()), complaint
    assert "features are not kept" in complaint
    whole = run("train", *words[3:-1], place / "whole")
    assert whole.returncode == 0, whole.stderr
    assert (place / "run" / "predictions.csv").read_bytes() == (place / "whole" / "predictions.csv").read_bytes()


NAMES = [
    b"two words.jpg",
    b" blanks around .jpg",
    b"line\nbreak.jpg",
    b"return\r and tab\t.jpg",
    "käse 猫.jpg".encode(),
    b"no text \xff\xfe.jpg",
    b"-dash.jpg",
    b"quotes'\".jpg",
    b"{braces} %s $HOME <b>&amp;.jpg",
    b"back\\slash, comma;.jpg",
    b"x" * 251 + b".jpg",
]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_name_goes_through_a_whole_run(tmp_path, encoding):
    root = os.fsencode(tmp_path / "photos of \udcff")
    rng = np.random.default_rng(0)
    for split in (b"train", b"valid"):
        for label in (b"cats", b"d\xc3\xb6gs \n"):
            os.makedirs(b"/".join((root, split, label)))
            for name in NAMES:
                pixels = rng.integers(0, 255, (40, 40, 3), np.uint8)
                with open(b"/".join((root, split, label, name)), "wb") as file:
                    Image.fromarray(pixels).save(file, "JPEG")
    (tmp_path / "c.yaml").write_text(CONFIG.replace("false", "true").replace("pretrained: true", "pretrained: false"))
    where, folder = os.fsdecode(root), tmp_path / "run"
    how = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for command, *words in (
        ("train", "--config", tmp_path / "c.yaml", "--data.root", where, "--workdir", folder),
        ("evaluate", "--run", folder, "--out", tmp_path / "again"),
        ("doctor", where, "--json", tmp_path / "d.json", "--html"),
        ("predict", "--model", folder / "model", where, "--csv", tmp_path / "p.csv"),
    ):
        arguments = [os.fsencode(str(word)) for word in [sys.executable, "-c", PROGRAM.format(command), *words]]
        done = subprocess.run(arguments, env=environment(**how), capture_output=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, (command, done.stderr)
        assert b"Traceback" not in done.stderr, command
    assert json.loads((folder / "bad_files.json").read_text()) == []
    wanted = {os.fsdecode(name) for name in NAMES}
    for table, count in (
        (folder / "predictions.csv", 1),
        (tmp_path / "again" / "predictions.csv", 1),
        (tmp_path / "p.csv", 2),
    ):
        with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 2 * count * len(NAMES), table
        assert {os.path.basename(row["path"]) for row in rows} == wanted, table


def replaced(path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


SAID = "has changed since the folder was indexed; restore the file, or run the command again"


@pytest.mark.parametrize(
    ("change", "words"),
    [(replaced, SAID), (cut, SAID), (Path.unlink, r"can't be now \(no such file"), (lambda p: p.chmod(0), None)],
    ids=["replaced", "cut", "removed", "forbidden"],
)
def test_an_image_that_changes_after_it_was_indexed_is_named(pictures, change, words):
    split = scan(pictures).splits["train"]
    change(pictures / split.paths[5])
    batches = evaluation_batches(split, preprocess=Preprocess(size=32), batch_size=4)
    if words is None and os.geteuid() == 0:  # nothing is forbidden to root
        assert sum(int(batch["mask"].sum()) for batch in batches) == len(split)
        return
    with pytest.raises(UserError, match=words or "permission denied") as caught:
        list(batches)
    assert split.paths[5] in str(caught.value)


@pytest.mark.parametrize("change", [replaced, Path.unlink])
def test_no_feature_is_kept_under_the_content_of_another_image(place, monkeypatch, capfd, change):
    """Between the index and the first use; the same command again indexes the folder as it is."""
    victim, whole = place / "photos" / "train" / "cats" / "cats.3.jpg", loop.train_run

    def late(*arguments, **options):
        change(victim)
        return whole(*arguments, **options)

    def command(name: str) -> int:
        words = ["--config", place / "c.yaml", "--data.root", place / "photos", "--workdir", place / name]
        return run_command(train_command.main, [str(w) for w in words])

    monkeypatch.setattr(loop, "train_run", late)
    assert command("run") == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(victim) in line
    monkeypatch.setattr(loop, "train_run", whole)
    assert command("run") == 0
    monkeypatch.setenv("JAXCATS_CACHE", str(place / "fresh"))
    assert command("other") == 0
    assert (place / "run" / "predictions.csv").read_bytes() == (place / "other" / "predictions.csv").read_bytes()


def test_what_killed_processes_left_in_the_cache_is_swept_after_a_day(pictures, own_cache):
    scan(pictures)
    old, fresh = own_cache / "index" / ".a.json.1.tmp", own_cache / "index" / ".b.json.2.tmp"
    for left in (old, fresh):
        left.write_text("half")
    os.utime(old, (time.time() - 90_000,) * 2)
    scan(pictures)
    assert not old.exists()
    assert fresh.exists()  # its writer may be at work


# What fuzzing found (tests/test_fuzz.py), kept.


def test_what_a_file_holds_can_neither_steer_the_terminal_nor_break_the_line(pictures, tmp_path, capfd):
    (tmp_path / "labels.csv").write_bytes(b'p\x1b[2Jath\x00,"la\r\nbel"\n')
    (tmp_path / "c.yaml").write_bytes(b"\x00seed: 3\n")
    for words, shown in (
        (["--data.root", pictures, "--data.labels", tmp_path / "labels.csv"], r"p\x1b[2Jath\x00, la\r\nbel"),
        (["--config", tmp_path / "c.yaml"], "special characters are not allowed"),
    ):
        assert run_command(train_command.main, [str(w) for w in (*words, "--workdir", tmp_path / "run")]) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert said[:-1].isprintable()
        assert shown in said


def test_a_digit_altered_in_the_index_cache_is_not_believed(pictures, own_cache, capsys):
    whole = scan(pictures).splits["train"].hashes
    (store,) = (own_cache / "index").iterdir()
    content = store.read_bytes()
    digit = whole[3].encode()
    store.write_bytes(content.replace(digit, digit[:-1] + (b"0" if digit[-1:] != b"0" else b"1")))
    assert scan(pictures).splits["train"].hashes == whole
    assert "checked again" in capsys.readouterr().err


def test_compiled_programs_cut_off_by_a_kill_are_compiled_anew_without_a_word(place):
    words = ["--config", place / "c.yaml", "--data.root", place / "photos"]
    env = {"JAXCATS_CACHE": str(place / "own-cache")}  # not the one that tests share
    first = run("train", *words, "--workdir", place / "first", **env)
    assert first.returncode == 0, first.stderr
    programs = sorted((place / "own-cache" / "xla").glob("*-cache"))
    assert len(programs) > 5
    whole = {path: path.stat().st_size for path in programs}
    for path in programs:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    second = run("train", *words, "--workdir", place / "second", **env)
    assert (second.returncode, second.stderr) == (0, b"")
    mended = [path for path in programs if path.exists() and path.stat().st_size > 0.9 * whole[path]]
    assert len(mended) > len(programs) // 2
    names = ("predictions.csv", "config.yaml")
    assert all((place / "first" / n).read_bytes() == (place / "second" / n).read_bytes() for n in names)


def test_a_script_of_ones_own_that_imports_jax_first_hears_nothing_of_tensorflow(place):
    """JAX sets the level of what TensorFlow says as well, and a level that somebody has set is obeyed."""
    words = ["--config", place / "c.yaml", "--data.root", place / "photos", "--workdir", place / "run"]
    program = "import sys, jax, tiny, jaxcats; sys.exit(jaxcats.train_main())"
    env = environment()
    env.pop("TF_CPP_MIN_LOG_LEVEL", None)
    command = [sys.executable, "-c", program, *map(str, words)]
    assert subprocess.run(command, env=env, capture_output=True).stderr == b""
    shutil.rmtree(place / "run")
    victim = place / "photos" / "train" / "cats" / "cats.0.jpg"
    before = victim.stat()
    content = bytearray(victim.read_bytes())
    content[-20] ^= 1
    victim.write_bytes(content)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    done = subprocess.run(
        [*command, "--phases.head.precompute", "false", "--phases.head.driver", "stream"], env=env, capture_output=True
    )
    assert done.returncode == 2
    assert [line for line in done.stderr.decode().splitlines() if not line.startswith("To start again")] == [
        line for line in done.stderr.decode().splitlines() if line.startswith("error: ")
    ]
