"""What a Learner shows: its answers and their galleries, its learning rates and losses."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcats import plots
from jaxcats.common import stats
from jaxcats.common.config import check_tta
from jaxcats.common.errors import UserError, nearest
from jaxcats.evaluate import figures, metrics, ranking, tta
from jaxcats.evaluate.calibration import Calibration
from jaxcats.evaluate.figures import EvaluatedSplit
from jaxcats.evaluate.run import Run
from jaxcats.train import experiment
from jaxcats.train.drivers import decoding
from jaxcats.train.evaluator import Evaluator
from jaxcats.train.features import backbone_features

if TYPE_CHECKING:
    from jaxcats.learner.data import ImageClassifierData


class Answers:
    """What a network says of the images: log-probabilities, which images to look at, and the figure that shows them."""

    data: "ImageClassifierData"
    model: Any
    _setup: experiment.Experiment
    _precompute: bool
    _answers: dict[str, np.ndarray]
    params: property
    batch_stats: property
    _computed: Callable[[], dict[str, np.ndarray]]
    _run: Callable[[Path], Run]

    def logits(self, split: str = "valid") -> np.ndarray:
        """Logits float32 [n, classes] of the train, valid or test images, in the order of the files."""
        if split not in self._answers:
            images = self.data.split(split)
            feats = None
            if self._precompute:
                known = self._computed()
                how = decoding(self._setup) | {"params": self.params, "batch_stats": self.batch_stats}
                feats = known[split] if split in known else self._features_of(images, **how)
            judge = Evaluator(self.model, images, feats=feats, **decoding(self._setup))
            self._answers[split] = judge(self.params, self.batch_stats)
        return self._answers[split]

    def _features_of(self, images: Any, **how: Any) -> np.ndarray:
        return backbone_features(self.model, images, cache_dir=self._setup.cache, **how).features

    def predict(self, split: str = "valid") -> np.ndarray:
        """Log-probabilities float64 [n, classes] of the valid (or train, or test) images, in the order of the files."""
        return stats.log_softmax(self.logits(split))

    def TTA(  # noqa: N802 (fastai's name)
        self, n: int = 4, *, weight: float | None = None, split: str = "valid", augment: str | None = None
    ) -> np.ndarray:
        """Log-probabilities like `predict`, averaged over the plain image and n changed ones.

        Args:
            n: changed versions of each image.
            weight: of the plain answer; None: 1 / (n + 1).
            split: valid, train or test.
            augment: how they are changed; None: as training does (`data.augment`), or side_on where that is none.
        """
        check_tta(n, weight)
        if n == 0:
            return self.predict(split)
        run, preset = self._run(Path()), augment or tta.tta_preset(self.data.augment)
        images, logits = self.data.split(split), self.logits(split)
        return tta.evaluate_with_tta(run, images, logits, n=n, weight=weight, preset=preset)[0]

    def errors(self, log_probs: np.ndarray | None = None) -> tuple[int, int]:
        """(wrong answers, images) of the validation set; `jaxcats.sentence(*learn.errors())` puts it in words."""
        log_probs = self.predict() if log_probs is None else log_probs
        if len(log_probs) != len(self.data.val_y):
            raise UserError(
                f"errors: {len(log_probs):,} answers; there are {len(self.data.val_y):,} validation images."
            )
        return int((log_probs.argmax(1) != self.data.val_y).sum()), len(self.data.val_y)

    def rand_by_correct(self, is_correct: bool, *, n: int = 4, seed: int = 0) -> np.ndarray:
        """n random right (or wrong) answers; int [<= n]."""
        return ranking.rand_by_correct(self.predict(), self.data.val_y, is_correct, n=n, seed=seed)

    def most_by_correct(self, name: str | int, is_correct: bool, *, n: int = 4) -> np.ndarray:
        """Of the images of a class (by name or number): the surest right answers, or the most wrong; int [<= n]."""
        return ranking.most_by_correct(self.predict(), self.data.val_y, self._class(name), is_correct, n=n)

    def most_uncertain(self, *, n: int = 4) -> np.ndarray:
        """The answers with the least between the two likeliest classes (for two classes: nearest to one half); int [<= n]."""
        return ranking.most_uncertain(self.predict(), n=n)

    def top_losses(self, *, n: int = 9) -> np.ndarray:
        """The images whose true class got the lowest probability; int [<= n]."""
        return ranking.top_losses(self.predict(), self.data.val_y, n=n)

    def plot_val_with_title(self, indices: Sequence[int] | np.ndarray, title: str = "") -> plots.Figure:
        """Validation images titled as in the lesson: with two classes the probability of the second, else the answer's."""
        probabilities, names, y = np.exp(self.predict()), self.data.classes, self.data.val_y
        rows, paths = [int(i) for i in indices], self.data.val_paths
        if not rows:
            return plots.gallery([], [], wrong=[], heading=f"{title}: none" if title else "none")
        if len(names) == 2:
            titles = [f"{names[1]}: {probabilities[i, 1]:.4g}" for i in rows]
        else:
            best = probabilities.argmax(1)
            titles = [
                f"{names[best[i]]}: {probabilities[i, best[i]]:.3g}"
                + ("" if best[i] == y[i] else f" (is {names[y[i]]})")
                for i in rows
            ]
        wrong = [bool(probabilities[i].argmax() != y[i]) for i in rows]
        return plots.gallery([paths[i] for i in rows], titles, wrong=wrong, heading=title or None)

    def _class(self, name: str | int) -> int:
        classes = self.data.classes
        if isinstance(name, str) and name in classes:
            return classes.index(name)
        if not isinstance(name, str) and 0 <= int(name) < len(classes):
            return int(name)
        hint = nearest(str(name), classes)
        raise UserError(f"There is no class {name!r}.{hint} The classes are {', '.join(classes)}.")


