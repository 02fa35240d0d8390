"""`evaluate --split train`: labels that look wrong and images unlike all others, ranked into suspects.csv.

Every image is predicted by heads that never saw it or a copy of it: heads like the run's own, one per fold of the training
images, trained on cached features in one vmapped program. All heads predict the images of other splits.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from scipy.special import logsumexp

from jaxcats.common.config import Phase
from jaxcats.common.errors import RunError, UserError
from jaxcats.common.stats import log_softmax
from jaxcats.core import scan
from jaxcats.core.folds import fold_orders, stratified_folds
from jaxcats.data.index import FolderIndex, Split
from jaxcats.evaluate.predictions import write_csv
from jaxcats.evaluate.ranking import knn_outlier_score, label_errors
from jaxcats.evaluate.run import Run
from jaxcats.train.drivers import decoding
from jaxcats.train.evaluator import ARRAY_BATCH
from jaxcats.train.experiment import Experiment, PhasePlan, cache_folder_of, initial_params, make_phase, stable_number
from jaxcats.train.features import backbone_features

LESSON = Phase(precompute=True)
OUTLIERS = 0.01  # share of the images that is listed as outliers: distances have no natural threshold
SHOWN = 36  # images of each kind in the gallery


@dataclass(frozen=True)
class Suspect:
    """An image to look at; a row of suspects.csv.

    Attributes:
        rank: from 1; labels that look wrong come first, the most confident first, then outliers, the farthest first.
        path: relative to the data folder.
        split: train, valid, ...
        label: the class that it is filed under.
        suggested: the class that the heads find likeliest.
        p_label, p_suggested: probabilities of those two, from heads that never saw the image.
        distance: to its tenth nearest training image (cosine, standardised features), from 0 to 2.
        reason: "label" (looks wrong), "outlier" (among the farthest hundredth of the images), or "label, outlier".
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


def find_suspects(run: Run, splits: Mapping[str, Split], *, folds: int = 5) -> list[Suspect]:
    """The images whose label looks wrong, and those unlike all others, in the order that `Suspect` gives.

    If the run trained its backbone, the pretrained one's features are used, because the trained one saw the labels.

    Args:
        run: a trained run.
        splits: by name, with one root; the heads learn from "train", and only predict the others.
        folds: number of parts that the training images are held out in.

    Raises:
        UserError: fewer different training images than folds, or a trained backbone without a pretrained one to
            replace it.
        RunError: training diverged.
    """
    train = splits["train"]
    different = len(set(train.hashes))
    if not 2 <= folds <= different:
        raise UserError(f"folds: {folds} can't be used; expected 2 to {different:,}, the different training images.")
    splits = {"train": train, **splits}  # the rows of train come first
    names = [name for name, split in splits.items() for _ in split.paths]
    labels = np.concatenate([split.labels for split in splits.values()])
    paths = tuple(path for split in splits.values() for path in split.paths)
    hashes = tuple(h for split in splits.values() for h in split.hashes)
    images = Split(train.root, paths, labels, hashes)
    index = FolderIndex(train.root, run.classes, dict(splits), (), 0.0, 0)
    setup = Experiment(run.config, index, run.model, run.preprocess, cache_folder_of(run.config))
    features = label_blind_features(setup, run, images)
    fold = stratified_folds(train.labels, train.hashes, folds=folds, seed=run.config.seed)
    logits = cross_validated_logits(setup, head_recipe(run.config.phases), features, train.labels, fold=fold)
    if not np.isfinite(logits).all():
        raise RunError("The heads trained on parts of the images diverged; train the run with a lower learning rate.")
    # A copy of a training image in another split gets the fold of that image.
    fold_of = dict(zip(train.hashes, fold.tolist(), strict=True))
    log_probs = out_of_fold(logits, np.asarray([fold_of.get(h, -1) for h in hashes]))
    distance = knn_outlier_score(features, hashes, known=len(train))
    wrong = label_errors(log_probs, labels).tolist()
    outliers = np.argsort(-distance, kind="stable")[: math.ceil(OUTLIERS * len(distance))].tolist()
    probs, best = np.exp(log_probs), log_probs.argmax(1)
    suspects = []
    for rank, i in enumerate(dict.fromkeys(wrong + outliers), start=1):
        reason = "outlier" if i not in wrong else "label, outlier" if i in outliers else "label"
        p_label, p_suggested = float(probs[i, labels[i]]), float(probs[i, best[i]])
        classes = run.classes[labels[i]], run.classes[best[i]]
        suspects.append(Suspect(rank, paths[i], names[i], *classes, p_label, p_suggested, float(distance[i]), reason))
    return suspects


