"""Every script in scripts/ runs, with small options, in a process of its own, on drawn images and a tiny network."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
# Modules that scripts import, with a script that does.
IMPORTED = {
    "_environment": "test",
    "drawing.py": "demo_images.py",
    "measurements.py": "benchmark.py",
    "whole_job.py": "benchmark.py",
    "peers/_bodies.py": "peers/torch_throughput.py",
    "peers/_head.py": "peers/torch_head.py",
    "peers/_heap.py": "peers/torch_head.py",
    "peers/_torchvision_cpu.py": "peers/torch_decode.py",
}
ELSEWHERE = {"lesson1.py": "test_lesson.py"}
# Every Python process imports this at its start, so that each "efficientnet_lite0" is the tests' tiny network.
TINY = """
import os
if "TINY_WEIGHTS" in os.environ:
    import dataclasses, tiny
    from jaxcats import Preprocess, models
    source = models.WeightSource(os.environ["TINY_WEIGHTS"], Preprocess())
    models.register("efficientnet_lite0", dataclasses.replace(models.registry.get("tiny"), source=source))
"""
CONFIG = """
data: {{root: {root}, size: 32}}
model: {{backbone: efficientnet_lite0, head: linear}}
phases:
  head: {{epochs: 1, lr: 0.01, precompute: true, batch_size: 4}}
"""
BARE = ["--report", "false", "--export", "false"]
QUICK = ["--rounds", "1", "--seconds", "0.01", "--size", "32", "--batch", "4"]
PEER_PACKAGES = {
    "torch_head.py": ["torch"],
    "torch_decode.py": ["torch", "torchvision"],
    "torch_throughput.py": ["torch", "efficientnet_lite_pytorch"],
    "torch_precompute_job.py": ["torch", "torchvision", "efficientnet_lite_pytorch"],
    "fastai_job.py": ["fastai", "efficientnet_lite_pytorch"],
}


class Place:
    """A folder with drawn images, a trained run and its configuration, and a way to run scripts on them."""

    def __init__(self, folder: Path):
        self.folder, self.photos, self.run, self.config = folder, folder / "photos", folder / "run", folder / "c.yaml"
        self.config.write_text(CONFIG.format(root=self.photos))
        (folder / "sitecustomize.py").write_text(TINY)
        self.env = os.environ | {"JAXCATS_CACHE": str(folder / "cache"), "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.env["PYTHONPATH"] = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests", SCRIPTS)))
        weights = folder / "tiny.npz"
        self.python(
            "-c",
            "import sys, jax, numpy, tiny; from jaxcats import models; model = models.create('tiny', 2)\n"
            "numpy.savez(sys.argv[1], **models.to_state_dict(model, *model.init(jax.random.key(0))))",
            weights,
        )
        self.env["TINY_WEIGHTS"] = str(weights)

    def python(self, *arguments: object, code: int = 0) -> str:
        """Runs Python and returns what it printed; stderr too where another exit code than 0 is expected."""
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout if code == 0 else done.stdout + done.stderr

    def script(self, name: str, *arguments: object, code: int = 0) -> str:
        return self.python(SCRIPTS / name, *arguments, code=code)

    def json(self, name: str, *arguments: object) -> dict:
        """The one line that a script printed."""
        (line,) = self.script(name, *arguments).splitlines()
        return json.loads(line)


@pytest.fixture(scope="module")
def place(tmp_path_factory, compiled):
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "cache").mkdir()
    (folder / "cache" / "xla").symlink_to(compiled)
    place = Place(folder)
    printed = place.script("demo_images.py", place.photos, "--n_train", 24, "--n_valid", 10)
    assert printed == f"24 training and 10 validation images in {place.photos}\n"
    place.python("-m", "jaxcats.train", "--config", place.config, "--workdir", place.run)
    return place


def test_no_script_is_left_out():
    source = Path(__file__).read_text(encoding="utf-8")
    files = [p for p in SCRIPTS.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    for name in sorted(p.relative_to(SCRIPTS).as_posix() for p in files):
        if name in IMPORTED:
            assert Path(name).stem in (SCRIPTS / IMPORTED[name]).read_text(encoding="utf-8"), name
        elif name in ELSEWHERE:
            other = Path(__file__).with_name(ELSEWHERE[name]).read_text(encoding="utf-8")
            assert "mark.scripts" in other, name
            assert name in other, name
        elif name.startswith("peers/"):
            assert Path(name).name in PEER_PACKAGES, name
        else:
            assert f'"{name}"' in source, f"scripts/{name}: no test in {Path(__file__).name} runs it"


def is_picture(path: Path) -> bool:
    """Whether there is something on an image."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L")).std() > 5


