"""How a Learner's classifier is judged, shown and shipped: what `train` leaves in a run folder, from a notebook."""

from pathlib import Path
from typing import Any

from jaxcats import job, run_figures
from jaxcats.judging import BEST_EPOCH, Run
from jaxcats.learner_views import Answers
from jaxcats.results import metrics, plots
from jaxcats.results.calibration import Calibration
from jaxcats.run_figures import Judged


class Found(dict):
    """The numbers of metrics.json; shows itself as the table that `train` prints."""

    def __repr__(self) -> str:
        return f"{metrics.sentence(self['errors'], self['n'])}\n{metrics.table(self)}"


class Judgement(Answers):
    """The part of a Learner that judges its validation pictures as `python -m jaxcats.evaluate` does."""

    config: property
    _progress: Any
    _kept_best: bool

    def judge(self, *, max_error: float = 0.005) -> Found:
        """Every number of metrics.json: per class, calibration out of fold, the threshold to abstain at for `max_error`."""
        return self._judged(max_error)[0]

    def plot_confusion(self) -> plots.Figure:
        """What is taken for what."""
        return self._numbers("confusion")

    def plot_reliability(self) -> plots.Figure:
        """Whether the probabilities can be believed, before and after the temperature."""
        return self._numbers("reliability")

    def plot_risk_coverage(self) -> plots.Figure:
        """Errors by the share of pictures answered."""
        return self._numbers("risk_coverage")

    def plot_heat_maps(self) -> plots.Figure:
        """Grad-CAM of the highest losses and of the surest answers."""
        return run_figures.heat_maps(self._as_judged())

    def plot_top_losses(self) -> plots.Figure:
        """The nine highest losses: prediction / actual / loss / probability."""
        return run_figures.galleries(self._as_judged())["top_losses"]

    def export(self, folder: str | Path = "model") -> Path:
        """Writes the classifier that can be shipped; `jaxcats.load(folder)` and `python -m jaxcats.predict` use it."""
        from jaxcats.exporting import write_run

        found, calibration = self._judged()
        write_run(self._run(Path(folder).parent), found, calibration, out=Path(folder))
        return Path(folder)

    def report(self, folder: str | Path = "report") -> Path:
        """Writes figures/ and report.html into a folder; the page's path."""
        from jaxcats.presentation import present

        judged, folder = self._as_judged(), Path(folder)
        present(folder, self._run(folder), judged.split, judged.logits, judged.found)
        return folder / "report.html"

    def _judged(self, max_error: float = 0.005) -> tuple[Found, Calibration]:
        found, calibration = metrics.judge(self.logits(), self.data.val_y, self.data.classes, max_error=max_error)
        return Found(found), calibration

    def _as_judged(self) -> Judged:
        return Judged(self._run(self.data.index.root), self.data.split("valid"), self.logits(), self.judge())

    def _numbers(self, name: str) -> plots.Figure:
        return run_figures.of_numbers(self._as_judged())[name]

    def _run(self, folder: Path) -> Run:
        """What the commands call a run; `folder` is where it would have been trained."""
        config: Any = self.config
        last = list(config.phases.values())[-1]
        used = BEST_EPOCH if self._kept_best else []
        return Run(
            folder=folder,
            config=config,
            model=self.model,
            preprocess=self._setup.preprocess,
            classes=self.data.classes,
            state=self,
            precomputed=self._precompute,
            augment=last.augment,
            checkpoint={"use": "last", "step": self._progress.step, "valid_used_for": used},
            fingerprint=job.fingerprint(self._setup.index),
        )
