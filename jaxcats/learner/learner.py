"""The notebook interface: a Learner holds a network's state and calls the functions that train, evaluate and draw."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxcats.common.config import Config, ModelConfig, Phase, check_tta, sgdr_epochs, validate
from jaxcats.common.errors import UserError, nearest
from jaxcats.common.io import in_notebook
from jaxcats.common.stats import log_softmax, sentence
from jaxcats.evaluate import tta
from jaxcats.evaluate.run import Run
from jaxcats.learner.data import ImageClassifierData
from jaxcats.learner.interpretation import Interpretation, Sched
from jaxcats.learner.saving import FitMemory, load_state, save_state
from jaxcats.train.drivers import decoding
from jaxcats.train.epoch_table import NotebookTable, Table
from jaxcats.train.evaluator import evaluate_split
from jaxcats.train.experiment import Experiment, PhasePlan, fingerprint, initial_params, make_phase, plans, setup
from jaxcats.train.features import backbone_features, precompute
from jaxcats.train.loop import Progress, TrainingLoop
from jaxcats.train.lr_finder import LRFindResult, Sweep, find_lr
from jaxcats.train.user_functions import UserFunctions

LR = float | Sequence[float] | slice | Literal["auto"]
BN = Literal["frozen", "train"]


def _of_interpretation(method: Callable) -> Callable:
    """A method of Interpretation as one of Learner, with its signature and docstring."""

    @functools.wraps(method)
    def call(self: "Learner", *args: Any, **options: Any) -> Any:
        return method(self.interpretation, *args, **options)

    return call


class Learner:
    """A classifier that is being trained. Create it with `Learner.pretrained`.

        data = ImageClassifierData.from_paths("data/dogscats", size=224)
        learn = Learner.pretrained("resnet34", data, precompute=True)
        learn.fit(0.01, 3)

    Attributes:
        data: the images; its `augment` and `batch_size` may be changed between fits.
        model: pure functions of params and batch_stats, see jaxcats.models.Model.
        workdir: folder that `save` writes into.
        history: a dict per epoch of every fit so far.
        sched: learning rates and losses of the last fit or lr_find, to plot.
    """

    def __init__(
        self, experiment: Experiment, data: ImageClassifierData, weights: tuple[Any, Any], workdir: Path, bn: BN
    ):
        self.data, self.model, self.workdir = data, experiment.model, workdir
        self.history: list[Mapping[str, Any]] = []
        self.sched = Sched()
        self._experiment, self._phases, self._progress = experiment, dict[str, Phase](), Progress()
        # Before the first fit there is no phase: its defaults give the optimizer of the state that `save` writes.
        self._state = make_phase(experiment, PhasePlan(0, "fit1", Phase()))[1](*weights)
        self._freeze: Literal["backbone", "first", "nothing"] = "backbone"
        self._bn: BN = bn
        self._precompute = self._kept_best = False
        self._user_functions: dict[str, dict[str, str]] = {}  # by fit: names of the user's functions
        self._features: dict[str, np.ndarray] | None = None  # of the present backbone
        self._logits: dict[str, np.ndarray] = {}  # of the present weights, by split

    @classmethod
    def pretrained(
        cls,
        backbone: str,
        data: ImageClassifierData,
        *,
        precompute: bool = False,
        weights: str | Path | None = None,
        head: Literal["lesson", "linear"] = "lesson",
        bn: BN = "frozen",
        pretrained: bool = True,
        precision: Literal["auto", "float32", "bfloat16"] = "auto",
        workdir: str | Path = "runs/notebook",
    ) -> "Learner":
        """A network with pretrained weights, frozen, under a fresh head for the classes of `data`.

        Args:
            backbone: resnet18, resnet34, resnet50, resnet101, resnet152, efficientnet_lite0, or a registered name.
            data: from `ImageClassifierData.from_paths`.
            precompute: train the head on features computed once; augmentation has no effect then.
            weights: a name that `jaxcats weights list` gives, a .safetensors, .pth or .npz file, hf:OWNER/REPO/FILE or
                package:MODULE/FILE; None: the backbone's own.
            head: lesson (pooling, BN, dropout, 512, BN, dropout, classes) or linear.
            bn: what the backbone's BatchNorms do in training: run on stored averages, or on the batch's statistics.
            pretrained: False starts from random weights.
            precision: of the arithmetic; auto is float32 on CPU and bfloat16 elsewhere.
            workdir: folder that `save` writes into.

        Raises:
            UserError: unknown backbone, no weights to be found, or weights that don't fit.
        """
        config = Config(
            seed=data.seed,
            data=data.settings,
            model=ModelConfig(backbone, head, pretrained, None if weights is None else str(weights)),
            precision=precision,
        )
        experiment = setup(validate(config), data.index)
        learn = cls(experiment, data, initial_params(experiment)[:2], Path(workdir), bn)
        learn.precompute = precompute
        return learn

    def __repr__(self) -> str:
        m = self.model
        about = f"{m.name}, {m.head} head, {m.dtype}; frozen: {self._freeze}; precompute: {self._precompute}"
        return f"Learner({about}; {self._progress.epoch} epochs trained)"

    # Training

    def fit(
        self,
        lr: LR,
        n_cycle: int = 1,
        *,
        cycle_len: int | None = None,
        cycle_mult: int = 1,
        keep="last",
        **options: Any,
    ) -> None:
        """Trains for `n_cycle` epochs at a constant rate, or for `n_cycle` cosine cycles with warm restarts.

        Args:
            lr: learning rate; three of them (early layers, late layers, head); a slice(a, b), spread geometrically from
                a to b; or "auto", the valley of an lr_find.
            n_cycle: epochs, or cycles with `cycle_len`.
            cycle_len: epochs of the first cycle; None: no cycles, a constant rate.
            cycle_mult: length of each cycle relative to the one before: fit(lr, 3, cycle_len=1, cycle_mult=2)
                is 1 + 2 + 4 epochs.
            keep: the epoch whose state stays: last, or best (fewest validation errors, then the lowest loss).
            **options: further fields of jaxcats.Phase: optimizer, momentum, weight_decay, schedule, batch_size,
                label_smoothing, clip, accumulate, driver, ...; and functions of your own, `loss_fn`, `augment` and
                `metrics`, see jaxcats.train.user_functions.UserFunctions.

        Raises:
            UserError: values that can't be used.
            RunError: the loss is no longer a number, or lr_find gives no rate for "auto".

        After an error, or Ctrl-C, the Learner is as it was before.
        """
        for name, value in {"n_cycle": n_cycle, "cycle_mult": cycle_mult, "cycle_len": cycle_len or 1}.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: {value!r} can't be used; expected a whole number, at least 1.")
        cycles = {"epochs": n_cycle}
        if cycle_len is not None:
            epochs = sgdr_epochs(n_cycle, cycle_len, cycle_mult)
            cycles = {"epochs": epochs, "schedule": "sgdr", "cycle_len": cycle_len, "cycle_mult": cycle_mult}
        self._fit(lr, cycles, options, keep=keep)

    def fit_one_cycle(
        self, epochs: int, lr: LR = 2e-3, *, div: float = 25.0, pct_start: float = 0.25, keep="last", **options: Any
    ) -> None:
        """One cycle: the rate up from lr/div over the share `pct_start` of the steps, then down to lr/1e5, momentum .95, .85, .95.

        It equals fastai v2's; the other arguments are those of `fit`.
        """
        cycle = {"epochs": epochs, "schedule": "one_cycle", "warmup": pct_start, "div": div}
        self._fit(lr, cycle, {"momentum": (0.95, 0.85, 0.95)} | options, keep=keep)

    def fine_tune(
        self, epochs: int, base_lr: float = 2e-3, *, freeze_epochs: int = 1, keep="last", **options: Any
    ) -> None:
        """fastai v2's recipe: the head alone for `freeze_epochs`, then every layer for `epochs`, one cycle each.

        The rates are base_lr, then from base_lr/200 (early layers) to base_lr/2 (head). An error in the second part leaves
        the first one done.
        """
        self.freeze()
        frozen = {k: v for k, v in options.items() if k != "augment" or not self._precompute}
        self.fit_one_cycle(freeze_epochs, base_lr, pct_start=0.99, **frozen)
        self.unfreeze()
        half = base_lr / 2
        self.fit_one_cycle(epochs, slice(half / 100, half), pct_start=0.3, div=5.0, keep=keep, **options)

    def lr_find(
        self, start: float = 1e-7, end: float = 10.0, *, iterations: int = 100, seeds: int = 1, **options: Any
    ) -> LRFindResult:
        """Records the loss while the rate grows from `start` to `end`; the Learner's state doesn't change.

        Args:
            start: first rate.
            end: the rate that the last iteration approaches.
            iterations: batches.
            seeds: with precompute, the number of fresh heads to test at once, for a band.
            **options: as of `fit`.
        """
        plan, weights, features = self._next_phase({}, options)
        sweep = Sweep(start, end, iterations=iterations, seeds=seeds)
        result = find_lr(self._experiment, plan, weights, features.get("train"), sweep)
        self.sched = Sched(result=result)
        return result

    def _next_phase(
        self, fixed: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[PhasePlan, tuple[Any, Any], dict[str, np.ndarray]]:
        """The plan of the next phase, the weights that it starts from, and features where it trains on them."""
        names = [k for k in UserFunctions.__annotations__ if k != "augment" or callable(options.get(k))]
        functions = {k: v for k, v in options.items() if k in names}
        user_functions, options = UserFunctions(**functions), {k: v for k, v in options.items() if k not in functions}
        defaults: dict[str, Any] = {"batch_size": self.data.batch_size, "augment": self.data.augment}
        defaults |= {"freeze": self._freeze, "bn": self._bn, "precompute": self._precompute}
        phase, name = phase_of(fixed, options, defaults), f"fit{len(self._phases) + 1}"
        config = dataclasses.replace(self._experiment.config, phases={**self._phases, name: phase})
        alone = validate(dataclasses.replace(config, phases={name: phase}))
        user_functions.check(alone, classes=len(self.data.classes), size=self._experiment.preprocess.size)
        self._experiment = dataclasses.replace(self._experiment, config=validate(config), user_functions=user_functions)
        plan, done = plans(self._experiment)[-1], self._progress
        plan = dataclasses.replace(plan, first_step=done.step, first_epoch=done.epoch)
        return plan, (self.params, self.batch_stats), self._computed_features() if phase.precompute else {}

    def _fit(self, lr: LR, fixed: Mapping[str, Any], options: Mapping[str, Any], *, keep: str) -> None:
        if keep not in ("last", "best"):
            raise UserError(f"keep: {keep!r} is not one of last, best.")
        plan, weights, features = self._next_phase({"lr": lr, **fixed}, options)
        memory = FitMemory(keep_best=keep == "best")
        progress = dataclasses.replace(self._progress)  # An interrupted fit leaves no trace.
        progress.begin_phase(plan)
        table = NotebookTable() if in_notebook() else Table()
        state = TrainingLoop(self._experiment, progress, memory, memory, table=table).run_phase(plan, weights, features)
        if keep == "best":
            state, best = memory.state, memory.best_row
            if not in_notebook():
                result = sentence(best["errors"], best["n"])
                print(
                    f"Kept epoch {best['epoch']}, the best: {result}; chosen on these images: the result is too good."
                )
        config = dataclasses.replace(self._experiment.config, phases={plan.name: plan.phase})
        self._phases[plan.name] = plan.phase
        self._user_functions |= self._experiment.user_functions.names(config)
        self._progress, self.history = progress, [*self.history, *memory.epochs]
        self._kept_best = self._kept_best or keep == "best"
        self.sched = Sched(rows=memory.rows, momentum=plan.momentum(), first_step=plan.first_step)
        self._state, self._logits = state, {}
        if plan.phase.freeze != "backbone" or plan.phase.bn == "train":
            self._features = None

    def _computed_features(self) -> dict[str, np.ndarray]:
        if self._features is None:
            self._features = precompute(self._experiment, self.params, self.batch_stats)[0]
        return self._features

    # Predictions, and their metrics and figures

    def logits(self, split: str = "valid") -> np.ndarray:
        """Logits float32 [n, classes] of the train, valid or test images, in the order of the files."""
        if split not in self._logits:
            images, options = self.data.split(split), decoding(self._experiment)
            weights = {"params": self.params, "batch_stats": self.batch_stats}
            features = self._computed_features().get(split) if self._precompute else None
            if self._precompute and features is None:
                cache = self._experiment.cache
                features = backbone_features(self.model, images, cache_dir=cache, **weights, **options).features
            self._logits[split] = evaluate_split(self.model, images, features=features, **weights, **options)
        return self._logits[split]

    def predict(self, split: str = "valid") -> np.ndarray:
        """Log-probabilities float64 [n, classes] of the valid (or train, or test) images, in the order of the files."""
        return log_softmax(self.logits(split))

    def TTA(  # noqa: N802 (fastai's name)
        self, n: int = 4, *, weight: float | None = None, split: str = "valid", augment: str | None = None
    ) -> np.ndarray:
        """Log-probabilities like `predict`, averaged over the plain image and n augmented versions.

        Args:
            n: augmented versions of each image.
            weight: of the plain image; None: 1 / (n + 1).
            split: valid, train or test.
            augment: a preset; None: that of training (`data.augment`), or side_on where that is none.
        """
        check_tta(n, weight)
        if n == 0:
            return self.predict(split)
        images, preset = self.data.split(split), augment or tta.tta_preset(self.data.augment)
        return tta.evaluate_with_tta(self._run(), images, self.logits(split), n=n, weight=weight, preset=preset)[0]

    @property
    def interpretation(self) -> Interpretation:
        """The predictions on the validation images, with their metrics, galleries and figures."""
        return Interpretation(self._run(), self.data, self.logits())

    errors = _of_interpretation(Interpretation.errors)
    rand_by_correct = _of_interpretation(Interpretation.rand_by_correct)
    most_by_correct = _of_interpretation(Interpretation.most_by_correct)
    most_uncertain = _of_interpretation(Interpretation.most_uncertain)
    top_losses = _of_interpretation(Interpretation.top_losses)
    plot_val_with_title = _of_interpretation(Interpretation.plot_val_with_title)
    plot_confusion = _of_interpretation(Interpretation.plot_confusion)
    plot_reliability = _of_interpretation(Interpretation.plot_reliability)
    plot_risk_coverage = _of_interpretation(Interpretation.plot_risk_coverage)
    plot_heat_maps = _of_interpretation(Interpretation.plot_heat_maps)
    plot_top_losses = _of_interpretation(Interpretation.plot_top_losses)
    evaluate = _of_interpretation(Interpretation.metrics)
    judge = evaluate  # its former name
    export = _of_interpretation(Interpretation.export)
    report = _of_interpretation(Interpretation.report)

    def _run(self) -> Run:
        """The network as the evaluate and export commands know it."""
        return Run(
            folder=self.workdir,
            config=self.config,
            model=self.model,
            preprocess=self._experiment.preprocess,
            classes=self.data.classes,
            params=self.params,
            batch_stats=self.batch_stats,
            phase=list(self.config.phases.values())[-1],
            fingerprint=fingerprint(self._experiment.index),
            use="last",
            step=self._progress.step,
            best_epoch=self._kept_best,
        )

    # The weights, and which of them are trained

    @property
    def params(self) -> Any:
        """{"backbone": ..., "head": ...}, nested dicts of float32 arrays."""
        return self._state.params

    @property
    def batch_stats(self) -> Any:
        """{"backbone": ..., "head": ...}; running averages of BatchNorm."""
        return self._state.batch_stats

    @property
    def precompute(self) -> bool:
        """Whether fits train the head on the frozen backbone's features, computed once."""
        return self._precompute

    @precompute.setter
    def precompute(self, value: bool) -> None:
        if value and (self._freeze != "backbone" or self._bn != "frozen"):
            raise UserError("precompute: needs a frozen backbone; call freeze() first (and bn='frozen').")
        self._precompute = bool(value)

    def freeze(self) -> None:
        """Only the head learns."""
        self.freeze_to(-1)

    def unfreeze(self) -> None:
        """Every layer learns; precompute is switched off."""
        self.freeze_to(0)

    def freeze_to(self, group: int) -> None:
        """Layer groups before `group` are frozen: 0 none, 1 the early layers, 2 (or -1) all but the head."""
        if not isinstance(group, int) or not -3 <= group <= 2:
            raise UserError(f"freeze_to: {group!r} can't be used; there are three layer groups: 0, 1 and 2.")
        self._freeze = ("nothing", "first", "backbone")[group % 3]
        if self._freeze != "backbone":
            self._precompute = False

    # Saving

    @property
    def config(self) -> Config:
        """What was trained so far, as a configuration: `train` repeats it, except for `keep="best"` and user functions."""
        return dataclasses.replace(self._experiment.config, phases=self._phases or {"fit1": Phase()})

    def save(self, name: str) -> Path:
        """Writes the state as a run folder `workdir/name`, which `load` and `python -m jaxcats.evaluate --run` read."""
        experiment = dataclasses.replace(self._experiment, config=self.config)
        notes = {"history": self.history, "kept_best": self._kept_best, "own": self._user_functions}
        return save_state(self.workdir / name, experiment, self._state, self._progress, notes)

    def load(self, name: str | Path) -> None:
        """Loads what `save(name)` wrote, or the folder of a finished run (an absolute path).

        Raises:
            UserError: the folder does not exist, is not finished, or holds another network or other classes.
        """
        self._state, self._progress, self._phases, notes = load_state(self.workdir / name, self._experiment)
        self.history, self._kept_best, self._user_functions = notes["history"], notes["kept_best"], notes["own"]
        self._logits, self._features = {}, None


