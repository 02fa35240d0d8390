"""Images of a data set that deserve a second look: labels that look wrong, and images unlike all others.

Every image is judged by heads that never saw it nor a copy of it: heads of the run's own kind, one per fold of the
training images, trained on cached features in one vmapped program. Images of other splits are judged by all heads.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.special import logsumexp

from jaxcats.common import stats as stats_module
from jaxcats.common.config import Phase
from jaxcats.common.errors import RunError, UserError
from jaxcats.common.io import write_bytes, write_text
from jaxcats.core import scan
from jaxcats.core.folds import fold_orders, stratified_folds
from jaxcats.data.index import FolderIndex, Split
from jaxcats.evaluate.ranking import knn_outlier_score, label_errors
from jaxcats.train.drivers import decoding
from jaxcats.train.evaluator import ARRAY_BATCH
from jaxcats.train.experiment import Experiment, PhasePlan, cache_folder_of, initial_params, make_phase, stable_number
from jaxcats.train.features import backbone_features

LESSON = Phase(precompute=True)
STRANGEST = 0.01  # share of the images listed as outliers: distances have no natural edge to cut at
SHOWN = 36  # images of each kind in the gallery


@dataclass(frozen=True)
class Suspect:
    """An image to look at.

    Attributes:
        rank: from 1; wrong-looking labels first, the surest first, then outliers, the strangest first.
        path: relative to the data folder.
        split: train, valid, ...
        label: the class it is filed under.
        suggested: the class that the heads find likeliest.
        p_label, p_suggested: probabilities of those two, from heads that never saw it.
        distance: to its tenth nearest training image (cosine, standardised features), from 0 to 2.
        reason: "label" (looks wrong), "outlier" (one of the strangest hundredth of the images), or "label, outlier".
    """

    rank: int
    path: str
    split: str
    label: str
    suggested: str
    p_label: float
    p_suggested: float
    distance: float
    reason: str


def head_recipe(phases: Mapping[str, Phase]) -> Phase:
    """How the heads are trained: as the run's last phase on features, else as the lesson's; `lr: auto` becomes 0.01."""
    found = next((p for p in reversed(list(phases.values())) if p.precompute), LESSON)
    return dataclasses.replace(found, lr=LESSON.lr if found.lr == "auto" else found.lr, accumulate=1)


def cross_validated_logits(
    setup: Experiment, phase: Phase, feats: np.ndarray, labels: np.ndarray, *, fold: np.ndarray
) -> np.ndarray:
    """Logits of every row by one head per fold, each trained without its fold, all in one program.

    Args:
        setup: gives the model and the seed.
        phase: how to train.
        feats: float32 [N, F], of the training images first.
        labels: int32 [n] of the training images.
        fold: int [n] of them, from 0 without gaps.

    Returns:
        float32 [folds, N, C].
    """
    orders = fold_orders(fold, batch_size=phase.batch_size, epochs=phase.epochs, seed=setup.config.seed)
    plan = PhasePlan(0, "folds", phase, 0, 0, orders.shape[2])
    base = jax.random.fold_in(jax.random.key(setup.config.seed), stable_number("folds"))
    n = len(labels)
    known = {"label": labels, "index": np.arange(n, dtype=np.int32), "mask": np.ones(n, bool)}

    def one(number: jax.Array, order: jax.Array, feats: jax.Array) -> jax.Array:
        key = jax.random.fold_in(base, number)
        head, stats = setup.model.init_head(jax.random.fold_in(key, stable_number("init")))
        params = {"backbone": {}, "head": head}
        step, create = make_phase(setup, plan, key=key, params=params)
        state = create(params, {"backbone": {}, "head": stats})
        state, _ = scan.make_scan(step)(state, jax.tree.map(jax.numpy.asarray, known) | {"features": feats}, order)

        def logits(row: jax.Array) -> jax.Array:
            return setup.model.apply_head(state.params, state.batch_stats, row[None], train=False)[0][0]

        return jax.lax.map(logits, feats, batch_size=ARRAY_BATCH)

    run = jax.jit(jax.vmap(one, in_axes=(0, 0, None)))
    return np.asarray(run(np.arange(len(orders)), orders.reshape(len(orders), -1, orders.shape[-1]), feats))


def out_of_fold(logits: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Log-probabilities float64 [N, C]: the mean over the heads that never saw the image.

    Args:
        logits: [folds, N, C].
        fold: int [N]; -1 for images that no head learned from.
    """
    unseen = (fold == np.arange(len(logits))[:, None]) | (fold == -1)
    return logsumexp(stats_module.log_softmax(logits), axis=0, b=unseen[..., None]) - np.log(unseen.sum(0))[:, None]


