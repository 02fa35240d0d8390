"""A trained network's results on the validation images: metrics, galleries, figures, report, artefact; and the curves of a fit."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats import plots
from jaxcats.common import stats
from jaxcats.common.errors import UserError, nearest
from jaxcats.evaluate import figures, metrics, ranking
from jaxcats.evaluate.calibration import Calibration
from jaxcats.evaluate.figures import EvaluatedSplit
from jaxcats.evaluate.run import Run
from jaxcats.learner.data import ImageClassifierData


class EvaluationMetrics(dict):
    """The content of metrics.json; shows itself as the table that `train` prints."""

    def __repr__(self) -> str:
        return f"{stats.sentence(self['errors'], self['n'])}\n{metrics.table(self)}"


class Interpretation:
    """Predictions of a network on the validation images, with metrics and figures. A Learner makes it.

    Args:
        run: the trained network.
        data: the images.
        logits: float32 [n, classes] of the validation images.
    """

    def __init__(self, run: Run, data: ImageClassifierData, logits: np.ndarray):
        self.run, self.data, self.logits = run, data, logits
        self.log_probs = stats.log_softmax(logits)

    # Which images to look at: rows of the validation split

    def errors(self, log_probs: np.ndarray | None = None) -> tuple[int, int]:
        """(wrong predictions, images) of the validation split; `jaxcats.sentence(*learn.errors())` formats them."""
        log_probs, labels = self.log_probs if log_probs is None else log_probs, self.data.val_y
        if len(log_probs) != len(labels):
            raise UserError(f"errors: {len(log_probs):,} predictions; there are {len(labels):,} validation images.")
        return int((log_probs.argmax(1) != labels).sum()), len(labels)

    def rand_by_correct(self, is_correct: bool, *, n: int = 4, seed: int = 0) -> np.ndarray:
        """n random right (or wrong) predictions; int [<= n]."""
        return ranking.rand_by_correct(self.log_probs, self.data.val_y, is_correct, n=n, seed=seed)

    def most_by_correct(self, name: str | int, is_correct: bool, *, n: int = 4) -> np.ndarray:
        """The most confident right predictions of a class (by name or number), or the most wrong ones; int [<= n]."""
        label = self._class_number(name)
        return ranking.most_by_correct(self.log_probs, self.data.val_y, label, is_correct, n=n)

    def most_uncertain(self, *, n: int = 4) -> np.ndarray:
        """The predictions with the closest two likeliest classes (for two classes: nearest to one half); int [<= n]."""
        return ranking.most_uncertain(self.log_probs, n=n)

    def top_losses(self, *, n: int = 9) -> np.ndarray:
        """The images whose true class got the lowest probability; int [<= n]."""
        return ranking.top_losses(self.log_probs, self.data.val_y, n=n)

    def plot_val_with_title(self, indices: Sequence[int] | np.ndarray, title: str = "") -> plots.Figure:
        """Validation images with the lesson's titles: of two classes the second's probability, else that predicted."""
        probabilities, classes, labels = np.exp(self.log_probs), self.data.classes, self.data.val_y
        best, paths, titles = probabilities.argmax(1), self.data.val_paths, []
        for i in indices:
            shown = 1 if len(classes) == 2 else best[i]
            actual = f" (is {classes[labels[i]]})" if len(classes) > 2 and best[i] != labels[i] else ""
            titles.append(f"{classes[shown]}: {probabilities[i, shown]:.4g}{actual}")
        wrong = [bool(best[i] != labels[i]) for i in indices]
        return plots.gallery([paths[i] for i in indices], titles, wrong=wrong, heading=title or None)

    def _class_number(self, name: str | int) -> int:
        classes = self.data.classes
        number = classes.index(name) if name in classes else name
        if not isinstance(number, str) and 0 <= number < len(classes):
            return int(number)
        raise UserError(f"There is no class {name!r}.{nearest(str(name), classes)} The classes: {', '.join(classes)}.")

    # What `python -m jaxcats.evaluate` computes, draws and writes

    def metrics(self, *, max_error: float = 0.005) -> EvaluationMetrics:
        """The content of metrics.json: per class, calibration out of fold, the threshold to abstain at for `max_error`."""
        return EvaluationMetrics(self._metrics_and_calibration(max_error)[0])

    def _metrics_and_calibration(self, max_error: float = 0.005) -> tuple[dict[str, Any], Calibration]:
        """The same, with the temperature and threshold that were fitted on these images."""
        return metrics.evaluation_metrics(self.logits, self.data.val_y, self.data.classes, max_error=max_error)

    def plot_confusion(self) -> plots.Figure:
        """How often each class is mistaken for each other."""
        return figures.metric_figures(self._evaluated_split())["confusion"]

    def plot_reliability(self) -> plots.Figure:
        """Accuracy by confidence (reliability), before and after the temperature."""
        return figures.metric_figures(self._evaluated_split())["reliability"]

    def plot_risk_coverage(self) -> plots.Figure:
        """Error rate by the share of images that get a prediction."""
        return figures.metric_figures(self._evaluated_split())["risk_coverage"]

    def plot_heat_maps(self) -> plots.Figure:
        """Grad-CAM of the highest losses and of the most confident right predictions."""
        return figures.heat_maps(self._evaluated_split())

    def plot_top_losses(self) -> plots.Figure:
        """The nine highest losses: prediction / actual / loss / probability."""
        return figures.galleries(self._evaluated_split())["top_losses"]

    def export(self, folder: str | Path = "model") -> Path:
        """Writes the classifier that can be shipped; `jaxcats.load(folder)` and `python -m jaxcats.predict` use it."""
        from jaxcats.export.program import write_run

        return write_run(self.run, *self._metrics_and_calibration(), out=Path(folder))

    def report(self, folder: str | Path = "report") -> Path:
        """Writes figures/ and report.html into a folder; returns the path of the page."""
        from jaxcats.evaluate.report import write_evaluation

        folder = Path(folder)
        write_evaluation(folder, self._evaluated_split(folder))
        return folder / "report.html"

    def _evaluated_split(self, folder: Path | None = None) -> EvaluatedSplit:
        run = dataclasses.replace(self.run, folder=folder) if folder else self.run
        return EvaluatedSplit(run, self.data.split("valid"), self.logits, self.metrics())


@dataclasses.dataclass
class Sched:
    """Learning rates and losses of the last fit (`rows`, `momentum`) or of the last lr_find (`result`), to plot."""

    result: Any = None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    momentum: Any = None
    first_step: int = 0

    def plot_lr(self) -> plots.Figure:
        """Learning rate by iteration, with the momentum where that is a schedule."""
        if self.result is not None:
            return plots.learning_rates(self.result.curves[0].lrs)
        return figures.plot_learning_rates(self._fit_rows(), momentum=self.momentum)

    def plot(self) -> plots.Figure:
        """Loss by learning rate of the last lr_find."""
        if self.result is None:
            raise UserError("sched.plot() draws the loss by learning rate: run learn.lr_find() first.")
        return self.result.plot()

    def plot_loss(self) -> plots.Figure:
        """Loss by step of the last fit, with the validation loss of each epoch."""
        return figures.plot_losses(self._fit_rows(), first_step=self.first_step)

    def _fit_rows(self) -> list[dict[str, Any]]:
        if not self.rows:
            raise UserError("There is nothing to plot yet: run learn.fit(...) or learn.lr_find() first.")
        return self.rows
