"""The training loop: phases, epochs, the evaluation after each, the log and the checkpoints.

`python -m jaxcats.train` calls `train_run`, which runs every phase of a run folder; a Learner calls `run_phase` of a
TrainingLoop of its own. Both drive the pure train step of `experiment.make_phase` through `drivers.make_driver`.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxcats.common import distributed, stats
from jaxcats.common.config import flat
from jaxcats.common.errors import RunError, UserError
from jaxcats.common.io import progress_bar, write_json
from jaxcats.common.signals import Stopped, Stopping
from jaxcats.core import mesh
from jaxcats.core.scan import epoch_order
from jaxcats.core.state import TrainState, copy
from jaxcats.train.checkpoint import Checkpoints
from jaxcats.train.drivers import decoding, make_driver
from jaxcats.train.epoch_table import Table
from jaxcats.train.evaluator import evaluate_split
from jaxcats.train.experiment import Experiment, PhasePlan, abstract_state, initial_params, make_phase, plans
from jaxcats.train.features import precompute
from jaxcats.train.lr_finder import Sweep, find_lr, write_lr_find
from jaxcats.train.run_folder import NoLog, RunLog, check_config
from jaxcats.train.user_functions import check_same_functions

SMOOTHING = 0.98  # of the training loss that is shown, as fastai's
LR_FIND_SEEDS = 5  # fresh heads that decide `lr: auto` where one range test gives no answer

Weights = tuple[Any, Any]  # params, batch_stats
Features = Mapping[str, np.ndarray]  # float32 [n, F] by split; empty in a phase without precompute


class Log(Protocol):
    """Where the loop writes rows of metrics: RunLog, NoLog, or the memory of a Learner."""

    def write(self, rows: list[dict[str, Any]]) -> None: ...


class StateSaver(Protocol):
    """Where the loop saves states: Checkpoints, or the memory of a Learner."""

    def save(self, state: TrainState, meta: Mapping[str, Any], *, metrics: Any = None) -> None: ...


@dataclass
class Progress:
    """Where a run is; the JSON half of a checkpoint.

    Attributes:
        plan: index of the phase.
        epoch: whole epochs done, over all phases.
        epoch_step: steps done of the current epoch.
        step: steps done, over all phases.
        smooth: running average of the training loss in this phase, not yet debiased.
        smooth_steps: losses in that average.
        lr: what lr_find chose for the phase, with `lr: auto`.
    """

    plan: int = 0
    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    smooth: float = 0.0
    smooth_steps: int = 0
    lr: float | None = None

    def begin_phase(self, plan: PhasePlan) -> None:
        """Resets what belongs to a phase."""
        self.plan, self.smooth, self.smooth_steps, self.lr = plan.index, 0.0, 0, None

    def add_loss(self, loss: float) -> None:
        """Takes the loss of a step into the average."""
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        self.smooth_steps += 1

    @property
    def train_loss(self) -> float:
        """The debiased average, as fastai shows it."""
        return self.smooth / (1 - SMOOTHING**self.smooth_steps) if self.smooth_steps else math.nan


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training.

    Attributes:
        params: of the checkpoint that the configuration chooses (last or best).
        batch_stats: of the same checkpoint.
        step: the step of that checkpoint.
        identity: the hash of its state; see Checkpoints.
        valid_features: of the validation images, where this very backbone computed them; else None.
        seconds: by phase and part.
        feature_counts: {"reused", "computed"} of the last precompute.
    """

    params: Any
    batch_stats: Any
    step: int
    identity: str
    valid_features: np.ndarray | None
    seconds: dict[str, float]
    feature_counts: dict[str, int]


