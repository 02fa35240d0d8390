"""Which images of a dataset deserve a second look, and that no image is predicted by a head that has seen it."""

import csv
import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny  # noqa: F401
from PIL import Image

from jaxcats import models
from jaxcats.common.config import Config, DataConfig, ModelConfig, Phase
from jaxcats.common.errors import RunError, UserError
from jaxcats.core.folds import fold_orders, stratified_folds
from jaxcats.core.scan import epoch_order
from jaxcats.evaluate import label_errors as label_errors_module
from jaxcats.evaluate.ranking import label_errors
from jaxcats.train.experiment import Experiment, PhasePlan, initial_params, make_phase, setup, stable_number

PHASE = Phase(precompute=True, epochs=5, lr=0.1, batch_size=8)


def on_features(head: str = "linear", seed: int = 0) -> Experiment:
    """An Experiment for arrays, without images."""
    model = models.create("tiny", 2, head=head)
    return Experiment(Config(seed=seed), None, model, model.preprocess, Path())


def blobs(n: int, width: int, seed: int = 0):
    """Features of two classes that a line parts, and their labels."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 2).astype(np.int32)
    return (rng.normal(size=(n, width)) + 4 * labels[:, None]).astype(np.float32), labels


def names(n: int) -> list[str]:
    return [f"{i:064x}" for i in range(n)]


def test_folds_share_out_every_class_and_keep_copies_together():
    labels = np.repeat([0, 1, 2], [31, 12, 7])
    hashes = names(50)
    hashes[40] = hashes[3]  # a copy under another label
    hashes[5] = hashes[4]
    fold = stratified_folds(labels, hashes, folds=4, seed=0)
    assert fold[40] == fold[3]
    assert fold[5] == fold[4]
    for c, n in enumerate([30, 11, 7]):
        one_each = np.unique(np.asarray(hashes)[labels == c], return_index=True)[1]
        counts = np.bincount(fold[labels == c][one_each], minlength=4)
        assert counts.max() - counts.min() <= 2, (c, n, counts)
    assert np.array_equal(fold, stratified_folds(labels, hashes, folds=4, seed=0))
    assert not np.array_equal(fold, stratified_folds(labels, hashes, folds=4, seed=1))


def test_the_order_of_the_images_does_not_change_their_fold():
    labels, hashes, turned = np.arange(30) % 3, names(30), np.random.default_rng(0).permutation(30)
    fold = stratified_folds(labels, hashes, folds=5, seed=0)
    again = stratified_folds(labels[turned], [hashes[i] for i in turned], folds=5, seed=0)
    assert np.array_equal(again, fold[turned])


def test_no_step_sees_its_own_fold():
    fold = np.random.default_rng(0).integers(0, 3, 50)
    orders = fold_orders(fold, batch_size=8, epochs=4, seed=0)
    assert orders.shape == (3, 4, min(np.sum(fold != k) for k in range(3)) // 8, 8)
    for k, epochs in enumerate(orders):
        assert (fold[epochs] != k).all()
        assert all(len(set(rows.ravel().tolist())) == rows.size for rows in epochs)  # no row twice in an epoch
    assert fold_orders(fold, batch_size=1000, epochs=1, seed=0).shape[2] == 1  # one batch of what there is


@pytest.mark.parametrize("head", ["linear", pytest.param("lesson", marks=pytest.mark.slow)])
def test_all_folds_at_once_train_as_one_after_the_other(head):
    whole = on_features(head, seed=3)
    feats, labels = blobs(50, whole.model.feature_size)
    fold = stratified_folds(labels[:40], names(40), folds=3, seed=0)
    found = label_errors_module.cross_validated_logits(whole, PHASE, feats, labels[:40], fold=fold)
    base = jax.random.fold_in(jax.random.key(3), stable_number("folds"))
    for k in range(3):
        rows, key = np.flatnonzero(fold != k), jax.random.fold_in(base, k)
        params, stats = whole.model.init_head(jax.random.fold_in(key, stable_number("init")))
        params = {"backbone": {}, "head": params}
        step, create = make_phase(whole, PhasePlan(0, "x", PHASE, 0, 0, 26 // 8), key=key, params=params)
        state, step = create(params, {"backbone": {}, "head": stats}), jax.jit(step)
        for epoch in range(PHASE.epochs):
            for at in epoch_order(len(rows), batch_size=8, seed=3, epoch=epoch)[: 26 // 8]:
                batch = {"features": feats[rows[at]], "label": labels[rows[at]], "mask": np.ones(8, bool)}
                state, _ = step(state, batch | {"index": rows[at].astype(np.int32)})
        alone, _ = whole.model.apply_head(state.params, state.batch_stats, feats, train=False)
        np.testing.assert_allclose(found[k], alone, rtol=1e-4, atol=1e-4)


def test_a_held_out_image_leaves_no_trace():
    """Another label and other pixels for a fold, or for images outside train, change no answer of its head."""
    whole = on_features()
    feats, labels = blobs(50, 8)
    fold = stratified_folds(labels[:40], names(40), folds=4, seed=0)
    before = label_errors_module.cross_validated_logits(whole, PHASE, feats, labels[:40], fold=fold)
    held = np.append(fold == 1, np.ones(10, bool))  # fold 1 and the ten images that are only predicted
    changed = np.where(held[:, None], feats * -3 + 1, feats)
    after = label_errors_module.cross_validated_logits(
        whole, PHASE, changed, np.where(held, 1 - labels, labels)[:40], fold=fold
    )
    assert np.array_equal(before[1][~held], after[1][~held])
    assert not np.array_equal(before[0][~held], after[0][~held])


def test_each_image_is_predicted_by_the_heads_that_never_saw_it():
    probs = np.array([[[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]], [[0.3, 0.7], [0.5, 0.5], [0.2, 0.8]]])
    logits = np.log(probs) + np.array([5.0, -7.0])[:, None, None]
    found = np.exp(label_errors_module.out_of_fold(logits, np.array([0, 1, -1])))
    np.testing.assert_allclose(found, [[0.9, 0.1], [0.5, 0.5], [0.4, 0.6]])
    sure = label_errors_module.out_of_fold(np.array([[[0.0, 2000.0]]]), np.array([0]))
    assert np.isfinite(sure).all()


def test_flipped_labels_come_first():
    whole = on_features()
    feats, labels = blobs(90, 8)
    flipped = [3, 8, 31, 40]
    noisy = labels.copy()
    noisy[flipped] = 1 - noisy[flipped]
    fold = stratified_folds(noisy, names(90), folds=5, seed=0)
    longer = dataclasses.replace(PHASE, epochs=20)
    log_probs = label_errors_module.out_of_fold(
        label_errors_module.cross_validated_logits(whole, longer, feats, noisy, fold=fold), fold
    )
    assert sorted(label_errors(log_probs, noisy)[:4].tolist()) == flipped


def test_the_heads_are_trained_as_the_run_trained_its_own():
    mine, other = Phase(precompute=True, epochs=7, accumulate=4), Phase(freeze="nothing")
    assert label_errors_module.head_recipe({"head": mine, "all": other}) == dataclasses.replace(mine, accumulate=1)
    assert label_errors_module.head_recipe({"all": other}) == Phase(precompute=True)
    assert label_errors_module.head_recipe({"head": Phase(precompute=True, lr="auto")}).lr == 0.01


def write_folder(root: Path) -> Path:
    """Dark and light images; two in the wrong folder, one of them copied from train to valid."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 20), ("valid", 10)):
        for name, level in (("dark", 60), ("light", 190)):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.normal(level, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i:02}.png")
    (root / "train/dark/05.png").rename(root / "train/light/planted.png")
    (root / "valid/light/05.png").rename(root / "valid/dark/planted.png")
    shutil.copy(root / "train/light/planted.png", root / "valid/light/copy.png")
    return root