def find_suspects(run: Any, splits: Mapping[str, Split], *, folds: int = 5) -> list[Suspect]:
    """Images whose label looks wrong, and those unlike all others, in the order that Suspect says.

    Where the run's backbone has learned from the images, the pretrained one's features are used: its own know the labels.

    Args:
        run: a evaluate.run.Run.
        splits: by name, with one root; "train" is what the heads learn from, the others are only judged.
        folds: how many parts the training images are held out in.

    Raises:
        UserError: fewer different training images than folds, or a backbone that knows the labels and none in its place.
        RunError: training diverged.
    """
    train = splits["train"]
    different = len(set(train.hashes))
    if not 2 <= folds <= different:
        raise UserError(f"folds: {folds} can't be used; expected 2 to {different:,}, the different training images.")
    every = {"train": train, **splits}  # train's rows first
    names = np.repeat(list(every), [len(s) for s in every.values()])
    paths, hashes = (sum((getattr(s, field) for s in every.values()), ()) for field in ("paths", "hashes"))
    whole = Split(train.root, paths, np.concatenate([s.labels for s in every.values()]), hashes)
    index = FolderIndex(train.root, run.classes, dict(splits), (), 0.0, 0)
    setup = Experiment(run.config, index, run.model, run.preprocess, cache_folder_of(run.config))
    feats = _features(setup, run, whole)
    fold = stratified_folds(train.labels, train.hashes, folds=folds, seed=run.config.seed)
    logits = cross_validated_logits(setup, head_recipe(run.config.phases), feats, train.labels, fold=fold)
    if not np.isfinite(logits).all():
        raise RunError("The heads trained on parts of the images diverged; train the run with a lower learning rate.")
    known = dict(zip(train.hashes, fold.tolist(), strict=True))
    # A copy of a training image in another split is judged as that image is.
    log_probs = out_of_fold(logits, np.asarray([known.get(h, -1) for h in whole.hashes]))
    distance = knn_outlier_score(feats, whole.hashes, known=len(train))
    wrong = label_errors(log_probs, whole.labels).tolist()
    strange = np.argsort(-distance, kind="stable")[: math.ceil(STRANGEST * len(distance))].tolist()
    rows = list(dict.fromkeys(wrong + strange))
    probs, best = np.exp(log_probs), log_probs.argmax(1)
    return [
        Suspect(
            rank=rank,
            path=whole.paths[i],
            split=str(names[i]),
            label=run.classes[whole.labels[i]],
            suggested=run.classes[best[i]],
            p_label=float(probs[i, whole.labels[i]]),
            p_suggested=float(probs[i, best[i]]),
            distance=float(distance[i]),
            reason=", ".join(["label"] * (i in wrong) + ["outlier"] * (i in strange)),
        )
        for rank, i in enumerate(rows, start=1)
    ]


def _features(setup: Experiment, run: Any, split: Split) -> np.ndarray:
    """Features [N, F] of a backbone that hasn't seen the labels."""
    params, stats = run.state.params, run.state.batch_stats
    if any(phase.freeze != "backbone" for phase in run.config.phases.values()):
        if not run.config.model.pretrained:
            raise UserError(
                "--split train: this run's backbone learned from these very labels, so it can't judge them, and it began "
                "with random weights; give a run with model.pretrained: true."
            )
        params, stats, _ = initial_params(setup)
    got = backbone_features(
        run.model, split, params=params, batch_stats=stats, cache_dir=setup.cache, **decoding(setup)
    )
    return got.features


def write_suspects(folder: Path, suspects: Sequence[Suspect], root: Path) -> list[Path]:
    """Writes suspects.csv and figures/suspects.png, a gallery of the first of each kind, into a folder; their paths.

    Args:
        folder: where to.
        suspects: from find_suspects.
        root: the data folder, which their paths are relative to.
    """
    from jaxcats.plots import gallery

    text, image = io.StringIO(newline=""), io.BytesIO()
    out = csv.writer(text)
    out.writerow([field.name for field in dataclasses.fields(Suspect)])
    out.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in dataclasses.astuple(s)] for s in suspects)
    label, outlier = ([s for s in suspects if s.reason.startswith(kind)] for kind in ("label", "outlier"))
    shown = label[:SHOWN] + outlier[:SHOWN]
    gallery(
        [root / s.path for s in shown],
        [_words(s) for s in shown],
        wrong=[s.reason != "outlier" for s in shown],
        heading=f"{len(label):,} labels look wrong; then {len(outlier):,} images unlike the others",
    ).savefig(image, format="png", dpi=80)
    files = [folder / "suspects.csv", folder / "figures" / "suspects.png"]
    write_text(files[0], text.getvalue())
    write_bytes(files[1], image.getvalue())
    return files


def _words(s: Suspect) -> str:
    said = f"unlike others ({s.distance:.2f})" if s.reason == "outlier" else f"{s.suggested}? ({s.p_suggested:.2f})"
    return f"{s.rank}: {s.label}, {said} {Path(s.path).name}"
