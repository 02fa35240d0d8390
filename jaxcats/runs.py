"""Training in a run folder: every phase in turn, from the latest checkpoint where there is one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.core import mesh
from jaxcats.distributed import by_first, first
from jaxcats.errors import UserError
from jaxcats.find_lr import write_lr_find
from jaxcats.fit import Fitter, Progress
from jaxcats.inputs import precompute
from jaxcats.job import Plan, Setup, abstract_state, check_config, fingerprint, plans
from jaxcats.own import check_same
from jaxcats.stopping import Stopping
from jaxcats.storage.checkpoint import Checkpoints
from jaxcats.storage.log import NoLog, RunLog


@dataclass(frozen=True)
class Fitted:
    """What training leaves.

    Attributes:
        params: of the checkpoint that the configuration wants judged.
        batch_stats: likewise.
        step: its step.
        identity: its hash; see Checkpoints.
        valid_features: of the validation pictures, where they were computed with this very backbone; else None.
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


def resume_point(setup: Setup, checkpoints: Checkpoints) -> tuple[Progress, Any] | None:
    """(Progress, TrainState) of the latest checkpoint, or None; UserError when the pictures have changed since."""
    steps = checkpoints.steps()
    if not steps:
        return None
    meta = checkpoints.meta(steps[-1])
    check_config(setup.config, meta)
    check_same(setup.own.names(setup.config), meta.get("own", {}))
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


class Trainer(Fitter):
    """Runs the phases of one run folder."""

    def __init__(
        self,
        setup: Setup,
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

    def run(self, initial: Callable[[], tuple[Any, Any]], accepted: Callable[[], None] = lambda: None) -> Fitted:
        """All phases, from the latest checkpoint where there is one, else from `initial()` = (params, batch_stats).

        `accepted` is called, by the first process, once it is clear that the run in the folder can be gone on with.
        """
        point = resume_point(self.setup, self.checkpoints)
        by_first(accepted)
        progress, state = point or (Progress(), None)
        resume_step = progress.step if point else None
        # What was saved within an epoch, or before the evaluation at its end, has that to come.
        evaluated = progress.epoch_step == 0
        self.log = RunLog(self.workdir, resume_step=resume_step, evaluated=evaluated) if first() else NoLog()
        last = plans(self.setup)[-1]
        finished = progress.epoch == last.first_epoch + last.phase.epochs
        if point:
            where = f"step {progress.step:,} (epoch {progress.epoch})"
            self.say(f"Finished already, at {where}; evaluating again." if finished else f"Resuming at {where}.")
        params, stats = (state.params, state.batch_stats) if state else mesh.everywhere(initial())
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
        return Fitted(params, stats, step, self.checkpoints.identity(step), valid, self.seconds, counts)

    def found_lr(self, plan: Plan, result: Any) -> None:
        """Keeps lr_find's result in the run folder."""
        if first():
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