def phase_of(fixed: Mapping[str, Any], options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Phase:
    """The Phase of a call; its values are checked later, with the whole configuration.

    Args:
        fixed: fields that the method sets.
        options: fields that the user gave by name.
        defaults: all other fields; its augment is used only where features are not precomputed.

    Raises:
        UserError: an option that does not exist, or that the method sets.
    """
    known = [f.name for f in dataclasses.fields(Phase) if f.name not in fixed]
    for name in options:
        if name not in known:
            raise UserError(f"{name}: not an option of this method.{nearest(name, known)} Options: {', '.join(known)}.")
    fields = {**defaults, **options, **fixed}
    fields = {k: v.item() if isinstance(v, np.generic) else v for k, v in fields.items()}
    if "lr" in fields:
        fields["lr"] = spread(fields["lr"])
    if fields["precompute"] and "augment" not in options:
        fields["augment"] = "none"
    return Phase(**fields)


def spread(lr: LR) -> float | tuple[float, ...] | Literal["auto"]:
    """A learning rate as in a configuration; slice(a, b) is geometric from a to b, slice(b) is b/10, b/10, b."""
    if isinstance(lr, slice):
        if lr.stop is None or lr.step is not None or (lr.start is not None and not 0 < lr.start <= lr.stop):
            raise UserError(f"lr: {lr} can't be used; expected slice(b), or slice(a, b) with 0 < a <= b.")
        if lr.start is None:
            return (lr.stop / 10, lr.stop / 10, lr.stop)
        return tuple(float(x) for x in np.geomspace(lr.start, lr.stop, 3))
    if isinstance(lr, (Sequence, np.ndarray)) and not isinstance(lr, str):
        return tuple(float(x) for x in lr)
    return float(lr) if isinstance(lr, (int, float, np.number)) else lr
