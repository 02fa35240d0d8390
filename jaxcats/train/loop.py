"""The one place that runs phases: driver, evaluation, table, log, checkpoints; used by runs.py and learner.py."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcats.common import distributed
from jaxcats.common import stats as stats_module
from jaxcats.common.config import flat
from jaxcats.common.distributed import is_primary, on_primary
from jaxcats.common.errors import RunError, UserError
from jaxcats.common.io import progress_bar
from jaxcats.common.signals import Stopped, Stopping
from jaxcats.core import mesh
from jaxcats.core.scan import epoch_order
from jaxcats.core.state import copy
from jaxcats.train.checkpoint import Checkpoints
from jaxcats.train.drivers import decoding, make_driver
from jaxcats.train.epoch_table import Table
from jaxcats.train.evaluator import Evaluator
from jaxcats.train.experiment import (
    Experiment,
    PhasePlan,
    abstract_state,
    check_config,
    fingerprint,
    make_phase,
    plans,
    schedules,
)
from jaxcats.train.features import precompute
from jaxcats.train.lr_finder import find_lr, find_lr_band, write_lr_find
from jaxcats.train.run_folder import NoLog, RunLog
from jaxcats.train.user_functions import check_same_functions

SMOOTHING = 0.98  # of the shown training loss, as fastai's
SEEDS = 5  # heads that decide `lr: auto` where one test gives no answer


@dataclass
class Progress:
    """Where a run is; the JSON half of a checkpoint.

    Attributes:
        plan: index of the phase.
        epoch: whole epochs done, over all phases.
        epoch_step: steps done of the epoch under way.
        step: steps done, over all phases.
        smooth: average of the training loss since the phase began, not yet debiased.
        smooth_steps: losses in it.
        lr: what lr_find chose for the phase, with `lr: auto`.
    """

    plan: int = 0
    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    smooth: float = 0.0
    smooth_steps: int = 0
    lr: float | None = None

    def begin(self, plan: PhasePlan) -> None:
        """At the start of a phase."""
        self.plan, self.smooth, self.smooth_steps, self.lr = plan.index, 0.0, 0, None

    def add_loss(self, loss: float) -> None:
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        self.smooth_steps += 1

    @property
    def train_loss(self) -> float:
        """Debiased average, as fastai shows it."""
        return self.smooth / (1 - SMOOTHING**self.smooth_steps) if self.smooth_steps else float("nan")


class Fitter:
    """Runs phases; whoever uses it gives it a `log` and a place for `checkpoints`.

    Attributes:
        log: `write(rows)`, see RunLog.
        checkpoints: `save(state, meta, metrics=)`, see Checkpoints.
        seconds: by phase and part.
        stopping: asked after each step whether to save and leave; None: never.
    """

    log: Any
    checkpoints: Any
    stopping: Stopping | None = None

    def __init__(
        self,
        setup: Experiment,
        *,
        facts: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
        table: Table | None = None,
    ):
        """`facts` (versions and the like) are saved with each checkpoint; `say` prints; `table` shows the epochs."""
        self.setup, self.facts, self.say = setup, facts or {}, say
        self.table = table or Table(say)
        self.fingerprint = fingerprint(setup.index)  # once: it reads every row of the index
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def clock(self, plan: PhasePlan | None, what: str) -> Iterator[None]:
        """Adds the time of a `with` block to `seconds`."""
        name, start = f"{plan.name}.{what}" if plan else what, time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run_phase(self, plan: PhasePlan, progress: Progress, state: Any, start: tuple[Any, Any], feats: Any) -> Any:
        """One phase, from where `progress` says; the state at its end."""
        plan = self.resolve_lr(plan, progress, start, feats)
        phase = plan.phase
        last_epoch = plan.first_epoch + phase.epochs
        step, create = make_phase(self.setup, plan)
        state = create(*start) if state is None else state
        if progress.epoch >= last_epoch:
            return state
        with self.clock(plan, "prepare"):
            drive = make_driver(self.setup, plan, step, feats["train"] if feats else None)
        evaluate = Evaluator(
            self.setup.model,
            self.setup.index.splits["valid"],
            feats=feats["valid"] if feats else None,
            **decoding(self.setup),
        )
        # Once a phase, and one where all layer groups learn alike: each is a program to trace and load.
        lrs = [jax.jit(s) for s in schedules(plan)[: 1 if len(set(phase.lrs)) == 1 else None]]
        # Donation deletes what the caller may still hold, so the driver gets a copy.
        state = copy(mesh.replicate(state))
        with self.stopping.patient() if self.stopping else contextlib.nullcontext():
            state = self.run_epochs(plan, progress, state, (drive, evaluate, lrs))
        self.table.end()
        return state

    def run_epochs(
        self, plan: PhasePlan, progress: Progress, state: Any, parts: tuple[Callable, Callable, list]
    ) -> Any:
        """A phase's epochs, by (driver, evaluation, schedules); the state at their end."""
        (drive, evaluate, lrs), phase = parts, plan.phase
        n = len(self.setup.index.splits["train"])
        while progress.epoch < plan.first_epoch + phase.epochs:
            order = epoch_order(n, batch_size=phase.batch_size, seed=self.setup.config.seed, epoch=progress.epoch)
            before = time.perf_counter()
            images = (len(order) - progress.epoch_step) * order.shape[1]
            with self.clock(plan, "train"):
                state = self.run_epoch(plan, progress, state, drive, order, lrs)
            seconds = time.perf_counter() - before
            try:
                with (
                    self.clock(plan, "evaluate"),
                    self.stopping.at_once() if self.stopping else contextlib.nullcontext(),
                ):
                    logits = evaluate(state.params, state.batch_stats)
            except Stopped as stopped:  # resumed, it begins with this evaluation
                if stopped.signum == signal.SIGINT and distributed.is_multiprocess():
                    raise  # the other processes know nothing of it, and a checkpoint needs them all
                self.save(plan, progress, state)
                raise Stopped.saved(stopped.signum, progress.step) from None
            self.end_epoch(plan, progress, state, logits, seconds, images / seconds)
            if self.stopping and self.stopping.signum is not None:
                raise self.stopping.leave(progress.step)
        return state

    def resolve_lr(self, plan: PhasePlan, progress: Progress, start: tuple[Any, Any], feats: Any) -> PhasePlan:
        """The plan with a number for `lr: auto`: the valley of a range test, or RunError when that can't be trusted."""
        if plan.phase.lr != "auto":
            return plan
        if progress.lr is None:
            with self.clock(plan, "lr_find"):
                result = find_lr(self.setup, plan, *start, feats["train"] if feats else None)
                # One noisy curve may mislead where several fresh heads don't; for a head that is trained they say nothing.
                if result.refusal and feats and progress.step == 0:
                    result = find_lr_band(self.setup, plan, *start, feats["train"], seeds=SEEDS)
            self.keep_lr_find(plan, result)
            if result.refusal:
                raise RunError(
                    f"phase '{plan.name}': lr_find gives no rate ({result.refusal}). Set phases.{plan.name}.lr to a number."
                )
            progress.lr = float(result.suggestion())
            self.say(f"{plan.name}: learning rate {progress.lr:.3g}, by lr_find ({result.why})")
        return plan.with_lr(progress.lr)

    def keep_lr_find(self, plan: PhasePlan, result: Any) -> None:
        """For subclasses that keep lr_find's result."""

    def run_epoch(
        self, plan: PhasePlan, progress: Progress, state: Any, drive: Callable, order: np.ndarray, lrs: list
    ) -> Any:
        """The rest of an epoch; saves in the middle where the configuration says so."""
        every = self.setup.config.checkpoint.every_steps
        size = order.shape[1]
        pending = None
        desc, total = f"{plan.name} {progress.epoch}", len(order) * size
        with progress_bar(total=total, initial=progress.epoch_step * size, desc=desc) as bar:
            for new, sums in drive(state, order[progress.epoch_step :], progress.epoch):
                state = new
                if pending:
                    self.read(plan, progress, pending, lrs, bar)
                done = len(sums["n"])
                pending = (progress.step, sums)
                last, progress.step = progress.step, progress.step + done
                progress.epoch_step += done
                due = every and progress.step // every > last // every
                stop = self.stopping is not None and self.stopping.asked()
                if (due or stop) and progress.epoch_step < len(order):
                    self.read(plan, progress, pending, lrs, bar)
                    pending = None
                    self.save(plan, progress, state)
                    if self.stopping and stop:
                        raise self.stopping.leave(progress.step)
            if pending:
                self.read(plan, progress, pending, lrs, bar)
        return state

    def read(self, plan: PhasePlan, progress: Progress, pending: tuple[int, Any], lrs: list, bar: Any) -> None:
        """Metrics of steps already dispatched: the log, the bar, and the end of a run whose loss is not a number."""
        at, sums = pending[0], jax.device_get(pending[1])
        losses = (sums["loss"] / sums["n"]).astype(float)
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            raise RunError(
                f"phase '{plan.name}': the loss is {losses[bad[0]]} at step {at + bad[0] + 1} (steps {at + 1} to "
                f"{at + len(losses)} were run together). {_try(plan)}, or precision: float32."
            )
        rows = []
        for i, loss in enumerate(losses.tolist()):
            progress.add_loss(loss)
            rates = [float(s(at + i - plan.first_step)) for s in lrs]
            rows.append({"step": at + i + 1, "loss": loss, "lr": rates[-1] if len(set(rates)) == 1 else rates})
        self.log.write(rows)
        bar.update(int(sums["n"].sum()))
        bar.set_postfix_str(f"loss {progress.train_loss:.4f}")

    def end_epoch(
        self, plan: PhasePlan, progress: Progress, state: Any, logits: np.ndarray, seconds: float, rate: float
    ) -> None:
        """Validation numbers into table, log and checkpoint."""
        found = stats_module.summary(logits, self.setup.index.splits["valid"].labels)
        if not math.isfinite(found["log_loss"]):
            raise RunError(
                f"phase '{plan.name}': the validation loss after epoch {progress.epoch} is not a number. {_try(plan)}."
            )
        row = {
            "step": progress.step,
            "phase": plan.name,
            "epoch": progress.epoch,
            "train_loss": progress.train_loss,
            "valid_loss": found["log_loss"],
            "errors": found["errors"],
            "n": found["n"],
            "accuracy": found["accuracy"],
            "interval": found["interval"],
            "seconds": seconds,
            "images_per_second": rate,
        }
        if own := self.setup.own.measure(logits, self.setup.index.splits["valid"].labels):
            row["metrics"] = own
        self.table.add(row)
        self.log.write([row])
        progress.epoch, progress.epoch_step = progress.epoch + 1, 0
        judged = {"errors": float(found["errors"]), "loss": found["log_loss"]}
        done = progress.epoch - plan.first_epoch
        stop = self.stopping is not None and self.stopping.signum is not None
        if stop or done % self.setup.config.checkpoint.every_epochs == 0 or done == plan.phase.epochs:
            with self.clock(plan, "checkpoint"):
                self.save(plan, progress, state, judged)

    def save(self, plan: PhasePlan, progress: Progress, state: Any, judged: dict[str, float] | None = None) -> None:
        """Starts a checkpoint; RunError instead of one whose weights are not numbers."""
        leaves = jax.tree.leaves((state.params, state.batch_stats))
        if not all(np.isfinite(x).all() for x in jax.device_get(leaves)):
            raise RunError(
                f"phase '{plan.name}': the weights are no longer numbers at step {progress.step}. {_try(plan)}."
            )
        meta = {
            **self.facts,
            "step": progress.step,
            "epoch": progress.epoch,
            "phase": plan.name,
            "progress": vars(progress).copy(),
            "classes": list(self.setup.index.classes),
            "config": flat(self.setup.config),
            "dtype": self.setup.model.dtype,
            "fingerprint": self.fingerprint,
        }
        self.checkpoints.save(state, meta, metrics=judged)