@pytest.mark.scripts
class TestScripts:
    def test_figures(self, place):
        out, photo = place.folder / "figures", next(place.photos.glob("valid/cats/*.jpg"))
        printed = place.script("figures.py", "--out", out, "--few", "--run", place.run, "--photo", photo).splitlines()
        assert len(printed) == 14
        assert all(is_picture(Path(line)) for line in printed)
        assert {"schedules.png", "augmentations.png", "2_heat_maps.png", "run_reliability.svg"} <= set(os.listdir(out))

    def test_image_kinds(self, place):
        out, folder = place.folder / "kinds.png", place.folder / "kinds"
        printed = place.script("image_kinds.py", "--out", out, "--keep", folder, "--small")
        assert printed == f"{len(os.listdir(folder))} kinds of image: {out}\n"
        assert len(os.listdir(folder)) > 40
        assert is_picture(out)

    def test_readme_image(self, place):
        out = place.folder / "shown" / "readme.png"
        assert place.script("readme_image.py", "--run", place.run, "--out", out) == f"{out}\n"
        assert is_picture(out)

    def test_standalone_predict_gives_the_answers_of_the_package(self, place):
        image = next(place.photos.glob("valid/dogs/*.jpg"))
        printed = place.script("standalone_predict.py", place.run / "model", image)
        name, answers = printed.split(" ", 1)
        code = "import sys, jaxcats; print(jaxcats.load(sys.argv[1]).predict([sys.argv[2]])[0].probabilities.tolist())"
        wanted = json.loads(place.python("-c", code, place.run / "model", image))
        assert name == str(image)
        np.testing.assert_allclose(list(json.loads(answers.replace("'", '"')).values()), wanted, atol=1e-5)

    def test_same_bits(self, place):
        images = sorted(place.photos.glob("valid/*/*.jpg"))[:3]
        printed = place.script("same_bits.py", place.run, "--images", *images)
        hashes = dict(line.split() for line in printed.splitlines())
        assert hashes["predictions.csv"] == hashlib.sha256((place.run / "predictions.csv").read_bytes()).hexdigest()
        assert hashes["checkpoint"] == json.loads((place.run / "metrics.json").read_text())["checkpoint"]["state"]
        assert len(hashes["classifier"]) == 64
        assert place.script("same_bits.py", place.run, "--model", place.run / "model", "--images", *images) == printed
        assert (
            place.script("same_bits.py", place.run, "--images", *images[:2]).splitlines()[:2]
            == printed.splitlines()[:2]
        )

    def test_seeds(self, place):
        printed = place.script("seeds.py", "--config", place.config, "--root", place.photos, "--seeds", 0, 1)
        first, second, last = printed.splitlines()
        assert first.startswith("seed 0: ")
        assert second.startswith("seed 1: ")
        assert "errors of 10, log loss" in second
        assert last.startswith("median of 2 seeds: ")

    def test_choose_recommended(self, place):
        options = ["--folds", 2, "--seeds", 1, "--candidates", 2]
        printed = place.script("choose_recommended.py", "--root", place.photos, *options).splitlines()
        rows = [json.loads(line) for line in printed[:2]]
        assert [row["of"] for row in rows] == [24, 24]
        assert rows[0]["what"] == "lesson: the lesson's fit(0.01, 3)"
        assert printed[3] == "best first:"
        assert min(row["errors"] for row in rows) == int(printed[4].split(" of ")[0])

    def test_longer_flow(self, place):
        out = place.folder / "longer_flow"
        options = ["--size", 32, "--lr", 0.01, "--augmented", 1, "--out", out]
        printed = place.script("longer_flow.py", "--root", place.photos, *options)
        steps = json.loads((out / "steps.json").read_text())
        assert [step["n"] for step in steps] == [10] * 5
        assert steps[-1]["step"].strip() == "with TTA(4)"
        assert "all layers at 0.0001, 0.001, 0.01, 1 cycle(s)" in printed

    def test_flipped_labels(self, place):
        options = ["--share", 0.1, "--seeds", 1, "--folds", 2]
        printed = place.script("flipped_labels.py", "--config", place.config, "--root", place.photos, *options)
        assert printed.startswith("no label flipped: ")
        assert "seed 0: 2 flipped; " in printed

    def test_kill_campaign(self, place):
        out = place.folder / "kills.json"
        printed = place.script("kill_campaign.py", "--runs", 1, "--size", 32, "--images", 32, "--out", out)
        assert "1 of 1 runs ended like the undisturbed one" in printed
        assert json.loads(out.read_text())["wrong"] == {}

    def test_memory_table(self, place):
        printed = place.script("memory_table.py", "--root", place.photos, "--images", 24, "--size", 32).splitlines()
        assert [line.split(":")[0] for line in printed[:2]] == ["24 images, precompute", "24 images, stream"]
        assert printed[2] == "precompute: 0 bytes more for each further image"

    def test_prepare_data(self, place):
        """With the mock data of TFDS, which wants to know the splits of a prepared dataset."""
        code = (
            "import pathlib, runpy, sys; import tensorflow_datasets as tfds\n"
            "builder = tfds.builder('cats_vs_dogs', data_dir='tfds')\n"
            "split = tfds.core.SplitInfo(name='train', shard_lengths=[20], num_bytes=1)\n"
            "builder.info.set_splits(tfds.core.splits.SplitDict([split]))\n"
            "pathlib.Path(builder.data_dir).mkdir(parents=True)\n"
            "builder.info.write_to_directory(builder.data_dir)\n"
            "with tfds.testing.mock_data(num_examples=20, data_dir='tfds'):\n"
            "    runpy.run_path(sys.argv.pop(1), run_name='__main__')"
        )
        options = ["cats_vs_dogs", "--out", "prepared", "--valid", 5, "--data_dir", "tfds"]
        printed = place.python("-c", code, SCRIPTS / "prepare_data.py", *options)
        assert "15 train, 5 valid images in 2 classes." in printed.replace("5 valid, 15 train", "15 train, 5 valid")
        assert len(list((place.folder / "prepared").rglob("*.png"))) == 20

    def test_the_example_of_a_loss(self, place):
        printed = place.script("examples/loss.py", "--config", place.config, "--workdir", place.folder / "loss", *BARE)
        assert "loss_fn loss.focal" in printed

    def test_the_example_of_an_augmentation(self, place):
        options = ["--config", place.config, "--workdir", place.folder / "augmented", *BARE]
        printed = place.script("examples/augmentation.py", *options, "--phases.head.precompute", "false")
        assert "augmentation.cutout" in printed

    def test_the_example_of_a_step(self, place):
        printed = place.script("examples/step.py", "--config", place.config)
        assert [line.split(":")[0] for line in printed.splitlines()] == ["epoch 0, last", "epoch 0, average"]

    def test_the_example_of_a_metric(self, place):
        printed = place.script("examples/metric.py", place.photos, "efficientnet_lite0")
        assert printed.count("cautious cost") == 3

    def test_the_example_of_a_backbone(self, place):
        """It has every command; the network itself is trained in test_examples.py."""
        printed = place.script("examples/backbone.py", "train", "--model.backbone", "mime", code=2)
        assert "mine" in printed
        assert "efficientnet_lite0" in printed

    @pytest.mark.parametrize("what", ["step", "features", "head", "lr_find", "ceiling"])
    def test_benchmark_measures_a_part(self, what, place):
        limit = ["--limit", 16] if what in ("head", "lr_find") else []
        line = place.json("benchmark.py", what, *QUICK, *limit)
        assert line["what"] == what
        assert {"python", "jax", "flax"} <= set(line["versions"])
        assert line["peak_memory_bytes"] > 1 << 20
        if what == "ceiling":
            assert line["gflop_per_second"]["best"] > 0
        else:
            assert line["images_per_second"]["best"] >= line["images_per_second"]["median"] > 0

    @pytest.mark.parametrize("what", ["decode", "features", "job"])
    def test_benchmark_measures_files_in_several_numbers(self, what, place):
        weights = ["--random-weights"] if what == "job" else []
        line = place.json("benchmark.py", what, "--root", place.photos, *QUICK, "--scale", "10,40", *weights)
        rows = line["scale"]
        assert [row["images"] for row in rows] == [10, 40]
        assert all(row["images_per_second"]["median"] > 0 for row in rows)
        if what == "job":
            assert all(row["cold"]["n"] > 0 for row in rows)

    def test_benchmark_in_turns_with_a_command(self, place):
        peer = f'{sys.executable} -S -c "print(\'{{\\"speed\\": {{\\"best\\": 2.0}}}}\')"'
        options = ["ceiling", *QUICK, "--key", "wall_seconds", "--peer", peer, "--pairs", 2]
        line = place.json("benchmark.py", *options, "--peer-key", "speed.best")
        assert line["peer"]["speed"] == {"best": 2.0}
        assert len(line["ratios"]) == 2
        assert line["ratio"] == pytest.approx(sum(line["ratios"]) / 2, abs=2e-3)
        assert "no 'worst' in" in place.script("benchmark.py", *options, "--peer-key", "worst", code=1)

    def test_benchmark_says_that_decoding_needs_photos(self, place):
        assert "--root" in place.script("benchmark.py", "decode", code=2).splitlines()[-1]

    def test_benchmark_table_keeps_what_was_written_by_hand(self, place):
        sys.path.insert(0, str(SCRIPTS))
        try:
            import benchmark_table
        finally:
            sys.path.remove(str(SCRIPTS))
        name, (_, key, _, _, peer_key, less) = next(iter(benchmark_table.ROWS.items()))
        one = {
            "images_per_second": {"median": 123.4},
            "peer": {"features_img_s": {"median": 61.7}, "torch": "2"},
            "ratio": 2.0,
            "ratios": [1.9, 2.1],
            "commands": ["ours", "theirs"],
        }
        ceiling = {"versions": {}, "gflop_per_second": {"best": 1, "a": 1}, "copy_gb_read_and_written_per_second": {}}
        row = {"row": name, "key": key, "peer_key": peer_key, "less": less, "best": one, "usual": one}
        lines, out = place.folder / "lines.json", place.folder / "BENCHMARKS.md"
        lines.write_text(json.dumps({"ceiling": ceiling, name: row}))
        out.write_text("old\n## Log\nby hand\n")
        place.script("benchmark_table.py", "--root", "x", "--render", "--lines", lines, "--out", out)
        text = out.read_text()
        assert "| 123.4 img/s | 61.7 img/s | **2.00** (1.90, 2.10) |" in text
        assert text.endswith("## Log\nby hand\n")
        assert "old" not in text

    def test_benchmark_table_measures_a_row_beside_a_command(self, place):
        """A row of the table with a peer that is not PyTorch."""
        peer = place.folder / "peer"
        peer.write_text('#!/bin/sh\necho \'{"best_img_s": 50.0, "torch": "none"}\'\n')
        peer.chmod(0o755)
        lines, out = place.folder / "row.json", place.folder / "ROW.md"
        ceiling = {"versions": {}, "gflop_per_second": {"best": 1, "a": 1}, "copy_gb_read_and_written_per_second": {}}
        lines.write_text(json.dumps({"ceiling": ceiling}))
        options = ["--root", place.photos, "--peer-python", peer, "--pairs", 1, "--only", "Decoding"]
        place.script("benchmark_table.py", *options, "--scratch", place.folder / "s", "--lines", lines, "--out", out)
        assert "| Decoding: JPEG files to 224 px batches |" in out.read_text()
        assert "| 50 img/s |" in out.read_text()

    def test_scale_table(self, place):
        """All lines but one have been measured before."""
        sys.path.insert(0, str(SCRIPTS))
        try:
            import scale_table
        finally:
            sys.path.remove(str(SCRIPTS))
        old = {"images_per_second": {"median": 7.0}, "peak_memory_bytes": 1 << 30, "what": "decode", "images": 300}
        commands = scale_table.commands(place.photos)
        lines, out = place.folder / "scale.json", place.folder / "SCALE.md"
        lines.write_text(json.dumps({command: [old | {"scale": [old]}] for command in commands[1:]}))
        out.write_text("by hand\n")
        printed = place.script("scale_table.py", "--root", place.photos, "--lines", lines, "--out", out)
        assert printed == f"benchmark.py {commands[0]}\n"
        text = out.read_text()
        assert text.startswith("by hand\n\n## Scale\n")
        assert "| 224 | 7 img/s, 1.0 GiB | 7 img/s, 1.0 GiB |" in text
        assert "| 300 | decode | 7 img/s, 1.0 GiB |" in text
        (measured,) = json.loads(lines.read_text())[commands[0]]
        assert measured["size"] == scale_table.SIZES[0]

    @pytest.mark.parametrize("name", PEER_PACKAGES)
    def test_a_peer(self, name, place):
        for package in PEER_PACKAGES[name]:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"scripts/peers/{name} needs {package}, which is not installed")
        options = {
            "torch_head.py": ["--rows", 64, "--width", 16, "--rounds", 1],
            "torch_decode.py": ["--root", place.photos, "--size", 32, "--rounds", 1],
            "torch_throughput.py": ["--size", 64, "--batch", 2, "--rounds", 1, "--seconds", 0.1],
            "torch_precompute_job.py": ["--root", place.photos, "--size", 64, "--epochs", 1, "--weights", "random"],
            "fastai_job.py": [
                "--root",
                place.photos,
                "--size",
                64,
                "--epochs",
                1,
                "--weights",
                "random",
                "--lr-find-it",
                0,
            ],
        }[name]
        assert json.loads(place.script(f"peers/{name}", *options).splitlines()[-1])["load_before"] >= 0

    @pytest.mark.parametrize(("name", "package"), [("make_golden.py", "torch"), ("make_lr_golden.py", "fastai")])
    def test_golden_files(self, name, package, place):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"scripts/{name} needs {package}, which is not installed")
        out = place.folder / name.removesuffix(".py")
        assert place.script(name, "--out", out)
        assert out.exists()


@pytest.mark.scripts
class TestShellScripts:
    """scripts/quickstart and scripts/test in a copy of the repository whose environment is that of the tests."""

    @pytest.fixture
    def clone(self, place, tmp_path):
        for name in ("scripts", "configs", "pyproject.toml"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
        python = tmp_path / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        for extra in ("offline", "dev"):
            (tmp_path / ".venv" / f".installed-{extra}").touch()
        return tmp_path

    def shell(self, place, clone: Path, name: str, *arguments: str) -> str:
        command = [str(clone / "scripts" / name), *arguments]
        done = subprocess.run(command, env=place.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def test_quickstart(self, place, clone):
        printed = self.shell(place, clone, "quickstart")
        assert "300 training and 120 validation images in data/demo" in printed
        assert "of 120 (" in printed
        assert (clone / "runs" / "quickstart" / "report.html").stat().st_size > 10_000

    def test_test(self, place, clone):
        (clone / "tests").mkdir()
        (clone / "tests" / "test_one.py").write_text("def test_one():\n    assert True\n")
        assert "1 passed" in self.shell(place, clone, "test", "-n", "0", "-p", "no:cacheprovider")
