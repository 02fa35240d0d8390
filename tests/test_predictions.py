"""What train and evaluate write, from the command line: metrics, figures, the report, the artefact, suspects."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny  # noqa: F401
from folders import write_images

import jaxcats as jc
from jaxcats import compare
from jaxcats.common import stats
from jaxcats.common.cli import run_command
from jaxcats.evaluate import __main__ as evaluate_command
from jaxcats.evaluate import figures
from jaxcats.evaluate import run as run_module
from jaxcats.export import __main__ as export_command
from jaxcats.train import __main__ as train_command
from jaxcats.train import experiment, features

CURVES = {"losses", "learning_rate", "confusion", "per_class", "reliability", "risk_coverage"}
FIGURES = CURVES | {
    "random_correct",
    "random_incorrect",
    "most_correct",
    "most_incorrect",
    "most_uncertain",
    "top_losses",
    "heat_maps",
}


def command(which, *argv) -> int:
    return run_command(which.main, [str(a) for a in argv])


def read(path: Path):
    return json.loads(path.read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compiled) -> Path:
    """A run with everything switched on; its cache folder and its images are beside it."""
    top = tmp_path_factory.mktemp("outcome")
    (top / "cache").mkdir()
    (top / "cache" / "xla").symlink_to(compiled)
    images = write_images(top / "images", train=32, valid=20)
    shutil.copy(images / "train/cats/cats.0.jpg", images / "valid/cats/leak.jpg")
    argv = [
        "--model.backbone",
        "tiny",
        "--model.pretrained",
        "false",
        "--data.size",
        "32",
        "--cache_dir",
        top / "cache",
    ]
    argv += ["--phases.head.batch_size", "4", "--data.root", images, "--workdir", top / "run", "--max_error", "0.2"]
    assert command(train_command, *argv) == 0
    return top / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """The test's own copy."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_run_folder_is_complete(trained):
    assert {p.stem for p in (trained / "figures").iterdir()} == FIGURES
    assert all(p.suffix == ".png" and p.stat().st_size > 1000 for p in (trained / "figures").iterdir())
    assert {p.name for p in (trained / "model").iterdir()} == {"model.json", "model.safetensors", "model.stablehlo"}
    assert not [p for p in trained.rglob("*") if p.name.endswith(".tmp")]
    assert read(trained / "data.json")["pictures"] == {
        "train": {"cats": 16, "dogs": 16},
        "valid": {"cats": 11, "dogs": 10},
    }


def test_the_numbers_agree_with_each_other(trained):
    found, rows = read(trained / "metrics.json"), rows_of(trained / "predictions.csv")
    assert found["n"] == len(rows) == 21
    assert sum(map(sum, found["confusion"])) == 21
    assert found["errors"] == sum(r["label"] != r["predicted"] for r in rows)
    assert found["abstain"]["max_error"] == 0.2
    unsure = [r for r in rows if r["abstain"] == "yes"]
    assert found["abstain"]["answered"] == 21 - len(unsure)
    raw = np.array([[float(r["p_cats"]), float(r["p_dogs"])] for r in rows])
    scaled = np.exp(stats.log_softmax(np.log(raw) / found["calibration"]["temperature"])).max(1)
    np.testing.assert_allclose([float(r["probability"]) for r in rows], scaled, atol=1e-6)
    assert {"export", "report", "total"} <= set(found["seconds"])


