"""The figures of a trained run: curves of the training, what the metrics say, galleries of images, and Grad-CAM heat maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcats import plots
from jaxcats.common import stats
from jaxcats.common.compile_cache import jit
from jaxcats.core.schedules import Schedule
from jaxcats.core.step import normalise
from jaxcats.data.images import evaluation_pixels
from jaxcats.data.index import Split
from jaxcats.evaluate import calibration, ranking
from jaxcats.evaluate.pages import percent
from jaxcats.evaluate.run import Run
from jaxcats.models import Model
from jaxcats.train.epoch_table import best_epoch
from jaxcats.train.run_folder import RunLog

PER_CLASS = 4  # images of each class in a gallery
CLASSES = 10  # in a gallery that has a row per class
HEAT_MAPS = 4  # heat maps of the top losses, and of the most confident right predictions
GROUPS = ("early layers", "late layers", "head layers")


@dataclass(frozen=True)
class EvaluatedSplit:
    """A split with the logits that a run gives it, and the metrics of these.

    Attributes:
        run: the trained run.
        split: N images, all labelled.
        logits: [N, C].
        metrics: metrics.json's content.
    """

    run: Run
    split: Split
    logits: np.ndarray
    metrics: Mapping[str, Any]

    @cached_property
    def log_probs(self) -> np.ndarray:
        """Log-probabilities [N, C] as predict gives them: after the temperature."""
        return stats.log_softmax(self.logits / self.metrics["calibration"]["temperature"])

    @cached_property
    def out_of_fold(self) -> np.ndarray:
        """The same; if the temperature was fitted on these images, each image uses that of the other folds."""
        facts = self.metrics["calibration"]
        if not facts["fold_temperatures"]:
            return self.log_probs
        fold = calibration.assign_folds(self.split.labels)
        return stats.log_softmax(self.logits / np.asarray(facts["fold_temperatures"])[fold][:, None])

    @property
    def correct(self) -> np.ndarray:
        """bool [N]."""
        return self.logits.argmax(1) == self.split.labels

    def file(self, row: int) -> Path:
        """The path of an image."""
        return self.split.root / self.split.paths[row]

    def title(self, row: int) -> str:
        """'dogs 97.3 %', and the actual class where that is another one."""
        classes, best, actual = self.run.classes, int(self.log_probs[row].argmax()), int(self.split.labels[row])
        title = f"{classes[best]} {percent(np.exp(self.log_probs[row, best]))}"
        return title if best == actual else f"{title} (is {classes[actual]})"


def training_figures(run_folder: Path) -> dict[str, plots.Figure]:
    """Losses and learning rate of a run, by name."""
    rows = RunLog.rows(run_folder / "metrics.jsonl")
    if not any("loss" in row for row in rows):
        return {}
    return {"losses": plot_losses(rows), "learning_rate": plot_learning_rates(rows)}


def plot_losses(rows: Sequence[Mapping[str, Any]], *, first_step: int = 0) -> plots.Figure:
    """Training loss by step, counted from `first_step`, and the validation loss of each epoch; `rows` as in metrics.jsonl."""
    steps, epochs = [row for row in rows if "loss" in row], [row for row in rows if "valid_loss" in row]
    train = [row["step"] - first_step for row in steps], [row["loss"] for row in steps]
    valid = [row["step"] - first_step for row in epochs], [row["valid_loss"] for row in epochs]
    return plots.losses(*train, *valid, best=best_epoch(epochs) if epochs else None)


def plot_learning_rates(rows: Sequence[Mapping[str, Any]], *, momentum: float | Schedule | None = None) -> plots.Figure:
    """Learning rate by step, of each layer group where they differ; with the momentum where that is a schedule."""
    curves: Any = [row["lr"] for row in rows if "loss" in row]
    momenta = [np.asarray(momentum(step)).item() for step in range(len(curves))] if callable(momentum) else None
    if any(isinstance(lr, list) for lr in curves):
        # One phase may have one rate for all layer groups, and another phase a rate for each.
        by_group = np.array([lr if isinstance(lr, list) else [lr] * len(GROUPS) for lr in curves])
        curves = dict(zip(GROUPS, by_group.T, strict=True))
    return plots.learning_rates(curves, momentum=momenta)


def metric_figures(evaluated: EvaluatedSplit) -> dict[str, plots.Figure]:
    """Recall by class, confusion, risk against coverage, and reliability, by name."""
    metrics, correct, panels = evaluated.metrics, evaluated.correct, {}
    before = "as trained", "before", stats.log_softmax(evaluated.logits)
    after = "with the temperature", "after", evaluated.out_of_fold
    for title, key, log_probs in (before, after):
        confidence = np.exp(log_probs).max(1)
        panels[title] = calibration.reliability(confidence, correct), metrics["calibration"][key]["ece"], confidence
    curve = calibration.risk_coverage(np.exp(evaluated.log_probs).max(1), correct)
    abstain = metrics["abstain"]
    has_point = abstain["threshold"] is not None and abstain["answered"] > 0
    point = (abstain["coverage"], abstain["error"]) if has_point else None
    return {
        "per_class": plots.per_class(metrics["per_class"]),
        "confusion": plots.confusion(metrics["confusion"], evaluated.run.classes),
        "risk_coverage": plots.risk_coverage(*curve, n=len(correct), point=point, max_error=abstain["max_error"]),
        "reliability": plots.reliability(panels),
    }


def galleries(evaluated: EvaluatedSplit) -> dict[str, plots.Figure]:
    """The lesson's galleries, by name: random right and wrong predictions, the most confident, the least sure, the top losses."""
    log_probs, labels, classes = evaluated.log_probs, evaluated.split.labels, evaluated.run.classes
    recall = [2.0 if row["recall"] is None else row["recall"] for row in evaluated.metrics["per_class"]]
    worst_classes = np.argsort(recall, kind="stable")[:CLASSES]

    def draw(rows: np.ndarray, heading: str, titles: list[str] | None = None) -> plots.Figure:
        titles = [evaluated.title(int(i)) for i in rows] if titles is None else titles
        wrong = (~evaluated.correct[rows]).tolist()
        return plots.gallery([evaluated.file(int(i)) for i in rows], titles, wrong=wrong, heading=heading)

    def by_class(correct: bool) -> np.ndarray:
        rows = [ranking.most_by_correct(log_probs, labels, int(c), correct, n=PER_CLASS) for c in worst_classes]
        return np.concatenate(rows)

    right, wrong = (ranking.rand_by_correct(log_probs, labels, correct, n=8) for correct in (True, False))
    top = ranking.top_losses(log_probs, labels, n=9)
    top_titles = plots.top_loss_titles(log_probs, labels, classes, top)
    return {
        "random_correct": draw(right, "Right predictions, drawn at random"),
        "random_incorrect": draw(wrong, "Wrong predictions, drawn at random"),
        "most_correct": draw(by_class(True), "The most confident right predictions of each class"),
        "most_incorrect": draw(by_class(False), "The most wrong predictions of each class"),
        "most_uncertain": draw(ranking.most_uncertain(log_probs, n=8), "The least sure predictions"),
        "top_losses": draw(top, "Top losses: prediction / actual / loss / probability", top_titles),
    }


