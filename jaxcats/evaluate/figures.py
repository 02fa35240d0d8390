"""The class heat map: where a network looked when it said what it said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcats import plots
from jaxcats.common import stats
from jaxcats.common.stats import percent
from jaxcats.data.images import evaluation_pixels
from jaxcats.evaluate import calibration, ranking
from jaxcats.train.epoch_table import best_epoch

if TYPE_CHECKING:
    from jaxcats.models import Model


def grad_cam(model: "Model", params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """How much each place of the last feature map speaks for a class: float32 [N,h,w], from 0 to 1 in each image.

    Grad-CAM (Selvaraju et al., arXiv:1610.02391): the feature map's channels, each weighted with the mean gradient of
    the class's logit, are added up, and what speaks against the class is cut off. It works for any backbone and head,
    because it needs no more than the logit's gradient. An image where nothing speaks for the class gives zeros. In a
    model that computes in bfloat16 only the feature map is as coarse as that; the gradient and the sum are float32.

    Args:
        model: from `models.create`.
        params: its parameters.
        batch_stats: likewise.
        images: float32 [N,H,W,3], normalised as `model.preprocess` says.
        labels: int [N], the class to ask about in each image: the predicted one, or any other.
    """
    feature_map = model.feature_map(params, batch_stats, images)

    def score(feature_map: jax.Array) -> jax.Array:
        logits = model.apply_map(params, batch_stats, feature_map)
        # An image's logits depend on that image alone, so one gradient of the sum is every image's own.
        return jnp.take_along_axis(logits, labels[:, None], axis=-1).sum()

    weights = jax.grad(score)(feature_map).mean((1, 2), keepdims=True)
    heat = jax.nn.relu((weights * feature_map).sum(-1))
    most = heat.max((1, 2), keepdims=True)
    return jnp.where(most > 0, heat / jnp.where(most > 0, most, 1), 0)


PER_CLASS = 4  # images of each class in a gallery
CLASSES = 10  # of the gallery that has a row per class
LOOKED_AT = 4  # top losses, and as many of the surest answers, with a heat map


@dataclass(frozen=True)
class EvaluatedSplit:
    """A split with the answers of a run.

    Attributes:
        run: evaluate.run.Run.
        split: N images, all labelled.
        logits: [N, C].
        found: metrics.json's content.
    """

    run: Any
    split: Any
    logits: np.ndarray
    found: Mapping[str, Any]

    @cached_property
    def log_probs(self) -> np.ndarray:
        """Log-probabilities [N, C] as predict gives them: after the temperature."""
        return stats.log_softmax(self.logits / self.found["calibration"]["temperature"])

    @cached_property
    def out_of_fold(self) -> np.ndarray:
        """The same; where the temperature was fitted on these images, each with the temperature of the other folds."""
        folds = self.found["calibration"].get("folds")
        fitted = self.found["calibration"]["fitted_on_these_pictures"]
        return (
            calibration.out_of_fold(self.logits, self.split.labels, folds=folds)[0]
            if fitted and folds
            else self.log_probs
        )

    @property
    def right(self) -> np.ndarray:
        """bool [N]."""
        return self.logits.argmax(1) == self.split.labels

    def file(self, row: int) -> Path:
        """Where an image is."""
        return self.split.root / self.split.paths[row]


def training_rows(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; none where the run has none."""
    from jaxcats.train.run_folder import RunLog

    try:
        return RunLog.rows(run / "metrics.jsonl")
    except OSError:
        return []


def of_training(run: Path) -> dict[str, plots.Figure]:
    """Losses and learning rate of a run."""
    rows = training_rows(run)
    if not any("loss" in row for row in rows):
        return {}
    return {"losses": plot_losses(rows), "learning_rate": plot_learning_rates(rows)}


def plot_losses(rows: Sequence[Mapping[str, Any]], *, first_step: int = 0) -> plots.Figure:
    """Training loss by step, counted from `first_step`, with the validation loss of each epoch; `rows` as in metrics.jsonl."""
    steps, epochs = [row for row in rows if "loss" in row], [row for row in rows if "valid_loss" in row]
    return plots.losses(
        [row["step"] - first_step for row in steps],
        [row["loss"] for row in steps],
        [row["step"] - first_step for row in epochs],
        [row["valid_loss"] for row in epochs],
        best=best_epoch(epochs) if epochs else None,
    )


def plot_learning_rates(rows: Sequence[Mapping[str, Any]], *, momentum: Any = None) -> plots.Figure:
    """Learning rate by step of each layer group where they differ; with the momentum where that is a schedule."""
    lrs = [row["lr"] for row in rows if "loss" in row]
    groups = ("early layers", "late layers", "head layers")
    curves: Any = lrs
    if any(
        isinstance(lr, list) for lr in lrs
    ):  # One phase may have a rate for all groups, and another a rate for each.
        by_group = np.array([lr if isinstance(lr, list) else [lr] * len(groups) for lr in lrs])
        curves = dict(zip(groups, by_group.T, strict=True))
    moments = [np.asarray(momentum(t)).item() for t in range(len(lrs))] if callable(momentum) else None
    return plots.learning_rates(curves, momentum=moments)