def test_the_page_says_what_happened(trained):
    page = (trained / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    found = read(trained / "metrics.json")
    assert stats.sentence(found["errors"], found["n"]) in page
    assert "train/cats/cats.0.jpg = valid/cats/leak.jpg" in page  # the leak that was planted
    assert page.count("<svg") >= 6
    assert page.index('id="figure-losses"') < page.index('id="figure-heat_maps"')  # the wide figures come last
    assert "tiny" in page
    assert "python -m jaxcats.predict" in page


def test_the_artefact_says_what_evaluate_says(trained):
    classifier, rows = jc.load(trained / "model"), rows_of(trained / "predictions.csv")
    root = trained.parent / "images"
    answers = classifier.predict([root / r["path"] for r in rows])
    assert answers.labels == [r["predicted"] for r in rows]
    np.testing.assert_allclose(answers.confidence, [float(r["probability"]) for r in rows], atol=1e-5)
    assert [bool(a) for a in answers.abstain] == [r["abstain"] == "yes" for r in rows]
    facts = classifier.facts
    assert facts["accuracy"]["errors"] == read(trained / "metrics.json")["errors"]
    assert "temperature" in " ".join(facts["accuracy"]["used_for"])


def test_another_folder_takes_the_calibration_as_it_is(run, capsys):
    other = write_images(run.parent / "other", train=4, valid=12, seed=1)
    assert command(evaluate_command, "--run", run, "--data", other / "valid") == 0
    (folder,) = (run / "evaluations").iterdir()
    found, own = read(folder / "metrics.json"), read(run / "metrics.json")
    assert found["n"] == 12
    assert found["calibration"]["temperature"] == own["calibration"]["temperature"]
    assert found["abstain"]["threshold"] == own["abstain"]["threshold"]
    assert not found["calibration"]["fitted_on_these_pictures"]
    assert "out_of_fold" not in found["abstain"]
    assert {p.stem for p in (folder / "figures").iterdir()} == FIGURES
    assert str(other / "valid") in (folder / "report.html").read_text()
    assert "No temperature" not in capsys.readouterr().out


def test_images_seen_before_are_said(run, capsys):
    valid = run.parent / "again"
    shutil.copytree(Path(read_root(run)) / "valid", valid)
    assert command(evaluate_command, "--run", run, "--data", valid, "--report", "no") == 0
    out = capsys.readouterr().out
    assert "These images contain 21 of the run's own valid images: the result is too good." in out
    assert "1 of the run's own train images" in out  # the leak
    assert read(next((run / "evaluations").iterdir()) / "metrics.json")["seen_before"] == {"train": 1, "valid": 21}


def test_a_checkpoint_of_unknown_temperature_is_said(run, capsys):
    kept = read(run / "metrics.json")
    kept["checkpoint"]["step"] += 1
    (run / "metrics.json").write_text(json.dumps(kept))
    valid = run.parent / "valid"
    shutil.copytree(Path(read_root(run)) / "valid", valid)
    assert command(evaluate_command, "--run", run, "--data", valid, "--report", "no") == 0
    assert "No temperature is known for this checkpoint" in capsys.readouterr().out
    assert command(export_command, "--run", run) == 0
    assert "No temperature is known for this checkpoint" in capsys.readouterr().out
    assert jc.load(run).facts["abstain"]["threshold"] is None


def read_root(run: Path) -> str:
    return next(
        line.split(": ", 1)[1] for line in (run / "config.yaml").read_text().splitlines() if line.startswith("  root:")
    )


def test_suspects_are_ranked_and_come_into_the_page(run, capsys):
    assert command(evaluate_command, "--run", run, "--split", "train") == 0
    suspects = rows_of(run / "suspects.csv")
    assert suspects
    assert {s["split"] for s in suspects} <= {"train", "valid"}
    assert (run / "figures" / "suspects.png").is_file()
    assert f"{len(suspects):,} of 53 images" in capsys.readouterr().out
    assert command(evaluate_command, "--run", run) == 0
    assert suspects[0]["path"] in (run / "report.html").read_text()


def test_evaluate_takes_the_features_that_train_computed(run):
    loaded = run_module.load_run(run)
    split = run_module.training_index(loaded).splits["valid"]
    how = {"preprocess": loaded.preprocess, "batch_size": loaded.config.feature_batch, "workers": None}
    weights = {"params": loaded.params, "batch_stats": loaded.batch_stats}
    cache = experiment.cache_folder_of(loaded.config)
    got = features.backbone_features(loaded.model, split, **weights, **how, cache_dir=cache)
    assert (got.reused, got.computed) == (21, 0)


def test_another_max_error_gives_another_threshold_and_export_takes_it(run):
    assert command(evaluate_command, "--run", run, "--max_error", "0.5", "--report", "no") == 0
    assert read(run / "metrics.json")["abstain"]["max_error"] == 0.5
    assert command(export_command, "--run", run) == 0
    assert jc.load(run).facts["abstain"]["max_error"] == 0.5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--split", "train", "--data", "x"], ["--split train", "--data"]),
        (["--split", "test"], ["--split test", "has no test images"]),
        (["--split", "tset"], ["--split", "expected one of valid, test, train, got 'tset'. Did you mean 'test'?"]),
        (["--max_error", "2"], ["--max_error 2", "0 < x < 1"]),
        (["--tta", "two"], ["--tta", "expected a whole number, got 'two'"]),
        (["--repport", "no"], ["--repport: there is no such option", "Did you mean '--report'?"]),
        (["--checkpoint"], ["--checkpoint: expected one argument"]),
    ],
)
def test_slips_in_evaluate_are_one_line(trained, argv, words, capfd):
    assert command(evaluate_command, "--run", trained, *argv) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