@dataclasses.dataclass
class Sched:
    """Learning rates and losses of the last fit (`rows`, `momentum`) or lr_find (`result`)."""

    result: Any = None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    momentum: Any = None
    first_step: int = 0

    def plot_lr(self) -> plots.Figure:
        """Learning rate by iteration; with a changing momentum, that too."""
        if self.result is not None:
            return plots.learning_rates(self.result.results[0].lrs)
        return figures.plot_learning_rates(self._trained(), momentum=self.momentum)

    def plot(self) -> plots.Figure:
        """Loss by learning rate of the last lr_find."""
        if self.result is None:
            raise UserError("sched.plot() draws the loss by learning rate: run learn.lr_find() first.")
        return self.result.plot()

    def plot_loss(self) -> plots.Figure:
        """Loss by step of the last fit, with the validation loss of each epoch."""
        return figures.plot_losses(self._trained(), first_step=self.first_step)

    def _trained(self) -> list[dict[str, Any]]:
        if not self.rows:
            raise UserError("There is nothing to plot yet: run learn.fit(...) or learn.lr_find() first.")
        return self.rows


class EvaluationNumbers(dict):
    """The numbers of metrics.json; shows itself as the table that `train` prints."""

    def __repr__(self) -> str:
        return f"{stats.sentence(self['errors'], self['n'])}\n{metrics.table(self)}"


class Judgement(Answers):
    """The part of a Learner that judges its validation images as `python -m jaxcats.evaluate` does."""

    config: property
    _progress: Any
    _kept_best: bool

    def judge(self, *, max_error: float = 0.005) -> EvaluationNumbers:
        """Every number of metrics.json: per class, calibration out of fold, the threshold to abstain at for `max_error`."""
        return self._numbers_and_calibration(max_error)[0]

    def plot_confusion(self) -> plots.Figure:
        """What is taken for what."""
        return self._numbers("confusion")

    def plot_reliability(self) -> plots.Figure:
        """Whether the probabilities can be believed, before and after the temperature."""
        return self._numbers("reliability")

    def plot_risk_coverage(self) -> plots.Figure:
        """Errors by the share of images answered."""
        return self._numbers("risk_coverage")

    def plot_heat_maps(self) -> plots.Figure:
        """Grad-CAM of the highest losses and of the surest answers."""
        return figures.heat_maps(self._evaluated_split())

    def plot_top_losses(self) -> plots.Figure:
        """The nine highest losses: prediction / actual / loss / probability."""
        return figures.galleries(self._evaluated_split())["top_losses"]

    def export(self, folder: str | Path = "model") -> Path:
        """Writes the classifier that can be shipped; `jaxcats.load(folder)` and `python -m jaxcats.predict` use it."""
        from jaxcats.export.program import write_run

        found, calibration = self._numbers_and_calibration()
        write_run(self._run(Path(folder).parent), found, calibration, out=Path(folder))
        return Path(folder)

    def report(self, folder: str | Path = "report") -> Path:
        """Writes figures/ and report.html into a folder; the page's path."""
        from jaxcats.evaluate.report import write_evaluation

        folder = Path(folder)
        write_evaluation(folder, self._evaluated_split(folder))
        return folder / "report.html"

    def _numbers_and_calibration(self, max_error: float = 0.005) -> tuple[EvaluationNumbers, Calibration]:
        found, calibration = metrics.evaluation_metrics(
            self.logits(), self.data.val_y, self.data.classes, max_error=max_error
        )
        return EvaluationNumbers(found), calibration

    def _evaluated_split(self, folder: Path | None = None) -> EvaluatedSplit:
        run = self._run(self.data.index.root if folder is None else folder)
        return EvaluatedSplit(run, self.data.split("valid"), self.logits(), self.judge())

    def _numbers(self, name: str) -> plots.Figure:
        return figures.metric_figures(self._evaluated_split())[name]

    def _run(self, folder: Path) -> Run:
        """What the commands call a run; `folder` is where it would have been trained."""
        config: Any = self.config
        return Run(
            folder=folder,
            config=config,
            model=self.model,
            preprocess=self._setup.preprocess,
            classes=self.data.classes,
            params=self.params,
            batch_stats=self.batch_stats,
            phase=list(config.phases.values())[-1],
            fingerprint=experiment.fingerprint(self._setup.index),
            use="last",
            step=self._progress.step,
            best_epoch=self._kept_best,
        )
