"""`python -m jaxcats.lr_find` and `lr: auto`: the table, the files, the chosen rate, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny  # noqa: F401
from lr_records import band_of, result_of
from PIL import Image

from jaxcats import lr_find
from jaxcats.common.cli import run_command
from jaxcats.evaluate import __main__ as evaluate_command
from jaxcats.train import __main__ as train_command
from jaxcats.train import lr_finder

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
    "8",
]


def command(main, *argv) -> int:
    return run_command(main, [str(a) for a in argv])


@pytest.fixture
def separable(tmp_path):
    """Dark and light images: whatever the seed, the loss falls."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 32), ("valid", 8)):
        for name, level in (("dark", 60), ("light", 190)):
            folder = tmp_path / "separable" / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.normal(level, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "separable"


def answering(monkeypatch):
    """A recorded healthy curve in place of the measured one, which depends on the machine's last bits."""
    curves = json.loads((Path(__file__).parent / "golden" / "lr_find.json").read_text())["curves"]
    measured, really = [], lr_finder.find_lr

    def found(*args, **kwargs):
        measured.append(really(*args, **kwargs))
        return result_of(curves["late divergence"])

    monkeypatch.setattr("jaxcats.train.loop.find_lr", found)
    return measured


def test_the_command_prints_its_table_and_writes_its_files(separable, tmp_path, capsys):
    out = tmp_path / "out"
    code = command(lr_find.main, *BASE, "--data.root", separable, "--out", out)
    said = capsys.readouterr()
    record = json.loads((out / "lr_find.json").read_text())
    result = result_of(record)
    assert result.table() in said.out
    assert (out / "figures" / "lr_find.png").read_bytes()[:4] == b"\x89PNG"
    assert code == (1 if result.refusal else 0)
    assert bool(result.refusal) == ("no trustworthy learning rate" in said.err)
    np.testing.assert_allclose(result.curves[0].lrs[:5], 1e-7 * 1e8 ** (np.arange(5) / 100), rtol=1e-4)
    assert not result.refusal or not record["suggestions"]


def test_several_seeds_give_a_band(separable, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [
        *BASE,
        "--data.root",
        separable,
        "--out",
        out,
        "--seeds",
        3,
        "--iterations",
        50,
        "--start",
        1e-5,
        "--end",
        1,
    ]
    assert command(lr_find.main, *argv) in (0, 1)
    assert "under 3 seeds" in capsys.readouterr().out
    band = band_of(json.loads((out / "lr_find.json").read_text()))
    first = [r.losses[0] for r in band.curves]
    assert len(set(first)) == 3  # heads and orders of their own
    np.testing.assert_allclose(band.curves[0].lrs[:5], 1e-5 * 1e5 ** (np.arange(5) / 50), rtol=1e-4)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--phase", "hed"], "Did you mean 'head'"),
        (["--start", "1", "--end", "0.1"], "0 < start < end"),
        (["--iterations", "0"], "iterations"),
        (["--seeds", "0"], "seeds"),
        (["--seeds", "2", "--phases.head.precompute", "false"], "precompute"),
        (["--seedz", "2"], "Did you mean '--seed"),
    ],
)
def test_wrong_input_is_one_line(separable, tmp_path, capsys, argv, words):
    assert command(lr_find.main, *BASE, "--data.root", separable, "--out", tmp_path / "out", *argv) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_auto_takes_the_valley_and_keeps_it_when_resumed(separable, tmp_path, capsys, monkeypatch):
    measured = answering(monkeypatch)
    workdir = tmp_path / "run"
    argv = [*BASE, "--data.root", separable, "--workdir", workdir, "--phases.head.lr", "auto"]
    assert command(train_command.main, *argv) == 0
    out = capsys.readouterr().out
    record = json.loads((workdir / "lr_find_head.json").read_text())
    rate = record["suggestions"]["valley"]
    assert f"head: learning rate {rate:.3g}, by lr_find" in out
    assert (workdir / "figures" / "lr_find_head.png").is_file()
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([r["lr"] for r in rows if "lr" in r], rate, rtol=1e-6)
    assert len(measured) == 1
    assert command(train_command.main, *argv, "--resume") == 0
    assert len(measured) == 1
    assert command(evaluate_command.main, "--run", workdir) == 0


def test_auto_is_refused_where_lr_find_is(separable, tmp_path, capsys):
    """A network that has nothing to learn: every label is noise."""
    for part in ("train", "valid"):
        for i, path in enumerate(sorted((separable / part).rglob("*.png"))):
            Image.fromarray(np.full((32, 32, 3), 100 + i % 3, np.uint8)).save(path)
    argv = [*BASE, "--data.root", separable, "--workdir", tmp_path / "run", "--phases.head.lr", "auto"]
    assert command(train_command.main, *argv) == 1
    err = capsys.readouterr().err
    assert "lr_find suggests no rate" in err
    assert "Set phases.head.lr to a number" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_auto_works_for_phases_on_images_too(separable, tmp_path, monkeypatch):
    measured = answering(monkeypatch)
    file = tmp_path / "two.yaml"
    file.write_text(
        "model: {backbone: tiny, pretrained: false}\ndata: {size: 32}\nreport: false\nexport: false\nphases:\n"
        "  head: {epochs: 1, precompute: true, batch_size: 8}\n"
        "  all: {epochs: 1, lr: auto, freeze: nothing, augment: side_on, batch_size: 8}\n"
    )
    assert command(train_command.main, "--config", file, "--data.root", separable, "--workdir", tmp_path / "run") == 0
    assert len(measured) == 1
    assert (tmp_path / "run" / "lr_find_all.json").is_file()
    assert not (tmp_path / "run" / "lr_find_head.json").exists()


def test_evaluate_reports_tta_beside_the_plain_result(separable, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert command(train_command.main, *BASE, "--data.root", separable, "--workdir", workdir) == 0
    plain = (workdir / "predictions.csv").read_bytes()
    capsys.readouterr()
    assert command(evaluate_command.main, "--run", workdir, "--tta", 3, "--tta_weight", 0.25) == 0
    out = capsys.readouterr().out
    assert "with TTA (3 x side_on): " in out
    found = json.loads((workdir / "metrics.json").read_text())
    assert found["tta"]["versions"] == 3
    assert 0 <= found["tta"]["errors"] <= 16
    assert (workdir / "predictions.csv").read_bytes() == plain
    assert (workdir / "predictions_tta.csv").read_bytes() != plain
    for wrong in (["--tta", "-1"], ["--tta_weight", "0.5"], ["--tta", "2", "--tta_weight", "2"]):
        assert command(evaluate_command.main, "--run", workdir, *wrong) == 2
        assert "tta" in capsys.readouterr().err
