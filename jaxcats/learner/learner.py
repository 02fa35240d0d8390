"""What a call of a Learner asks for, as a Phase: learning rates as fastai writes them, options by name."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxcats.common import stats as stats_module
from jaxcats.common.config import Config, ModelConfig, Phase, sgdr_epochs, validate
from jaxcats.common.errors import UserError, nearest
from jaxcats.common.io import in_notebook
from jaxcats.core.state import TrainState
from jaxcats.learner.data import ImageClassifierData
from jaxcats.learner.interpretation import Judgement, Sched
from jaxcats.learner.saving import Keeper, load_state, save_state
from jaxcats.train import experiment
from jaxcats.train.epoch_table import NotebookTable, Table
from jaxcats.train.features import precompute
from jaxcats.train.loop import Fitter, Progress
from jaxcats.train.lr_finder import LRFindBand, LRFindResult, find_lr, find_lr_band
from jaxcats.train.user_functions import UserFunctions

LR = float | Sequence[float] | slice | Literal["auto"]


def split_user_functions(options: Mapping[str, Any]) -> tuple[UserFunctions, dict[str, Any]]:
    """(functions of the user's own, the other options) of a call: `augment` may be a function or a preset's name."""
    own = {k: v for k, v in options.items() if k in ("loss_fn", "metrics") or (k == "augment" and callable(v))}
    return UserFunctions(**own), {k: v for k, v in options.items() if k not in own}


def phase_of(fixed: Mapping[str, Any], options: Mapping[str, Any], now: Mapping[str, Any]) -> Phase:
    """The Phase of a call; its values are checked later, with the whole configuration.

    Args:
        fixed: fields that the call itself decides.
        options: fields that the user gave by name.
        now: what holds otherwise; augment only where features aren't precomputed.

    Raises:
        UserError: an option that is not there, or that the call decides.
    """
    known = [f.name for f in dataclasses.fields(Phase) if f.name not in fixed]
    for name in options:
        if name in fixed:
            raise UserError(f"{name}: this call sets it itself, to {fixed[name]!r}.")
        if name not in known:
            raise UserError(f"There is no option '{name}'.{nearest(name, known)} Options: {', '.join(known)}.")
    chosen = {k: v.item() if isinstance(v, np.generic) else v for k, v in {**now, **options, **fixed}.items()}
    if "lr" in chosen:
        chosen["lr"] = spread(chosen["lr"])
    if chosen["precompute"] and "augment" not in options:
        chosen["augment"] = "none"
    return Phase(**chosen)


def spread(lr: LR) -> float | tuple[float, ...] | Literal["auto"]:
    """A learning rate as a configuration has it; slice(a, b) is geometric from a to b, slice(b) is b/10, b/10, b."""
    if isinstance(lr, slice):
        if lr.stop is None or lr.step is not None:
            raise UserError(f"lr: {lr} can't be used; expected slice(a, b) or slice(b).")
        if lr.start is None:
            return (lr.stop / 10, lr.stop / 10, lr.stop)
        if not 0 < lr.start <= lr.stop:
            raise UserError(f"lr: {lr} can't be used; expected 0 < a <= b.")
        return tuple(float(x) for x in np.geomspace(lr.start, lr.stop, 3))
    if isinstance(lr, (Sequence, np.ndarray)) and not isinstance(lr, str):
        return tuple(float(x) for x in lr)
    return float(lr) if isinstance(lr, (int, float, np.number)) else lr


class Learner(Judgement):
    """A classifier in the making. Make it with `Learner.pretrained`.

        data = ImageClassifierData.from_paths("data/dogscats", size=224)
        learn = Learner.pretrained("resnet34", data, precompute=True)
        learn.fit(0.01, 3)

    Attributes:
        data: the images; its `augment` and `batch_size` may be changed between fits.
        model: pure functions of params and batch_stats, see jaxcats.models.Model.
        history: a dict per epoch of every fit so far.
        sched: learning rates and losses of the last fit or lr_find, to plot.
    """

    def __init__(
        self,
        setup: experiment.Experiment,
        data: ImageClassifierData,
        params: Any,
        batch_stats: Any,
        *,
        workdir: Path,
        bn: Literal["frozen", "train"] = "frozen",
    ):
        if bn not in ("frozen", "train"):
            raise UserError(f"bn: {bn!r} is not one of frozen, train.")
        self.data, self.model, self.workdir = data, setup.model, workdir
        self._params, self._batch_stats = params, batch_stats
        self.history: list[Mapping[str, Any]] = []
        self.sched = Sched()
        self._setup, self._phases, self._progress = setup, dict[str, Phase](), Progress()
        self._freeze: Literal["backbone", "first", "nothing"] = "backbone"
        self._bn: Literal["frozen", "train"] = bn
        self._precompute, self._state, self._kept_best = False, None, False
        self._features: dict[str, np.ndarray] | None = None
        self._answers: dict[str, np.ndarray] = {}
        self._own: dict[str, dict[str, str]] = {}  # by fit: names of the user's functions

    @classmethod
    def pretrained(
        cls,
        backbone: str,
        data: ImageClassifierData,
        *,
        precompute: bool = False,
        weights: str | Path | None = None,
        head: Literal["lesson", "linear"] = "lesson",
        bn: Literal["frozen", "train"] = "frozen",
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
        setup = experiment.setup(validate(config), data.index)
        learn = cls(setup, data, *experiment.initial_params(setup)[:2], workdir=Path(workdir), bn=bn)
        learn.precompute = precompute
        return learn

    def __repr__(self) -> str:
        m = self.model
        return (
            f"Learner({m.name}, {m.head} head, {self._setup.preprocess.size} px, {m.dtype}; frozen: {self._freeze}; "
            f"precompute: {self._precompute}; {self._progress.epoch} epochs trained)"
        )

    # Training

    def fit(
        self,
        lr: LR,
        n_cycle: int = 1,
        *,
        cycle_len: int | None = None,
        cycle_mult: int = 1,
        keep: Literal["last", "best"] = "last",
        **options: Any,
    ) -> None:
        """Trains: `n_cycle` epochs at a constant rate, or so many cosine cycles with warm restarts.

        Args:
            lr: learning rate; three of them (early layers, late layers, head); a slice(a, b), spread geometrically from
                a to b; or "auto", the valley of an lr_find.
            n_cycle: epochs, or cycles with `cycle_len`.
            cycle_len: epochs of the first cycle; None: no cycles, a constant rate.
            cycle_mult: each cycle is so many times as long as the one before: fit(lr, 3, cycle_len=1, cycle_mult=2)
                is 1 + 2 + 4 epochs.
            keep: what stays: the last epoch, or the best (fewest validation errors, then the lowest loss).
            **options: further fields of jaxcats.Phase: optimizer, momentum, weight_decay, schedule, batch_size,
                label_smoothing, clip, accumulate, driver, ...; and functions of your own, `loss_fn`, `augment` and
                `metrics`, see jaxcats.train.user_functions.UserFunctions.

        Raises:
            UserError: values that can't be used.
            RunError: the loss is no longer a number, or lr_find gives no rate for "auto".

        After an error, or Ctrl-C, the Learner is as it was before.
        """
        counts = {"n_cycle": n_cycle, "cycle_mult": cycle_mult, "cycle_len": 1 if cycle_len is None else cycle_len}
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: {value!r} can't be used; expected a whole number, at least 1.")
        if cycle_len is None:
            self._fit(lr, {"epochs": n_cycle}, options, keep=keep)
            return
        epochs = sgdr_epochs(n_cycle, cycle_len, cycle_mult)
        cycles = {"epochs": epochs, "schedule": "sgdr", "cycle_len": cycle_len, "cycle_mult": cycle_mult}
        self._fit(lr, cycles, options, keep=keep)

    def fit_one_cycle(
        self, epochs: int, lr: LR = 2e-3, *, div: float = 25.0, pct_start: float = 0.25, keep="last", **options: Any
    ) -> None:
        """One cycle: the rate up from lr/div over the share `pct_start` of the steps, then down to lr/1e5, momentum .95, .85, .95.

        As fastai v2's; arguments otherwise as of `fit`.
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
        for name in ("pct_start", "div", "lr"):
            if name in options:
                raise UserError(f"{name}: fine_tune sets it itself; use fit_one_cycle to choose.")
        self.freeze()
        frozen = {k: v for k, v in options.items() if k != "augment" or not self._precompute}
        self.fit_one_cycle(freeze_epochs, base_lr, pct_start=0.99, **frozen)
        self.unfreeze()
        half = base_lr / 2
        self.fit_one_cycle(epochs, slice(half / 100, half), pct_start=0.3, div=5.0, keep=keep, **options)

    def lr_find(
        self, start: float = 1e-7, end: float = 10.0, *, iterations: int = 100, seeds: int = 1, **options: Any
    ) -> LRFindResult | LRFindBand:
        """Loss under a rate that grows from `start` to `end`; the Learner's state doesn't change.

        Args:
            start: first rate.
            end: what the last approaches.
            iterations: batches.
            seeds: with precompute: so many fresh heads at once, for a band.
            **options: as of `fit`.
        """
        plan, params, stats, feats = self._begin({}, options)
        train = feats["train"] if feats else None
        span = {"start": start, "end": end, "iterations": iterations}
        if seeds == 1:
            result = find_lr(self._setup, plan, params, stats, train, **span)
        else:
            result = find_lr_band(self._setup, plan, params, stats, train, seeds=seeds, **span)
        self.sched = Sched(result=result)
        return result

    def _begin(
        self, fixed: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[experiment.PhasePlan, Any, Any, dict[str, np.ndarray] | None]:
        """The plan of the next phase, the weights it starts from, and features where it trains on them."""
        now = {"batch_size": self.data.batch_size, "freeze": self._freeze, "bn": self._bn}
        own, options = split_user_functions(options)
        phase = phase_of(fixed, options, now | {"precompute": self._precompute, "augment": self.data.augment})
        name = f"fit{len(self._phases) + 1}"
        config = dataclasses.replace(self._setup.config, phases={**self._phases, name: phase})
        alone = validate(dataclasses.replace(config, phases={name: phase}))
        own.check(alone, classes=len(self.data.classes), size=self._setup.preprocess.size)
        self._setup = dataclasses.replace(self._setup, config=validate(config), own=own)
        plan = experiment.plans(self._setup)[-1]
        plan = dataclasses.replace(plan, first_step=self._progress.step, first_epoch=self._progress.epoch)
        return plan, self.params, self.batch_stats, self._computed() if phase.precompute else None

    def _fit(self, lr: LR, fixed: Mapping[str, Any], options: Mapping[str, Any], *, keep: str) -> None:
        if keep not in ("last", "best"):
            raise UserError(f"keep: {keep!r} is not one of last, best.")
        plan, params, stats, feats = self._begin({"lr": lr, **fixed}, options)
        fitter = Fitter(self._setup, table=NotebookTable() if in_notebook() else Table())
        keeper = Keeper(best=keep == "best")
        fitter.log = fitter.checkpoints = keeper
        progress = dataclasses.replace(self._progress)  # an interrupted fit leaves no trace
        progress.begin(plan)
        state = fitter.run_phase(plan, progress, None, (params, stats), feats)
        if keep == "best":
            state = keeper.state
            if not in_notebook():
                result = stats_module.sentence(keeper.row["errors"], keeper.row["n"])
                print(f"Kept epoch {keeper.row['epoch']}, the best: {result}; chosen on these images, so it flatters.")
        self._phases[plan.name] = plan.phase
        self._own |= self._setup.own.names(dataclasses.replace(self._setup.config, phases={plan.name: plan.phase}))
        self._progress, self.history = progress, [*self.history, *keeper.epochs]
        self._kept_best = self._kept_best or keep == "best"
        self.sched = Sched(rows=keeper.rows, momentum=experiment.momentum(plan), first_step=plan.first_step)
        self._take(state, backbone_too=plan.phase.freeze != "backbone" or plan.phase.bn == "train")

    def _take(self, state: TrainState, *, backbone_too: bool) -> None:
        self._state, self._params, self._batch_stats = state, state.params, state.batch_stats
        self._answers = {}
        if backbone_too:
            self._features = None

    def _computed(self) -> dict[str, np.ndarray]:
        if self._features is None:
            self._features = precompute(self._setup, self.params, self.batch_stats)[0]
        return self._features

    # What it is, and what learns

    @property
    def params(self) -> Any:
        """{"backbone": ..., "head": ...}, nested dicts of float32 arrays."""
        return self._params

    @property
    def batch_stats(self) -> Any:
        """The same two keys; running averages of BatchNorm."""
        return self._batch_stats

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

    # Keeping it

    @property
    def config(self) -> Config:
        """What was done so far, as a configuration: `train` does the same from it, but for `keep="best"` and functions of your own."""
        return dataclasses.replace(self._setup.config, phases=self._phases or {"fit1": Phase()})

    def save(self, name: str) -> Path:
        """Writes the state as a run folder `workdir/name`, which `load` and `python -m jaxcats.evaluate --run` read."""
        setup = dataclasses.replace(self._setup, config=self.config)
        notes = {"history": self.history, "kept_best": self._kept_best, "own": self._own}
        weights = (self.params, self.batch_stats)
        return save_state(self.workdir / name, setup, self._state, self._progress, weights, notes)

    def load(self, name: str | Path) -> None:
        """Takes up what `save(name)` wrote, or a finished run's folder (an absolute path).

        Raises:
            UserError: it isn't there, isn't finished, or is of another network or other classes.
        """
        state, self._progress, self._phases, notes = load_state(self.workdir / name, self._setup)
        self.history, self._kept_best, self._own = list(notes["history"]), bool(notes["kept_best"]), notes["own"]
        self._take(state, backbone_too=True)