def train_run(
    experiment: Experiment, workdir: Path, *, on_accepted: Callable[[], None], facts: dict[str, Any], stopping: Stopping
) -> TrainingResult:
    """Runs all phases in a run folder, from its latest checkpoint if there is one.

    Args:
        experiment: what to train.
        workdir: the run folder.
        on_accepted: called by the primary process once it is clear that the run can start or resume.
        facts: saved with each checkpoint: versions, fingerprint of the images and the like.
        stopping: asked after each step whether to save and leave.

    Raises:
        UserError: the images, settings, functions or precision of a resumed run have changed.
        RunError: the loss is no longer a number, or a checkpoint can't be saved.
        Stopped: after SIGTERM or Ctrl-C, once the state is saved.
    """
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir / "checkpoints")))
        resumed = resume_point(experiment, checkpoints, facts["fingerprint"])
        distributed.on_primary(on_accepted)
        progress, state = resumed or (Progress(), None)
        log: Log = NoLog()
        if distributed.is_primary():
            # A state saved within an epoch, or before the evaluation at its end, still needs that evaluation.
            step, evaluated = progress.step if resumed else None, progress.epoch_step == 0
            log = stack.enter_context(contextlib.closing(RunLog(workdir, resume_step=step, evaluated=evaluated)))
        loop = TrainingLoop(experiment, progress, log, checkpoints, facts, stopping=stopping, workdir=workdir)
        all_plans = plans(experiment)
        if state:
            weights: Weights = state.params, state.batch_stats
            where = f"step {progress.step:,} (epoch {progress.epoch})"
            done = progress.epoch == all_plans[-1].end_epoch
            print(f"Finished already, at {where}; evaluating again." if done else f"Resuming at {where}.")
        else:
            with loop.clock("weights"):
                params, batch_stats, source = distributed.all_or_none(lambda: initial_params(experiment))
            if distributed.is_primary():
                write_json(workdir / "versions.json", facts | {"weights": source})
            weights = mesh.replicate((params, batch_stats))
        features, counts = {}, {}
        for plan in all_plans[progress.plan :]:
            if plan.index != progress.plan:
                progress.begin_phase(plan)
                state = None
            features = {}
            if plan.phase.precompute:
                with loop.clock(f"{plan.name}.features"):
                    features, counts = precompute(experiment, *weights)
            state = loop.run_phase(plan, weights, features, state=state)
            weights = state.params, state.batch_stats
        with loop.clock("checkpoint_wait"):
            checkpoints.wait()
        valid = features.get("valid")
        step = checkpoints.pick(experiment.config.checkpoint.use)
        if step != progress.step:
            plan = all_plans[checkpoints.meta(step)["progress"]["plan"]]
            best = checkpoints.restore(step, abstract_state(experiment.model, plan))
            weights = best.params, best.batch_stats
            valid = valid if plan.index == progress.plan else None
        return TrainingResult(*weights, step, checkpoints.identity(step), valid, loop.seconds, counts)


def resume_point(experiment: Experiment, checkpoints: Checkpoints, images: str) -> tuple[Progress, TrainState] | None:
    """(Progress, TrainState) of the latest checkpoint, or None.

    Args:
        experiment: what is trained now.
        checkpoints: of the run.
        images: their fingerprint.

    Raises:
        UserError: the run can't be resumed as it was started.
    """
    steps = checkpoints.steps()
    if not steps:
        return None
    config, dtype = experiment.config, experiment.model.dtype
    meta = checkpoints.meta(steps[-1])
    check_config(config, meta)
    check_same_functions(experiment.user_functions.names(config), meta.get("own", {}))
    if meta["fingerprint"] != images:
        raise UserError(
            f"{config.data.root}: the images have changed since this run was started. Restore them, or train into a new --workdir."
        )
    if meta["dtype"] != dtype:
        raise UserError(
            f"precision: this run was computed in {meta['dtype']}, not {dtype}; resume it on the kind of device it started on."
        )
    progress = Progress(**meta["progress"])
    return progress, checkpoints.restore(steps[-1], abstract_state(experiment.model, plans(experiment)[progress.plan]))