def of_numbers(judged: EvaluatedSplit) -> dict[str, plots.Figure]:
    """Confusion, recall by class, reliability and risk against coverage."""
    found, classes = judged.found, judged.run.classes
    cal, abstain = found["calibration"], found["abstain"]
    right = judged.right
    sure, sure_after = (np.exp(p).max(1) for p in (stats.log_softmax(judged.logits), judged.out_of_fold))
    coverage, risk = calibration.risk_coverage(np.exp(judged.log_probs).max(1), right)
    point = None if abstain["threshold"] is None else (abstain["coverage"], abstain["error"])
    return {
        "per_class": plots.per_class(found["per_class"]),
        "confusion": plots.confusion(np.asarray(found["confusion"]), classes),
        "risk_coverage": plots.risk_coverage(coverage, risk, n=len(right), point=point, max_error=abstain["max_error"]),
        "reliability": plots.reliability(
            {
                "as trained": (calibration.reliability(sure, right), cal["before"]["ece"], sure),
                "with the temperature": (calibration.reliability(sure_after, right), cal["after"]["ece"], sure_after),
            }
        ),
    }


def galleries(judged: EvaluatedSplit) -> dict[str, plots.Figure]:
    """The lesson's galleries: random right and wrong answers, the surest of each class, the least sure, the top losses."""
    log_probs, labels, classes = judged.log_probs, judged.split.labels, judged.run.classes
    recall = [row["recall"] if row["recall"] is not None else 2.0 for row in judged.found["per_class"]]
    worst = np.argsort(recall, kind="stable")[:CLASSES]

    def of_each_class(correct: bool) -> np.ndarray:
        return np.concatenate([ranking.most_by_correct(log_probs, labels, int(c), correct, n=PER_CLASS) for c in worst])

    chosen = {
        "random_correct": ("Right answers, drawn at random", ranking.rand_by_correct(log_probs, labels, True, n=8)),
        "random_incorrect": ("Wrong answers, drawn at random", ranking.rand_by_correct(log_probs, labels, False, n=8)),
        "most_correct": ("The surest right answers of each class", of_each_class(True)),
        "most_incorrect": ("The most wrong answers of each class", of_each_class(False)),
        "most_uncertain": ("The least sure answers", ranking.most_uncertain(log_probs, n=8)),
    }
    drawn = {name: _gallery(judged, rows, heading) for name, (heading, rows) in chosen.items()}
    top = ranking.top_losses(log_probs, labels, n=9)
    titles = plots.top_loss_titles(log_probs, labels, classes, top)
    drawn["top_losses"] = _gallery(judged, top, "Top losses: prediction / actual / loss / probability", titles)
    return drawn


def _gallery(judged: EvaluatedSplit, rows: np.ndarray, heading: str, titles: list[str] | None = None) -> plots.Figure:
    titles = [title_of(judged, int(i)) for i in rows] if titles is None else titles
    wrong = (~judged.right[rows]).tolist()
    return plots.gallery([judged.file(int(i)) for i in rows], titles, wrong=wrong, heading=heading)


def title_of(judged: EvaluatedSplit, row: int) -> str:
    """'dogs 97.3 %', and what it is where that is something else."""
    classes, best = judged.run.classes, int(judged.log_probs[row].argmax())
    actual = int(judged.split.labels[row])
    more = "" if best == actual else f" (is {classes[actual]})"
    return f"{classes[best]} {percent(np.exp(judged.log_probs[row, best]))}{more}"


def heat_maps(judged: EvaluatedSplit) -> plots.Figure:
    """Where the network looked in its worst and its surest answers, for the class that it named."""

    from jaxcats.common.compile_cache import jit
    from jaxcats.core.step import normalise

    pass

    run, log_probs, labels = judged.run, judged.log_probs, judged.split.labels
    surest = [
        i
        for c in range(len(run.classes))
        for i in ranking.most_by_correct(log_probs, labels, c, True, n=max(1, LOOKED_AT // len(run.classes)))
    ]
    rows = np.array([*ranking.top_losses(log_probs, labels, n=LOOKED_AT), *surest[:LOOKED_AT]], int)
    rows = np.array(list(dict.fromkeys(rows.tolist())), int)
    padded = np.resize(rows, 2 * LOOKED_AT)  # one program, however many there are
    images = np.stack([evaluation_pixels(judged.file(int(i)), run.preprocess) for i in padded])
    prepare = normalise(run.preprocess.mean, run.preprocess.std)
    look = jit(lambda p, s, x, y: partial(grad_cam, run.model)(p, s, prepare(x), y))
    heats = np.asarray(look(run.state.params, run.state.batch_stats, images, log_probs[padded].argmax(1)))
    return plots.heat_maps(
        list(images[: len(rows)]),
        list(heats[: len(rows)]),
        [title_of(judged, int(i)) for i in rows],
        wrong=(~judged.right[rows]).tolist(),
        heading="Where the network looked: the highest losses, then the surest answers",
    )
