"""The one place that runs phases: precompute, driver, checkpoints, resumption, logging."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxcats.config import flat
from jaxcats.core.scan import epoch_order
from jaxcats.core.state import copy
from jaxcats.errors import RunError, UserError
from jaxcats.inputs import Evaluator, decoding, make_driver, precompute
from jaxcats.job import Plan, Setup, abstract_state, check_config, fingerprint, make_phase, plans, schedules
from jaxcats.results import metrics
from jaxcats.storage.checkpoint import Checkpoints
from jaxcats.storage.log import RunLog

SMOOTHING = 0.98  # of the shown training loss, as fastai's


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
    """

    plan: int = 0
    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    smooth: float = 0.0
    smooth_steps: int = 0

    def add_loss(self, loss: float) -> None:
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        self.smooth_steps += 1

    @property
    def train_loss(self) -> float:
        """Debiased average, as fastai shows it."""
        return self.smooth / (1 - SMOOTHING**self.smooth_steps) if self.smooth_steps else float("nan")


@dataclass(frozen=True)
class Fitted:
    """What training leaves.

    Attributes:
        params: of the checkpoint that the configuration wants judged.
        batch_stats: likewise.
        step: its step.
        valid_features: of the validation pictures, where they were computed with this very backbone; else None.
        seconds: by phase and part.
        counts: features {"reused", "computed"} of the last precompute.
    """

    params: Any
    batch_stats: Any
    step: int
    valid_features: np.ndarray | None
    seconds: dict[str, float]
    counts: dict[str, int]