@dataclass
class TrainingLoop:
    """Runs phases one after the other.

    Attributes:
        experiment: what all phases share.
        progress: the position of the run; updated as it advances.
        log: takes the rows of metrics.
        checkpoints: take the states.
        facts: saved with each checkpoint.
        table: shows the epochs.
        stopping: asked after each step whether to save and leave.
        workdir: folder for the range tests of `lr: auto`; None: they are not kept.
        seconds: time spent, by phase and part.
    """

    experiment: Experiment
    progress: Progress
    log: Log
    checkpoints: StateSaver
    facts: Mapping[str, Any] = field(default_factory=dict)
    table: Table = field(default_factory=Table)
    stopping: Stopping = field(default_factory=Stopping)
    workdir: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Adds the time of a `with` block to `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run_phase(
        self, plan: PhasePlan, weights: Weights, features: Features, *, state: TrainState | None = None
    ) -> TrainState:
        """Runs a phase from where `progress` is, and returns the state at its end.

        Args:
            plan: the phase.
            weights: (params, batch_stats) that the phase starts from.
            features: of the training and validation images, with precompute; else empty.
            state: of a resumed phase; None: the phase begins.
        """
        plan = self.resolve_lr(plan, weights, features)
        train_step, create_state = make_phase(self.experiment, plan)
        state = create_state(*weights) if state is None else state
        if self.progress.epoch >= plan.end_epoch:
            return state
        with self.clock(f"{plan.name}.prepare"):
            drive = make_driver(self.experiment, plan, train_step, features.get("train"))
        # One program where all layer groups learn alike, since each is traced and compiled.
        schedules = [jax.jit(s) for s in plan.lr_schedules()[: 1 if len(set(plan.phase.lrs)) == 1 else None]]
        # The driver donates the state, and the caller may still hold its arrays.
        running: TrainState = copy(mesh.replicate(state))
        with self.stopping.patient():
            while self.progress.epoch < plan.end_epoch:
                start, first_step = time.perf_counter(), self.progress.epoch_step
                with self.clock(f"{plan.name}.train"):
                    running = self.run_epoch(plan, running, drive, schedules)
                seconds, steps = time.perf_counter() - start, plan.steps_per_epoch - first_step
                logits = self.evaluate_epoch(plan, running, features.get("valid"))
                batch_size = min(plan.phase.batch_size, len(self.experiment.index.splits["train"]))
                self.end_epoch(plan, running, logits, seconds=seconds, rate=steps * batch_size / seconds)
        self.table.end()
        return running

    def resolve_lr(self, plan: PhasePlan, weights: Weights, features: Features) -> PhasePlan:
        """The plan with a number for `lr: auto`: the valley of a range test, or RunError where that can't be trusted."""
        if plan.phase.lr != "auto":
            return plan
        progress, train_features = self.progress, features.get("train")
        if progress.lr is None:
            with self.clock(f"{plan.name}.lr_find"):
                result = find_lr(self.experiment, plan, weights, train_features)
                # One noisy curve may mislead where several fresh heads do not. They can't replace a trained head.
                if result.refusal and features and progress.step == 0:
                    result = find_lr(self.experiment, plan, weights, train_features, Sweep(seeds=LR_FIND_SEEDS))
            if self.workdir and distributed.is_primary():
                write_lr_find(self.workdir, result, name=f"lr_find_{plan.name}")
            if result.refusal:
                way_out = f"Set phases.{plan.name}.lr to a number."
                raise RunError(f"phase '{plan.name}': lr_find suggests no rate ({result.refusal}). {way_out}")
            progress.lr = float(result.suggestion())
            print(f"{plan.name}: learning rate {progress.lr:.3g}, by lr_find ({result.why})")
        return plan.with_lr(progress.lr)

    def run_epoch(self, plan: PhasePlan, state: TrainState, drive: Callable, schedules: list[Callable]) -> TrainState:
        """Runs the rest of an epoch; saves within it where the configuration or a signal asks for it."""
        progress, config = self.progress, self.experiment.config
        n, every = len(self.experiment.index.splits["train"]), config.checkpoint.every_steps
        order = epoch_order(n, batch_size=plan.phase.batch_size, seed=config.seed, epoch=progress.epoch)
        steps, batch_size = order.shape
        pending = None  # (first step, metrics) that the device may still compute: they are read one chunk later
        name, done = f"{plan.name} {progress.epoch}", progress.epoch_step * batch_size
        with progress_bar(total=steps * batch_size, initial=done, desc=name) as bar:
            for new_state, sums in drive(state, order[progress.epoch_step :], progress.epoch):
                state = new_state
                if pending:
                    self.log_step_metrics(plan, *pending, schedules, bar)
                pending = (progress.step, sums)
                before, new_steps = progress.step, len(sums["n"])
                progress.step += new_steps
                progress.epoch_step += new_steps
                due = every and progress.step // every > before // every
                stop = self.stopping.asked()
                if (due or stop) and progress.epoch_step < steps:
                    self.log_step_metrics(plan, *pending, schedules, bar)
                    pending = None
                    self.save(plan, state)
                    if stop:
                        raise self.stopping.leave(progress.step)
            if pending:
                self.log_step_metrics(plan, *pending, schedules, bar)
        return state

    def log_step_metrics(
        self, plan: PhasePlan, first_step: int, sums: Mapping[str, jax.Array], schedules: list[Callable], bar: Any
    ) -> None:
        """Writes the metrics of steps to the log and the progress bar; RunError where a loss is not a number."""
        values = jax.device_get(sums)
        losses = (values["loss"] / values["n"]).astype(float)
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            raise _diverged(plan, f"the loss is {losses[bad[0]]} at step {first_step + bad[0] + 1}")
        rows = []
        for step, loss in enumerate(losses.tolist(), start=first_step):
            self.progress.add_loss(loss)
            lrs = [float(schedule(step - plan.first_step)) for schedule in schedules]
            rows.append({"step": step + 1, "loss": loss, "lr": lrs[-1] if len(set(lrs)) == 1 else lrs})
        self.log.write(rows)
        bar.update(int(values["n"].sum()))
        bar.set_postfix_str(f"loss {self.progress.train_loss:.4f}")

    def evaluate_epoch(self, plan: PhasePlan, state: TrainState, features: np.ndarray | None) -> np.ndarray:
        """Logits of the validation images. A signal interrupts it and saves the state; a resumed run starts with it."""
        experiment, valid = self.experiment, self.experiment.index.splits["valid"]
        try:
            with self.clock(f"{plan.name}.evaluate"), self.stopping.patient(False):
                return evaluate_split(
                    experiment.model, valid, state.params, state.batch_stats, features=features, **decoding(experiment)
                )
        except Stopped as stopped:
            if stopped.signum == signal.SIGINT and distributed.is_multiprocess():
                raise  # The other processes are not told of Ctrl-C, and a checkpoint needs them all.
            self.save(plan, state)
            raise self.stopping.leave(self.progress.step) from None

    def end_epoch(self, plan: PhasePlan, state: TrainState, logits: np.ndarray, *, seconds: float, rate: float) -> None:
        """Brings the validation metrics into table, log and checkpoint; leaves where a signal has asked for it."""
        progress, labels = self.progress, self.experiment.index.splits["valid"].labels
        metrics = stats.summary(logits, labels)
        if not math.isfinite(metrics["log_loss"]):
            raise _diverged(plan, f"the validation loss after epoch {progress.epoch} is not a number")
        row = {"step": progress.step, "phase": plan.name, "epoch": progress.epoch, "train_loss": progress.train_loss}
        row |= {"valid_loss": metrics["log_loss"]} | {k: metrics[k] for k in ("errors", "n", "accuracy", "interval")}
        row |= {"seconds": seconds, "images_per_second": rate}
        if user_metrics := self.experiment.user_functions.measure(logits, labels):
            row["metrics"] = user_metrics
        self.table.add(row)
        self.log.write([row])
        progress.epoch, progress.epoch_step = progress.epoch + 1, 0
        done, every = progress.epoch - plan.first_epoch, self.experiment.config.checkpoint.every_epochs
        if done % every == 0 or progress.epoch == plan.end_epoch or self.stopping.signum is not None:
            with self.clock(f"{plan.name}.checkpoint"):
                self.save(plan, state, {"errors": float(metrics["errors"]), "loss": metrics["log_loss"]})
            if self.stopping.signum is not None:
                raise self.stopping.leave(progress.step)

    def save(self, plan: PhasePlan, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Starts saving a checkpoint; raises RunError if its weights are not finite."""
        weights = jax.device_get(jax.tree.leaves((state.params, state.batch_stats)))
        if not all(np.isfinite(x).all() for x in weights):
            raise _diverged(plan, f"the weights are no longer numbers at step {self.progress.step}")
        facts = checkpoint_facts(self.experiment, self.progress, plan.name)
        self.checkpoints.save(state, {**self.facts, **facts}, metrics=metrics)


def checkpoint_facts(experiment: Experiment, progress: Progress, phase: str) -> dict[str, Any]:
    """The JSON facts of a checkpoint; the callers add the fingerprint of the images."""
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "phase": phase,
        "progress": dataclasses.asdict(progress),
        "classes": list(experiment.index.classes),
        "config": flat(experiment.config),
        "dtype": experiment.model.dtype,
    }


def _diverged(plan: PhasePlan, problem: str) -> RunError:
    advice = f"Try a lower learning rate (phases.{plan.name}.lr is {plan.phase.lr}), or precision: float32."
    return RunError(f"phase '{plan.name}': {problem}. {advice}")