@pytest.fixture
def run(tmp_path):
    """What find_suspects takes of a Run, over a folder with planted images; nothing needs to be trained for it."""
    root = write_folder(tmp_path / "data")
    config = Config(
        data=DataConfig(str(root), size=32),
        model=ModelConfig("tiny", "linear", pretrained=False),
        phases={"head": dataclasses.replace(PHASE, epochs=30)},
    )
    whole = setup(config)
    params, batch_stats, _ = initial_params(whole)
    return SimpleNamespace(
        config=config,
        model=whole.model,
        preprocess=whole.preprocess,
        classes=whole.index.classes,
        params=params,
        batch_stats=batch_stats,
        index=whole.index,
    )


def test_planted_images_are_listed_and_written(run, tmp_path):
    found = label_errors_module.find_suspects(run, run.index.splits)
    assert [s.rank for s in found] == list(range(1, len(found) + 1))
    assert len(found) <= 6  # of 61
    by_path = {s.path: s for s in found}
    for path, split, label, suggested in (
        ("train/light/planted.png", "train", "light", "dark"),
        ("valid/dark/planted.png", "valid", "dark", "light"),
        ("valid/light/copy.png", "valid", "light", "dark"),
    ):
        s = by_path[path]
        assert (s.split, s.label, s.suggested) == (split, label, suggested)
        assert s.reason.startswith("label")
        assert s.p_label < 0.5 < s.p_suggested
    copied, copy = by_path["train/light/planted.png"], by_path["valid/light/copy.png"]
    assert (copied.p_label, copied.distance) == pytest.approx((copy.p_label, copy.distance), rel=1e-5)
    strange = [s for s in found if s.reason.endswith("outlier")]
    assert len(strange) == 1  # a hundredth, at least one
    assert strange[0].distance == max(s.distance for s in found)
    reasons = [s.reason.split(",")[0] for s in found]
    assert reasons == sorted(reasons)  # labels, then outliers

    label_errors_module.write_suspects(tmp_path / "out", found, run.index.root)
    files = [tmp_path / "out" / name for name in ("suspects.csv", "figures/suspects.png")]
    rows = list(csv.DictReader(files[0].open(newline="", encoding="utf-8")))
    assert list(rows[0]) == [f.name for f in dataclasses.fields(label_errors_module.Suspect)]
    assert [r["path"] for r in rows] == [s.path for s in found]
    np.testing.assert_allclose([float(r["p_label"]) for r in rows], [s.p_label for s in found], rtol=1e-5)
    assert Image.open(files[1]).width > 300

    label_errors_module.write_suspects(tmp_path / "none", [], run.index.root)
    files = [tmp_path / "none" / name for name in ("suspects.csv", "figures/suspects.png")]
    assert files[0].read_text().startswith("rank,path")
    assert files[1].is_file()