def resume_point(setup: Setup, checkpoints: Checkpoints) -> tuple[Progress, Any] | None:
    """(Progress, TrainState) of the latest checkpoint, or None; UserError when the pictures have changed since."""
    steps = checkpoints.steps()
    if not steps:
        return None
    meta = checkpoints.meta(steps[-1])
    check_config(setup.config, meta)
    if meta["fingerprint"] != fingerprint(setup.index):
        raise UserError(
            f"{setup.config.data.root}: the pictures have changed since this run was started; a resumed run would "
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


class Trainer:
    """Runs the phases of one run folder."""

    def __init__(
        self, setup: Setup, workdir: Path, *, facts: Mapping[str, Any] | None = None, say: Callable[[str], None] = print
    ):
        """`facts` (versions and the like) are saved with each checkpoint; `say` prints."""
        self.setup, self.workdir, self.facts, self.say = setup, workdir, facts or {}, say
        self.fingerprint = fingerprint(setup.index)  # once: it reads every row of the index
        self.checkpoints = Checkpoints(workdir / "checkpoints")
        self.seconds: dict[str, float] = {}

    def run(self, initial: Callable[[], tuple[Any, Any]]) -> Fitted:
        """All phases, from the latest checkpoint where there is one, else from `initial()` = (params, batch_stats)."""
        point = resume_point(self.setup, self.checkpoints)
        progress, state = point or (Progress(), None)
        self.log = RunLog(self.workdir, resume_step=progress.step if point else None)
        last = plans(self.setup)[-1]
        finished = progress.epoch == last.first_epoch + last.phase.epochs
        if point:
            where = f"step {progress.step:,} (epoch {progress.epoch})"
            self.say(f"Finished already, at {where}; evaluating again." if finished else f"Resuming at {where}.")
        params, stats = (state.params, state.batch_stats) if state else initial()
        if not finished:
            self.say(metrics.table_head())
        feats, counts = None, {}
        for plan in plans(self.setup)[progress.plan :]:
            if plan.index != progress.plan:
                progress.plan, progress.smooth, progress.smooth_steps, state = plan.index, 0.0, 0, None
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
        return Fitted(params, stats, step, valid, self.seconds, counts)

    def close(self) -> None:
        """Waits for saves under way and closes the log."""
        self.checkpoints.close()
        if hasattr(self, "log"):
            self.log.close()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    @contextlib.contextmanager
    def clock(self, plan: Plan | None, what: str) -> Iterator[None]:
        """Adds the time of a `with` block to `seconds`."""
        name, start = f"{plan.name}.{what}" if plan else what, time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run_phase(self, plan: Plan, progress: Progress, state: Any, start: tuple[Any, Any], feats: Any) -> Any:
        """One phase, from where `progress` says; the state at its end."""
        phase, n = plan.phase, len(self.setup.index.splits["train"])
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
        # Donation deletes what the caller may still hold, so the driver gets a copy.
        state = copy(state)
        while progress.epoch < last_epoch:
            order = epoch_order(n, batch_size=phase.batch_size, seed=self.setup.config.seed, epoch=progress.epoch)
            before = time.perf_counter()
            pictures = (len(order) - progress.epoch_step) * order.shape[1]
            with self.clock(plan, "train"):
                state = self.run_epoch(plan, progress, state, drive, order)
            seconds = time.perf_counter() - before
            with self.clock(plan, "evaluate"):
                logits = evaluate(state.params, state.batch_stats)
            self.end_epoch(plan, progress, state, logits, seconds, pictures / seconds)
        return state

    def run_epoch(self, plan: Plan, progress: Progress, state: Any, drive: Callable, order: np.ndarray) -> Any:
        """The rest of an epoch; saves in the middle where the configuration says so."""
        every, lrs = self.setup.config.checkpoint.every_steps, [jax.jit(s) for s in schedules(plan)]
        size = order.shape[1]
        pending = None
        desc, total = f"{plan.name} {progress.epoch}", len(order) * size
        with tqdm(
            total=total, initial=progress.epoch_step * size, desc=desc, unit="img", disable=None, leave=False
        ) as bar:
            for new, sums in drive(state, order[progress.epoch_step :], progress.epoch):
                state = new
                if pending:
                    self.read(plan, progress, pending, lrs, bar)
                done = len(sums["n"])
                pending = (progress.step, sums)
                last, progress.step = progress.step, progress.step + done
                progress.epoch_step += done
                due = every and progress.step // every > last // every
                if due and progress.epoch_step < len(order):
                    self.read(plan, progress, pending, lrs, bar)
                    pending = None
                    self.save(plan, progress, state)
            if pending:
                self.read(plan, progress, pending, lrs, bar)
        return state

    def read(self, plan: Plan, progress: Progress, pending: tuple[int, Any], lrs: list, bar: Any) -> None:
        """Metrics of steps already dispatched: the log, the bar, and the end of a run whose loss is not a number."""
        at, sums = pending[0], jax.device_get(pending[1])
        losses = (sums["loss"] / sums["n"]).astype(float)
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            raise RunError(
                f"phase '{plan.name}': the loss is {losses[bad[0]]} at step {at + bad[0] + 1} (steps {at + 1} to "
                f"{at + len(losses)} were run together). Try a lower phases.{plan.name}.lr (now "
                f"{plan.phase.lr}), or precision: float32."
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
        self, plan: Plan, progress: Progress, state: Any, logits: np.ndarray, seconds: float, rate: float
    ) -> None:
        """Validation numbers into table, log and checkpoint."""
        found = metrics.summary(logits, self.setup.index.splits["valid"].labels)
        if not math.isfinite(found["log_loss"]):
            raise RunError(
                f"phase '{plan.name}': the validation loss after epoch {progress.epoch} is not a number. Try a lower "
                f"phases.{plan.name}.lr (now {plan.phase.lr})."
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
        self.say(metrics.table_row(row))
        self.log.write([row])
        progress.epoch, progress.epoch_step = progress.epoch + 1, 0
        judged = {"errors": float(found["errors"]), "loss": found["log_loss"]}
        done = progress.epoch - plan.first_epoch
        if done % self.setup.config.checkpoint.every_epochs == 0 or done == plan.phase.epochs:
            with self.clock(plan, "checkpoint"):
                self.save(plan, progress, state, judged)

    def save(self, plan: Plan, progress: Progress, state: Any, judged: dict[str, float] | None = None) -> None:
        """Starts a checkpoint; RunError instead of one whose weights are not numbers."""
        leaves = jax.tree.leaves((state.params, state.batch_stats))
        if not all(np.isfinite(x).all() for x in jax.device_get(leaves)):
            raise RunError(
                f"phase '{plan.name}': the weights are no longer numbers at step {progress.step}. Try a lower "
                f"phases.{plan.name}.lr (now {plan.phase.lr})."
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