def _try(plan: PhasePlan) -> str:
    return f"Try a lower learning rate (phases.{plan.name}.lr is {plan.phase.lr})"


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves.

    Attributes:
        params: of the checkpoint that the configuration wants judged.
        batch_stats: likewise.
        step: its step.
        identity: its hash; see Checkpoints.
        valid_features: of the validation images, where they were computed with this very backbone; else None.
        seconds: by phase and part.
        counts: features {"reused", "computed"} of the last precompute.
    """

    params: Any
    batch_stats: Any
    step: int
    identity: str
    valid_features: np.ndarray | None
    seconds: dict[str, float]
    counts: dict[str, int]


def resume_point(setup: Experiment, checkpoints: Checkpoints) -> tuple[Progress, Any] | None:
    """(Progress, TrainState) of the latest checkpoint, or None; UserError when the images have changed since."""
    steps = checkpoints.steps()
    if not steps:
        return None
    meta = checkpoints.meta(steps[-1])
    check_config(setup.config, meta)
    check_same_functions(setup.own.names(setup.config), meta.get("own", {}))
    if meta["fingerprint"] != fingerprint(setup.index):
        raise UserError(
            f"{setup.config.data.root}: the images have changed since this run was started; a resumed run would "
            f"not be the same. Restore the folder, or train into a new --workdir."
        )
    if meta["dtype"] != setup.model.dtype:
        raise UserError(
            f"precision: this run was computed in {meta['dtype']}, this machine would go on in {setup.model.dtype}; add "
            f"--precision {meta['dtype']} to a new run, or resume on the kind of device it began on."
        )
    progress = Progress(**meta["progress"])
    target = abstract_state(setup.model, plans(setup)[progress.plan])
    return progress, checkpoints.restore(steps[-1], target)


class Trainer(Fitter):
    """Runs the phases of one run folder."""

    def __init__(
        self,
        setup: Experiment,
        workdir: Path,
        *,
        facts: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
        stopping: Stopping | None = None,
    ):
        """`facts` (versions and the like) are saved with each checkpoint; `say` prints; `stopping` is asked after each step."""
        super().__init__(setup, facts=facts, say=say)
        self.workdir, self.stopping = workdir, stopping
        self.checkpoints = Checkpoints(workdir / "checkpoints")

    def run(
        self, initial: Callable[[], tuple[Any, Any]], accepted: Callable[[], None] = lambda: None
    ) -> TrainingResult:
        """All phases, from the latest checkpoint where there is one, else from `initial()` = (params, batch_stats).

        `accepted` is called, by the first process, once it is clear that the run in the folder can be gone on with.
        """
        point = resume_point(self.setup, self.checkpoints)
        on_primary(accepted)
        progress, state = point or (Progress(), None)
        resume_step = progress.step if point else None
        # What was saved within an epoch, or before the evaluation at its end, has that to come.
        evaluated = progress.epoch_step == 0
        self.log = RunLog(self.workdir, resume_step=resume_step, evaluated=evaluated) if is_primary() else NoLog()
        last = plans(self.setup)[-1]
        finished = progress.epoch == last.first_epoch + last.phase.epochs
        if point:
            where = f"step {progress.step:,} (epoch {progress.epoch})"
            self.say(f"Finished already, at {where}; evaluating again." if finished else f"Resuming at {where}.")
        params, stats = (state.params, state.batch_stats) if state else mesh.replicate(initial())
        feats, counts = None, {}
        for plan in plans(self.setup)[progress.plan :]:
            if plan.index != progress.plan:
                progress.begin(plan)
                state = None
            feats = None
            if plan.phase.precompute:
                with self.clock(plan, "features"):
                    feats, counts = precompute(self.setup, params, stats)
            state = self.run_phase(plan, progress, state, (params, stats), feats)
            params, stats = state.params, state.batch_stats
        valid = feats["valid"] if feats else None
        with self.clock(None, "checkpoint_wait"):
            self.checkpoints.wait()
        step = self.checkpoints.pick(self.setup.config.checkpoint.use)
        if step != progress.step:
            meta = self.checkpoints.meta(step)
            plan = plans(self.setup)[meta["progress"]["plan"]]
            best = self.checkpoints.restore(step, abstract_state(self.setup.model, plan))
            params, stats, valid = best.params, best.batch_stats, valid if plan.index == progress.plan else None
        return TrainingResult(params, stats, step, self.checkpoints.identity(step), valid, self.seconds, counts)

    def keep_lr_find(self, plan: PhasePlan, result: Any) -> None:
        """Keeps lr_find's result in the run folder."""
        if is_primary():
            write_lr_find(self.workdir, result, name=f"lr_find_{plan.name}")

    def close(self) -> None:
        """Waits for saves under way and closes the log."""
        try:
            self.checkpoints.close()
        finally:
            if hasattr(self, "log"):
                self.log.close()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
