"""What a Learner keeps: a fit's rows and best state in memory, its own state in a folder."""

import shutil
from pathlib import Path
from typing import Any

from jaxcats import job
from jaxcats.cli import from_file
from jaxcats.config import Phase, flat, to_yaml
from jaxcats.core.state import TrainState, copy
from jaxcats.errors import UserError
from jaxcats.fit import Progress
from jaxcats.results.table import best_epoch
from jaxcats.storage.atomic import write_text
from jaxcats.storage.checkpoint import Checkpoints


class Keeper:
    """A fit's log and checkpoints, in memory: rows of metrics, and the last or the best state.

    Attributes:
        rows: of steps and epochs.
        state: the best TrainState so far, with `best`.
        row: the epoch it is of.
    """

    def __init__(self, *, best: bool):
        self.best, self.row, self.rows = best, dict[str, Any](), list[dict[str, Any]]()
        self.state: Any = None

    @property
    def epochs(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "valid_loss" in row]

    def write(self, rows: list[dict[str, Any]]) -> None:
        """As a RunLog."""
        self.rows += rows

    def save(self, state: TrainState, meta: Any, *, metrics: Any = None) -> None:
        """As Checkpoints."""
        epochs = self.epochs
        if self.best and metrics and best_epoch(epochs) == len(epochs) - 1:
            self.state, self.row = copy(state), epochs[-1]


def save_state(
    folder: Path, setup: job.Setup, state: TrainState | None, progress: Progress, weights: tuple[Any, Any]
) -> Path:
    """A Learner's state as a run folder, complete or absent; an older one of its own there is replaced.

    Raises:
        UserError: the folder is there and is no run, or can't be written.
    """
    name = list(setup.config.phases)[-1]
    phase = setup.config.phases[name]
    if state is None:
        plan = job.Plan(0, name, phase, 0, 0, 1)
        state = job.make_phase(setup, plan)[1](*weights)
    if folder.exists() and not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: is there already, and is no run folder; choose another name.")
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        checkpoints = Checkpoints(fresh / "checkpoints")
        meta = {
            "step": progress.step,
            "epoch": progress.epoch,
            "phase": name,
            "progress": vars(progress).copy(),
            "classes": list(setup.index.classes),
            "config": flat(setup.config),
            "dtype": setup.model.dtype,
            "fingerprint": job.fingerprint(setup.index),
        }
        checkpoints.save(state, meta)
        checkpoints.close()
        write_text(fresh / "config.yaml", to_yaml(setup.config))
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    except OSError as e:
        raise UserError(f"{folder}: can't be written ({e.strerror}).") from None
    return folder


def load_state(folder: Path, setup: job.Setup) -> tuple[TrainState, Progress, dict[str, Phase]]:
    """What `save_state` wrote.

    Raises:
        UserError: not there, damaged, or of another network or other classes.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: holds nothing that learn.save wrote.")
    config = from_file(folder / "config.yaml")
    ours = setup.config.model
    if (config.model.backbone, config.model.head) != (ours.backbone, ours.head):
        raise UserError(
            f"{folder}: is a {config.model.backbone} with the {config.model.head} head; this Learner is a {ours.backbone} "
            f"with the {ours.head} head."
        )
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    step = checkpoints.pick("last")
    meta = checkpoints.meta(step)
    if tuple(meta["classes"]) != setup.index.classes:
        raise UserError(
            f"{folder}: has the classes {', '.join(meta['classes'])}; the pictures have {', '.join(setup.index.classes)}."
        )
    plan = job.Plan(0, meta["phase"], config.phases[meta["phase"]], 0, 0, 1)
    state = checkpoints.restore(step, job.abstract_state(setup.model, plan))
    checkpoints.close()
    return state, Progress(**meta["progress"]), dict(config.phases)