def heat_maps(evaluated: EvaluatedSplit) -> plots.Figure:
    """Where the network looked for its prediction: the top losses, then the most confident right predictions."""
    run, log_probs, labels = evaluated.run, evaluated.log_probs, evaluated.split.labels
    rows = ranking.top_losses(log_probs, labels, n=HEAT_MAPS).tolist()
    per_class = max(1, HEAT_MAPS // len(run.classes))
    confident = [ranking.most_by_correct(log_probs, labels, c, True, n=per_class) for c in range(len(run.classes))]
    rows += np.concatenate(confident)[:HEAT_MAPS].tolist()
    rows = list(dict.fromkeys(rows))  # with few images one may be both
    padded = np.resize(rows, 2 * HEAT_MAPS)  # one compiled program, however many there are
    images = np.stack([evaluation_pixels(evaluated.file(int(i)), run.preprocess) for i in padded])
    prepare = normalise(run.preprocess.mean, run.preprocess.std)
    program = jit(lambda params, stats, x, y: grad_cam(run.model, params, stats, prepare(x), y))
    heats = np.asarray(program(run.params, run.batch_stats, images, log_probs[padded].argmax(1)))
    heading = "Where the network looked: the highest losses, then the most confident predictions"
    titles, wrong, n = [evaluated.title(i) for i in rows], (~evaluated.correct[rows]).tolist(), len(rows)
    return plots.heat_maps(list(images[:n]), list(heats[:n]), titles, wrong=wrong, heading=heading)


def grad_cam(model: Model, params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """How much each position of the last feature map supports a class: float32 [N,h,w], from 0 to 1 in each image.

    Grad-CAM (Selvaraju et al., arXiv:1610.02391): the channels of the feature map, each weighted with the mean gradient
    of the class's logit, are added up, and negative values are cut off. It works for any backbone and head, because it
    needs only the logit's gradient. An image where nothing supports the class gives zeros. In a model that computes in
    bfloat16 only the feature map has that precision; the gradient and the sum are float32.

    Args:
        model: from `models.create`.
        params: its parameters.
        batch_stats: its averages.
        images: float32 [N,H,W,3], normalised as `model.preprocess` says.
        labels: int [N], the class to explain in each image: the predicted one, or any other.
    """
    feature_map = model.feature_map(params, batch_stats, images)

    def score(feature_map: jax.Array) -> jax.Array:
        logits = model.apply_map(params, batch_stats, feature_map)
        # An image's logits depend on that image alone, so the gradient of the sum holds the gradient of each image.
        return jnp.take_along_axis(logits, labels[:, None], axis=-1).sum()

    weights = jax.grad(score)(feature_map).mean((1, 2), keepdims=True)
    heat = jax.nn.relu((weights * feature_map).sum(-1))
    highest = heat.max((1, 2), keepdims=True)
    return jnp.where(highest > 0, heat / jnp.where(highest > 0, highest, 1), 0)