def test_a_backbone_that_knows_the_labels_is_not_asked(run, monkeypatch):
    used = []

    def watched(model, split, *, params, **how):
        used.append(params)
        return SimpleNamespace(features=np.random.default_rng(0).normal(size=(len(split), 8)).astype(np.float32))

    monkeypatch.setattr(label_errors_module, "backbone_features", watched)
    pretrained = jax.tree.map(np.zeros_like, run.params)
    monkeypatch.setattr(label_errors_module, "initial_params", lambda setup: (pretrained, run.batch_stats, {}))
    run.config = dataclasses.replace(run.config, model=ModelConfig("tiny", "linear", pretrained=True))
    label_errors_module.find_suspects(run, run.index.splits)
    run.config = dataclasses.replace(run.config, phases=run.config.phases | {"all": Phase(freeze="first")})
    label_errors_module.find_suspects(run, run.index.splits)
    jax.tree.map(np.testing.assert_array_equal, used[0], run.params)
    assert used[1] is pretrained
    run.config = dataclasses.replace(run.config, model=ModelConfig("tiny", "linear", pretrained=False))
    with pytest.raises(UserError, match="learned from these labels"):
        label_errors_module.find_suspects(run, run.index.splits)


@pytest.mark.parametrize("folds", [1, 41])
def test_impossible_folds_are_refused(run, folds):
    with pytest.raises(UserError, match=f"folds: {folds} can't be used; expected 2 to 40"):
        label_errors_module.find_suspects(run, run.index.splits, folds=folds)


def test_heads_that_diverge_say_so(run, monkeypatch):
    monkeypatch.setattr(
        label_errors_module,
        "label_blind_features",
        lambda setup, run, split: np.full((len(split), 8), np.nan, np.float32),
    )
    with pytest.raises(RunError, match="diverged"):
        label_errors_module.find_suspects(run, run.index.splits)


@pytest.mark.slow
def test_real_photos_that_are_wrong_are_listed(photos, tmp_path):
    """A dog filed as a cat, a cat as a dog, a logo, a shelter's lobby, and a figurine."""
    config = Config(data=DataConfig(str(photos)), model=ModelConfig("efficientnet_lite0"))
    whole = setup(config)
    params, batch_stats, _ = initial_params(whole)
    run = SimpleNamespace(config=config, model=whole.model, preprocess=whole.preprocess, classes=whole.index.classes)
    run.params, run.batch_stats = params, batch_stats
    found = {Path(s.path).stem: s.reason for s in label_errors_module.find_suspects(run, whole.index.splits)}
    assert len(found) <= 0.06 * 3000
    assert found["cat.4085"].startswith("label")
    assert found["dog.4334"].startswith("label")
    for name in ("dog.4367", "cat.4338", "cat.92"):
        assert found[name].endswith("outlier")
