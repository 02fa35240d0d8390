"""The notebook face: it does what the command does, keeps what it should, and says what is wrong."""

import csv
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny  # noqa: F401
from folders import write_images

import jaxcats as jc
from jaxcats.common.cli import run_command
from jaxcats.common.stats import log_softmax
from jaxcats.core.state import tree_hash
from jaxcats.evaluate import __main__ as evaluate_command
from jaxcats.learner.learner import spread
from jaxcats.train import __main__ as train_command


@pytest.fixture
def data(pictures):
    (pictures / "test1").mkdir()
    for i, path in enumerate(sorted((pictures / "valid" / "cats").iterdir())[:3]):
        (pictures / "test1" / f"{i}.jpg").write_bytes(path.read_bytes())
    return jc.ImageClassifierData.from_paths(pictures, size=32, batch_size=4)


@pytest.fixture
def learn(data, tmp_path):
    return jc.Learner.pretrained("tiny", data, precompute=True, pretrained=False, workdir=tmp_path / "kept")


def weights_of(learn):
    return tree_hash(jax.device_get((learn.params, learn.batch_stats)))


def test_the_three_lines_do_what_the_command_does(pictures, learn, tmp_path, capsys):
    learn.fit(0.01, 3)
    table = capsys.readouterr().out
    argv = ["--model.backbone", "tiny", "--model.pretrained", "false", "--data.size", "32", "--phases.head.batch_size"]
    argv += [
        "4",
        "--data.root",
        str(pictures),
        "--workdir",
        str(tmp_path / "run"),
        "--report",
        "false",
        "--export",
        "false",
    ]
    assert run_command(train_command.main, argv) == 0
    with (tmp_path / "run" / "predictions.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [r["path"] for r in rows] == [p.relative_to(pictures).as_posix() for p in learn.data.val_paths]
    found = [[float(f"{p:.9g}") for p in row] for row in np.exp(learn.predict())]
    assert found == [[float(r["p_cats"]), float(r["p_dogs"])] for r in rows]
    for line, row in zip(table.splitlines()[1:4], learn.history, strict=True):
        assert f"{row['valid_loss']:.5f}" in line
        assert f"{row['errors']} of 10" in line


def test_data_says_what_there_is(data, pictures):
    assert data.classes == ("cats", "dogs")
    assert (len(data.trn_y), len(data.val_y), len(data.test_paths)) == (24, 10, 3)
    assert data.val_paths[0] == pictures / "valid" / "cats" / "cats.0.jpg"
    assert "24 train, 10 valid, 3 test images in 2 classes" in repr(data)
    np.testing.assert_array_equal(data.val_y, [p.parent.name == "dogs" for p in data.val_paths])
    with pytest.raises(jc.UserError, match="There are no 'tests' images; there are train, valid, test"):
        data.split("tests")
    with pytest.raises(jc.UserError, match="side_on"):
        jc.ImageClassifierData.from_paths(pictures, augment="sideways")


def test_predictions_are_log_probabilities_in_the_order_of_the_files(learn):
    learn.fit(0.05)
    for split, n in (("valid", 10), ("train", 24), ("test", 3)):
        found = learn.predict(split)
        assert found.shape == (n, 2)
        np.testing.assert_allclose(np.exp(found).sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(learn.predict("test"), learn.predict()[:3], atol=1e-6)  # the same images
    wrong = (learn.predict().argmax(1) != learn.data.val_y).sum()
    assert learn.errors() == (wrong, 10)
    assert jc.sentence(*learn.errors()).startswith(f"{wrong} error")


def test_switching_precompute_off_changes_the_way_and_not_the_answers(learn):
    learn.fit(0.05, 2)
    before = learn.predict()
    learn.precompute = False
    learn._logits = {}
    np.testing.assert_allclose(learn.predict(), before, rtol=1e-6, atol=1e-5)


def test_frozen_layers_keep_their_bits_until_they_are_unfrozen(learn):
    def changed(before):
        old, new = (jax.tree_util.tree_leaves_with_path(t["backbone"]) for t in (before, learn.params))
        return {path[0].key for (path, a), (_, b) in zip(old, new, strict=True) if not np.array_equal(a, b)}

    start = learn.params
    learn.fit(0.05)
    assert changed(start) == set()
    learn.freeze_to(1)
    assert not learn.precompute
    learn.fit([1e-3, 1e-2, 1e-1])
    assert changed(start) == {"conv1", "bn1", "conv2", "bn2"}  # the first group is conv0 and bn0
    middle = learn.params
    learn.unfreeze()
    learn.fit(slice(1e-3, 1e-1), batch_size=8)
    assert changed(middle) >= {"conv0", "conv1", "conv2"}
    with pytest.raises(jc.UserError, match="frozen backbone"):
        learn.precompute = True
    learn.freeze()
    learn.precompute = True
    learn.fit(0.01)


def test_epochs_and_cycles_go_on_from_fit_to_fit(learn):
    learn.fit(0.01, 2)
    learn.fit(0.01, 3, cycle_len=1, cycle_mult=2)
    assert [row["epoch"] for row in learn.history] == list(range(9))
    assert [row["step"] for row in learn.history] == [6 * (i + 1) for i in range(9)]
    rates = [row["lr"] for row in learn.sched.rows if "lr" in row]
    assert len(rates) == 7 * 6
    assert rates[0] == pytest.approx(1e-4)  # the first cycle's warm-up
    assert rates[6] == rates[18] == pytest.approx(0.01)


def test_the_best_epoch_can_be_kept(learn):
    learn.fit(0.3, 6, keep="best")
    best = min(learn.history, key=lambda r: (r["errors"], r["valid_loss"]))
    assert learn.errors()[0] == best["errors"]
    losses = -learn.predict()[np.arange(10), learn.data.val_y]
    np.testing.assert_allclose(losses.mean(), best["valid_loss"], rtol=1e-5)
    with pytest.raises(jc.UserError, match="keep"):
        learn.fit(0.1, keep="first")


def test_a_fit_that_fails_leaves_no_trace(learn):
    learn.fit(0.01)
    before, history = weights_of(learn), list(learn.history)
    with pytest.raises(jc.RunError, match="the loss is nan"):
        learn.fit(1e30, 2)
    with pytest.raises(jc.UserError, match=r"Did you mean 'momentum'"):
        learn.fit(0.01, momentun=0.8)
    with pytest.raises(jc.UserError, match="lr"):
        learn.fit((0.1, 0.2))
    assert weights_of(learn) == before
    assert learn.history == history
    learn.fit(0.01)
    assert learn.history[-1]["epoch"] == 1


def test_save_and_load(learn, data, tmp_path, capsys):
    learn.fit(0.05, 2)
    folder, before, answers = learn.save("a"), weights_of(learn), learn.predict()
    learn.fit(0.05)
    assert weights_of(learn) != before
    learn.load("a")
    assert weights_of(learn) == before
    np.testing.assert_array_equal(learn.predict(), answers)
    learn.save("a")  # again, over its own
    assert run_command(evaluate_command.main, ["--run", str(folder), "--report", "no"]) == 0
    assert jc.sentence(*learn.errors()) in capsys.readouterr().out
    with pytest.raises(jc.UserError, match="holds nothing"):
        learn.load("b")
    (tmp_path / "kept" / "mine").mkdir()
    with pytest.raises(jc.UserError, match="another name"):
        learn.save("mine")
    other = jc.Learner.pretrained("tiny", data, head="linear", pretrained=False, workdir=tmp_path / "kept")
    with pytest.raises(jc.UserError, match="lesson head"):
        other.load("a")


def test_save_works_before_any_fit(learn):
    before = weights_of(learn)
    learn.save("fresh")
    learn.fit(0.1)
    learn.load("fresh")
    assert weights_of(learn) == before


def test_what_was_done_can_be_done_again_by_the_command(learn, tmp_path, pictures):
    learn.fit(0.05, 2)
    learn.precompute = False
    learn.data.augment = "side_on"
    learn.unfreeze()
    learn.fit_one_cycle(1, [1e-3, 1e-2, 1e-1], label_smoothing=0.1)
    folder = learn.save("all")
    argv = [
        "--config",
        str(folder / "config.yaml"),
        "--workdir",
        str(tmp_path / "again"),
        "--report",
        "false",
        "--export",
        "false",
    ]
    assert run_command(train_command.main, argv) == 0
    rows = list(csv.DictReader((tmp_path / "again" / "predictions.csv").open()))
    found = [[float(r["p_cats"]), float(r["p_dogs"])] for r in rows]
    np.testing.assert_allclose(np.exp(learn.predict()), found, rtol=1e-5)


def test_fine_tune_has_two_one_cycle_phases(learn):
    learn.fine_tune(2, base_lr=0.1)
    first, second = learn.config.phases.values()
    assert (first.freeze, first.schedule, first.warmup, first.epochs, first.lr) == (
        "backbone",
        "one_cycle",
        0.99,
        1,
        0.1,
    )
    assert (second.freeze, second.warmup, second.div, second.epochs) == ("nothing", 0.3, 5.0, 2)
    np.testing.assert_allclose(second.lr, (0.05 / 100, 0.05 / 10, 0.05), rtol=1e-9)
    assert first.momentum == second.momentum == (0.95, 0.85, 0.95)


def test_rates_as_fastai_writes_them():
    assert spread(0.1) == 0.1
    assert spread(slice(0.1)) == pytest.approx((0.01, 0.01, 0.1))
    assert spread(slice(1e-4, 1e-2)) == pytest.approx((1e-4, 1e-3, 1e-2))
    assert spread(np.array([1e-4, 1e-3, 1e-2])) == (1e-4, 1e-3, 1e-2)
    assert spread("auto") == "auto"
    with pytest.raises(jc.UserError, match="slice"):
        spread(slice(None))


def test_lr_find_changes_nothing_and_plots(learn):
    before = weights_of(learn)
    result = learn.lr_find(iterations=40)
    assert weights_of(learn) == before
    assert learn.history == []
    lrs = result.curves[0].lrs
    assert len(lrs) <= 40
    np.testing.assert_allclose(lrs[:3], 1e-7 * 1e8 ** (np.arange(3) / 40), rtol=1e-5)
    assert learn.sched.plot()._repr_png_()[:4] == b"\x89PNG"
    assert learn.sched.plot_lr().axes
    band = learn.lr_find(iterations=40, seeds=3)
    assert len(band.curves) == 3
    alone = learn.lr_find(iterations=40).curves[0]
    n = min(len(alone.losses), len(band.curves[0].losses), 20)
    np.testing.assert_allclose(band.curves[0].losses[:n], alone.losses[:n], rtol=1e-3)  # seed 0 is the run's own
    learn.precompute = False
    assert (
        len(learn.lr_find(iterations=7, batch_size=8).curves[0].lrs) == 7
    )  # images, in chunks of ten, gone through thrice
    with pytest.raises(jc.UserError, match="precompute"):
        learn.lr_find(seeds=3)
    with pytest.raises(jc.UserError, match="start"):
        learn.lr_find(1.0, 0.1)


def test_images_and_features_give_the_same_range_test(learn):
    features = learn.lr_find(1e-5, 1.0, iterations=12).curves[0]
    learn.precompute = False
    pictures = learn.lr_find(1e-5, 1.0, iterations=12).curves[0]
    np.testing.assert_allclose(pictures.losses, features.losses, rtol=1e-3)


def test_tta_averages_the_plain_answer_and_the_changed_ones(learn):
    learn.fit(0.002, 1)
    plain = learn.predict()
    np.testing.assert_allclose(learn.TTA(2, weight=1.0), plain, atol=1e-6)
    changed = np.exp(learn.TTA(2, weight=0.0))
    np.testing.assert_allclose(changed.sum(1), 1, rtol=1e-5)
    assert np.abs(changed - np.exp(plain)).max() > 1e-4
    np.testing.assert_allclose(np.exp(learn.TTA(2)), np.exp(plain) / 3 + changed * 2 / 3, atol=1e-6)
    np.testing.assert_array_equal(learn.TTA(2), learn.TTA(2))
    np.testing.assert_array_equal(learn.TTA(0), plain)
    assert learn.TTA(1, split="test").shape == (3, 2)
    for bad in ({"n": -1}, {"weight": 2.0}, {"augment": "none"}):
        with pytest.raises(jc.UserError):
            learn.TTA(**bad)


def test_galleries_choose_and_draw(learn):
    learn.fit(0.02, 2)
    predicted, y = learn.predict().argmax(1), learn.data.val_y
    for correct in (True, False):
        rows = learn.rand_by_correct(correct, n=10)
        assert set(rows) == set(np.flatnonzero((predicted == y) == correct))
    rows = learn.most_by_correct("dogs", True, n=3)
    assert (y[rows] == 1).all()
    np.testing.assert_array_equal(rows, learn.most_by_correct(1, True, n=3))
    assert len(learn.most_uncertain(n=4)) == len(learn.top_losses(n=4)) == 4
    figure = learn.plot_val_with_title(learn.most_uncertain(), "Most uncertain")
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert len(titles) == 4
    assert all(t.startswith("dogs: 0.") for t in titles)
    assert learn.plot_val_with_title([], "Nothing")._repr_png_()
    with pytest.raises(jc.UserError, match="Did you mean 'dogs'"):
        learn.most_by_correct("dog", True)
    assert learn.data.show_batch(4).axes
    learn.data.augment = "side_on"
    assert learn.data.show_augmented(0, 4).axes
    assert learn.sched.plot_loss().axes


def test_more_than_two_classes(tmp_path):
    root = write_images(tmp_path / "three", train=24, valid=9, classes=("a", "b", "c"))
    learn = jc.Learner.pretrained(
        "tiny", jc.ImageClassifierData.from_paths(root, size=32, batch_size=4), pretrained=False
    )
    learn.fit(0.01)
    assert learn.predict().shape == (9, 3)
    titles = [ax.get_title() for ax in learn.plot_val_with_title(range(9)).axes if ax.get_title()]
    assert all(t.replace("\n", " ").split(":")[0] in "abc" for t in titles)
    assert any("(is " in t for t in titles) == (learn.errors()[0] > 0)


def test_plots_before_anything_was_run_say_what_to_do(learn):
    with pytest.raises(jc.UserError, match="lr_find"):
        learn.sched.plot()
    with pytest.raises(jc.UserError, match=r"learn\.fit"):
        learn.sched.plot_lr()


def test_question_mark_and_tab_are_worth_pressing():
    for cls in (jc.Learner, jc.ImageClassifierData):
        public = {n: m for n, m in inspect.getmembers(cls) if not n.startswith("_") and callable(m)}
        assert public
        for name, member in public.items():
            assert len(inspect.getdoc(member) or "") > 20, name
    assert {"fit", "lr_find", "TTA", "most_by_correct", "unfreeze", "predict"} <= set(dir(jc.Learner))


def test_a_user_error_is_one_line_in_a_notebook():
    assert jc.UserError("size: too small.")._render_traceback_() == ["UserError: size: too small."]


def test_importing_the_package_loads_nothing():
    code = "import sys, jaxcats; dir(jaxcats); print('jax' in sys.modules, 'matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_log_softmax_of_logits_is_what_predict_gives(learn):
    np.testing.assert_array_equal(learn.predict(), log_softmax(learn.logits()))


@pytest.mark.slow
def test_the_readme_s_lines_in_a_fresh_session_with_a_local_resnet34(tmp_path):
    """The lesson's layout, the real depth; random weights in a file under torch's names."""
    from safetensors.numpy import save_file

    write_images(tmp_path / "data" / "dogscats", train=16, valid=8, size=(260, 240))
    model = jc.models.create("resnet34", 1000, head="classifier")
    save_file(jc.models.to_state_dict(model, *model.init(jax.random.key(0))), tmp_path / "resnet34.safetensors")
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "Learner" in block)
    assert code.count("precompute=True)") == 1
    code = code.replace("precompute=True)", 'precompute=True, weights="resnet34.safetensors")')
    code += "print(learn.predict().shape, jc.sentence(*learn.errors()))\n"
    done = subprocess.run([sys.executable], input=code, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "(8, 2)" in done.stdout
    assert done.stdout.count("fit1") == 3
