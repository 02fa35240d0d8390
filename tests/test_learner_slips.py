"""What a Learner does with slips and odd orders of calls: one clear error, nothing lost, nothing silently different."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
import tiny  # noqa: F401
from folders import write_images

import jaxcats as jc
from jaxcats.common.cli import run_command
from jaxcats.common.config import Config, Phase, flat
from jaxcats.core.state import tree_hash
from jaxcats.evaluate import __main__ as evaluate_command
from jaxcats.train import __main__ as train_command
from jaxcats.train.lr_finder import find_lr
from jaxcats.train.run_folder import training_changes


@pytest.fixture
def data(pictures):
    return jc.ImageClassifierData.from_paths(pictures, size=32, batch_size=4)


@pytest.fixture
def learn(data, tmp_path):
    return jc.Learner.pretrained("tiny", data, precompute=True, pretrained=False, workdir=tmp_path / "kept")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: x.fit(0.01, optimizer="SGD"), "sgd, adam, adamw"),
        (lambda x: x.fit(0.01, bn="Train"), "frozen, train"),
        (lambda x: x.fit(0.01, driver="Scan"), "auto, stream, scan"),
        (lambda x: x.fit(0.01, freeze="all"), "backbone, first, nothing"),
        (lambda x: x.fit(0.01, schedule="cosin"), "cosine"),
        (lambda x: x.fit(0.01, batch_size="8"), "a whole number"),
        (lambda x: x.fit(0.01, batch_size=4.0), "a whole number"),
        (lambda x: x.fit("0.01"), "lr"),
        (lambda x: x.fit(None), "lr"),
        (lambda x: x.fit(0.01, 1.5), "n_cycle"),
        (lambda x: x.fit(0.01, cycle_len=1.5), "cycle_len"),
        (lambda x: x.fit(0.01, 3, epochs=3), "epochs: not an option"),
        (lambda x: x.fit(0.01, 3, cycle_len=1, schedule="cosine"), "schedule: not an option"),
        (lambda x: x.fit(slice(0, 0.01)), "0 < a <= b"),
        (lambda x: x.lr_find(iterations=20.5), "iterations"),
        (lambda x: x.lr_find(lr=(0.1, 0.1, 0.0)), "last layer group"),
        (lambda x: x.TTA(1.5), "tta"),
        (lambda x: x.TTA(1, augment="sideways"), "sideways"),
        (lambda x: x.freeze_to("1"), "freeze_to"),
        (lambda x: x.errors(x.predict("train")), "validation images"),
        (lambda x: x.data.show_augmented(999), "999"),
    ],
)
def test_a_slip_is_a_user_error_that_says_so_and_changes_nothing(learn, call, words):
    before = tree_hash(jax.device_get(learn.params))
    with pytest.raises(jc.UserError) as e:
        call(learn)
    assert words in str(e.value)
    assert "\n" not in str(e.value)
    assert tree_hash(jax.device_get(learn.params)) == before
    assert learn.history == []


def test_too_few_images_for_the_parts_of_a_batch(tmp_path):
    root = write_images(tmp_path / "few", train=6, valid=4)
    learn = jc.Learner.pretrained("tiny", jc.ImageClassifierData.from_paths(root, size=32), pretrained=False)
    with pytest.raises(jc.UserError, match="accumulate"):
        learn.fit(0.01, batch_size=12, accumulate=6)
    learn.fit(0.01, batch_size=12, accumulate=3)


def test_slips_before_there_is_a_learner(data, pictures):
    with pytest.raises(jc.UserError, match="bn"):
        jc.Learner.pretrained("tiny", data, pretrained=False, bn="foo").fit(0.01)
    with pytest.raises(jc.UserError, match="frozen backbone"):
        jc.Learner.pretrained("tiny", data, pretrained=False, precompute=True, bn="train")
    with pytest.raises(jc.UserError, match=r"data\.size"):
        jc.Learner.pretrained("tiny", jc.ImageClassifierData.from_paths(pictures, size="32"), pretrained=False)
    with pytest.raises(jc.UserError, match="policy"):
        jc.Learner.pretrained("tiny", jc.ImageClassifierData.from_paths(pictures, policy="centre"), pretrained=False)


def test_a_test_folder_is_no_class_and_may_be_empty(pictures, tmp_path):
    (pictures / "test1").mkdir()
    assert jc.ImageClassifierData.from_paths(pictures).test is None
    classes = tmp_path / "classes"
    for name in ("a", "b", "test1"):
        shutil.copytree(pictures / "train" / "cats", classes / name)
    with pytest.raises(jc.UserError, match="test1 lies among the class folders"):
        jc.ImageClassifierData.from_paths(classes, valid_fraction=0.2)
    assert len(jc.ImageClassifierData.from_paths(classes, valid_fraction=0.2, test=None).classes) == 3


def test_save_never_replaces_what_it_did_not_write(learn, tmp_path, pictures):
    mine = tmp_path / "kept" / "thesis"
    mine.mkdir(parents=True)
    (mine / "config.yaml").write_text("a: 1")
    (mine / "chapter1.tex").write_text("years of work")
    with pytest.raises(jc.UserError, match="another name"):
        learn.save("thesis")
    assert (mine / "chapter1.tex").read_text() == "years of work"
    learn.save("mine")
    learn.save("mine")
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["mine", "thesis"]


def test_numpy_numbers_can_be_saved(learn):
    learn.fit(np.float32(0.01), momentum=np.float64(0.8))
    learn.save("a")
    learn.load("a")
    assert learn.config.phases["fit1"].momentum == 0.8


def test_the_best_epoch_s_bias_is_said_wherever_it_is_judged(learn, capsys):
    learn.fit(0.05, 3, keep="best")
    assert "the result is too good" in capsys.readouterr().out
    folder = learn.save("best")
    assert run_command(evaluate_command.main, ["--run", str(folder), "--report", "no"]) == 0
    assert "the best epoch was chosen on these images" in capsys.readouterr().out
    assert json.loads((folder / "metrics.json").read_text())["checkpoint"]["valid_used_for"]


def test_load_brings_the_history_back_and_takes_finished_runs_only(learn, tmp_path, pictures):
    learn.fit(0.01, 2)
    learn.save("a")
    learn.fit(0.01, 2)
    learn.load("a")
    learn.fit(0.01)
    assert [row["epoch"] for row in learn.history] == [0, 1, 2]
    run = tmp_path / "run"
    argv = [
        "--model.backbone",
        "tiny",
        "--model.pretrained",
        "false",
        "--data.size",
        "32",
        "--data.root",
        str(pictures),
    ]
    argv += ["--phases.head.batch_size", "4", "--workdir", str(run), "--report", "false", "--export", "false"]
    assert run_command(train_command.main, argv) == 0
    learn.load(run)
    saved = json.loads((run / "metrics.json").read_text())["errors"]
    assert learn.errors()[0] == saved
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("epochs: 3", "epochs: 30"))
    with pytest.raises(jc.UserError, match="isn't finished"):
        learn.load(run)


def test_params_are_read_only_so_that_no_answer_can_be_stale(learn):
    with pytest.raises(AttributeError):
        learn.params = {}


@pytest.mark.slow
def test_a_fit_s_own_precompute_decides_about_augmentation(learn):
    learn.data.augment = "side_on"
    learn.fit(0.01, precompute=False)
    learn.fit(0.01, precompute=True)
    assert [p.augment for p in learn.config.phases.values()] == ["side_on", "none"]
    learn.fine_tune(1, augment="flip")
    assert [p.augment for p in learn.config.phases.values()][2:] == ["none", "flip"]


def test_lr_find_takes_rates_as_fit_does(learn):
    result = learn.lr_find(1e-5, 1.0, iterations=20, lr=slice(1e-4, 1e-2))
    np.testing.assert_allclose(result.curves[0].lrs[:2], [1e-5, 1e-5 * 1e5**0.05], rtol=1e-4)


def test_auto_for_a_trained_head_never_asks_fresh_ones(learn, monkeypatch):
    """Their rate says nothing about a head that is trained."""
    learn.fit(0.01)
    asked = []
    monkeypatch.setattr("jaxcats.train.loop.find_lr", lambda *a, **k: asked.append(k) or find_lr(*a, **k))
    with contextlib.suppress(jc.RunError):  # whether its own test gives a rate is not the question here
        learn.fit("auto")
    assert asked == [{}]  # one test of the trained head, and none under several seeds


def test_a_run_of_an_older_version_lacks_keys_and_is_the_same_run():
    now = flat(Config(phases={"head": Phase(precompute=True)}))
    old = {k: v for k, v in now.items() if k.rpartition(".")[2] not in ("clip", "accumulate", "label_smoothing", "div")}
    assert training_changes(old, now) == []
    assert training_changes(now, now | {"phases.head.clip": 1.0}) == ["phases.head.clip: 0.0 -> 1.0"]
    assert training_changes(old, now | {"phases.head.clip": 1.0}) == ["phases.head.clip: 0.0 -> 1.0"]
    other = flat(Config(phases={"other": Phase(precompute=True)}))
    assert training_changes(now, other)[0] == "phases: head -> other"


def test_tta_of_an_earlier_evaluation_does_not_stay(learn, capsys):
    learn.fit(0.01)
    folder = learn.save("a")
    assert run_command(evaluate_command.main, ["--run", str(folder), "--tta", "1", "--report", "no"]) == 0
    assert "tta" in json.loads((folder / "metrics.json").read_text())
    assert run_command(evaluate_command.main, ["--run", str(folder), "--report", "no"]) == 0
    assert "tta" not in json.loads((folder / "metrics.json").read_text())
    assert not (folder / "predictions_tta.csv").exists()


def test_a_manifest_in_a_notebook_and_a_column_misspelt(pictures, tmp_path):
    classes, place = pictures / "train", tmp_path / "split.json"
    data = jc.ImageClassifierData.from_paths(classes, valid_fraction=0.2, test=None, manifest=place, on_bad_file="fail")
    assert place.is_file()
    again = jc.ImageClassifierData.from_paths(classes, valid_fraction=0.2, test=None, manifest=place, seed=7)
    assert data.val_paths == again.val_paths
    with pytest.raises(TypeError, match="lable"):
        jc.ImageClassifierData.from_paths(classes, columns={"lable": "x"})