def test_evaluate_wants_a_run(capfd):
    assert command(evaluate_command) == 2
    assert capfd.readouterr().err == "error: --run: is required.\n"


def test_an_image_that_has_gone_does_not_stop_the_report(run, capfd, monkeypatch):
    from jaxcats.data.images import ImageError

    def gone(evaluated):
        raise ImageError("no such file")

    monkeypatch.setattr(figures, "heat_maps", gone)
    shutil.rmtree(run / "figures")
    assert command(evaluate_command, "--run", run) == 0
    assert "The galleries are not drawn" in capfd.readouterr().err
    assert (run / "report.html").is_file()
    assert {p.stem for p in (run / "figures").iterdir()} == CURVES


def test_phases_with_one_rate_and_with_three_are_drawn_together(run):
    """One phase logs a rate for all layer groups, the next one a rate for each: the report failed with "inhomogeneous shape"."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    later = [row | {"step": row["step"] + len(steps), "phase": "all", "lr": [0.001, 0.003, 0.01]} for row in steps]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + later))
    figure = figures.training_figures(run)["learning_rate"]
    assert len(figure.axes[0].get_lines()) == 3
    assert command(evaluate_command, "--run", run) == 0
    assert 'id="figure-learning_rate"' in (run / "report.html").read_text()


def test_a_run_compared_with_itself_can_not_be_told_apart(trained, capsys):
    assert command(compare, trained, trained) == 0
    assert "can't be told apart" in capsys.readouterr().out


def test_a_notebook_evaluates_shows_and_exports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = write_images(tmp_path / "images")
    data = jc.ImageClassifierData.from_paths(images, size=32, batch_size=4)
    learn = jc.Learner.pretrained("tiny", data, pretrained=False, precompute=True)
    learn.fit(0.01, 1)
    found = learn.judge()
    assert found["errors"] == learn.errors()[0]
    assert stats.sentence(*learn.errors()) in repr(found)
    for draw in (learn.plot_confusion, learn.plot_reliability, learn.plot_risk_coverage, learn.plot_heat_maps):
        assert draw()._repr_png_().startswith(b"\x89PNG")
    assert learn.report("page").read_text().startswith("<!")
    answers = jc.load(learn.export("shipped")).predict(data.val_paths)
    scaled = np.exp(stats.log_softmax(learn.predict() / found["calibration"]["temperature"]))
    np.testing.assert_allclose(answers.probabilities, scaled, atol=1e-5)


def test_the_docs_show_the_script_without_jaxcats():
    root = Path(__file__).parents[1]
    script = (root / "scripts" / "standalone_predict.py").read_text().split('"""', 2)[2].strip()
    assert script in (root / "docs" / "export.md").read_text()