def label_blind_features(setup: Experiment, run: Run, images: Split) -> np.ndarray:
    """Features [N, F] from a backbone that hasn't seen the labels."""
    params, batch_stats = run.params, run.batch_stats
    if any(phase.freeze != "backbone" for phase in run.config.phases.values()):
        if not run.config.model.pretrained:
            raise UserError("--split train: the backbone learned from these labels; train with model.pretrained: true.")
        params, batch_stats, _ = initial_params(setup)
    weights = {"params": params, "batch_stats": batch_stats}
    return backbone_features(run.model, images, cache_dir=setup.cache, **weights, **decoding(setup)).features


def head_recipe(phases: Mapping[str, Phase]) -> Phase:
    """How the heads are trained: as the run's last phase on features, else as the lesson's; `lr: auto` becomes 0.01."""
    phase = next((p for p in reversed(list(phases.values())) if p.precompute), LESSON)
    return dataclasses.replace(phase, lr=LESSON.lr if phase.lr == "auto" else phase.lr, accumulate=1)


def cross_validated_logits(
    setup: Experiment, phase: Phase, features: np.ndarray, labels: np.ndarray, *, fold: np.ndarray
) -> np.ndarray:
    """Logits of every row by one head per fold, each trained without its fold, all in one program.

    Args:
        setup: gives the model and the seed.
        phase: how to train.
        features: float32 [N, F], those of the training images first.
        labels: int32 [n] of the training images.
        fold: int [n] of the training images, from 0 without gaps.

    Returns:
        float32 [folds, N, C].
    """
    orders = fold_orders(fold, batch_size=phase.batch_size, epochs=phase.epochs, seed=setup.config.seed)
    plan = PhasePlan(0, "folds", phase, 0, 0, orders.shape[2])
    base = jax.random.fold_in(jax.random.key(setup.config.seed), stable_number("folds"))
    n = len(labels)
    arrays = {"label": labels, "index": np.arange(n, dtype=np.int32), "mask": np.ones(n, bool)}

    def train_and_predict(number: jax.Array, order: jax.Array, features: jax.Array) -> jax.Array:
        key = jax.random.fold_in(base, number)
        head, batch_stats = setup.model.init_head(jax.random.fold_in(key, stable_number("init")))
        params = {"backbone": {}, "head": head}
        step, create = make_phase(setup, plan, key=key, params=params)
        state = create(params, {"backbone": {}, "head": batch_stats})
        dataset = jax.tree.map(jax.numpy.asarray, arrays) | {"features": features}
        state, _ = scan.make_scan(step)(state, dataset, order)

        def logits(row: jax.Array) -> jax.Array:
            return setup.model.apply_head(state.params, state.batch_stats, row[None], train=False)[0][0]

        return jax.lax.map(logits, features, batch_size=ARRAY_BATCH)

    program = jax.jit(jax.vmap(train_and_predict, in_axes=(0, 0, None)))
    steps = orders.reshape(len(orders), -1, orders.shape[-1])
    return np.asarray(program(np.arange(len(orders)), steps, features))


def out_of_fold(logits: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Log-probabilities float64 [N, C]: the mean over the heads that never saw the image.

    Args:
        logits: [folds, N, C].
        fold: int [N]; -1 for images that no head learned from.
    """
    unseen = (fold == np.arange(len(logits))[:, None]) | (fold == -1)
    return logsumexp(log_softmax(logits), axis=0, b=unseen[..., None]) - np.log(unseen.sum(0))[:, None]


def write_suspects(folder: Path, suspects: Sequence[Suspect], root: Path) -> None:
    """Writes suspects.csv and figures/suspects.png, a gallery of the first of each kind, into a folder.

    Args:
        folder: where to.
        suspects: from find_suspects.
        root: the data folder, which their paths are relative to.
    """
    from jaxcats import plots

    rows = [[f"{x:.6g}" if isinstance(x, float) else x for x in dataclasses.astuple(s)] for s in suspects]
    write_csv(folder / "suspects.csv", [[field.name for field in dataclasses.fields(Suspect)], *rows])
    wrong, outliers = ([s for s in suspects if s.reason.startswith(kind)] for kind in ("label", "outlier"))
    shown = wrong[:SHOWN] + outliers[:SHOWN]
    titles = []
    for s in shown:
        doubt = f"unlike others ({s.distance:.2f})" if s in outliers else f"{s.suggested}? ({s.p_suggested:.2f})"
        titles.append(f"{s.rank}: {s.label}, {doubt} {Path(s.path).name}")
    heading = f"{len(wrong):,} labels look wrong; then {len(outliers):,} images unlike the others"
    figure = plots.gallery([root / s.path for s in shown], titles, wrong=[s in wrong for s in shown], heading=heading)
    plots.write(figure, folder / "figures" / "suspects.png", dpi=80)
