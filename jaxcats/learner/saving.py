"""What a Learner keeps: the rows and the best state of a fit in memory, and its own state in a folder."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxcats.common.cli import from_file
from jaxcats.common.config import Phase, to_yaml
from jaxcats.common.errors import UserError, unwritable
from jaxcats.common.io import write_json, write_text
from jaxcats.core.state import TrainState, copy
from jaxcats.train.checkpoint import Checkpoints
from jaxcats.train.epoch_table import best_epoch
from jaxcats.train.experiment import Experiment, PhasePlan, abstract_state, fingerprint
from jaxcats.train.loop import Progress, checkpoint_facts

MARK = "learner.json"  # Only `save_state` writes it; a folder without it is never replaced.


@dataclass
class FitMemory:
    """The log and the checkpoints of a fit, in memory.

    Attributes:
        keep_best: whether to keep the state of the best epoch.
        rows: of steps and epochs.
        state: with `keep_best`, the best TrainState so far.
        best_row: the row of its epoch.
    """

    keep_best: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    state: Any = None
    best_row: dict[str, Any] = field(default_factory=dict)

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The rows of epochs."""
        return [row for row in self.rows if "valid_loss" in row]

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Stores rows, as RunLog.write does."""
        self.rows += rows

    def save(self, state: TrainState, meta: Any, *, metrics: Any = None) -> None:
        """Does what Checkpoints.save does, in memory: keeps the state if its epoch is the best so far."""
        epochs = self.epochs
        if self.keep_best and metrics and best_epoch(epochs) == len(epochs) - 1:
            self.state, self.best_row = copy(state), epochs[-1]


def save_state(
    folder: Path, experiment: Experiment, state: TrainState, progress: Progress, notes: dict[str, Any]
) -> Path:
    """Writes the state of a Learner as a run folder, complete or absent; replaces one that this function wrote before.

    Args:
        folder: to write.
        experiment: with the phases trained so far in its configuration.
        state: of the Learner.
        progress: of the last fit.
        notes: "history", "kept_best" and "own" (names of user functions).

    Raises:
        UserError: the folder holds something else, or can't be written.
    """
    phase = list(experiment.config.phases)[-1]
    if folder.exists() and not (folder / MARK).is_file():
        raise UserError(f"{folder}: exists already, and learn.save did not write it; choose another name.")
    meta = checkpoint_facts(experiment, progress, phase)
    meta |= {"fingerprint": fingerprint(experiment.index), "kept_best": notes["kept_best"]}
    if notes["own"]:
        meta["own"] = notes["own"]
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        checkpoints = Checkpoints(new / "checkpoints")
        checkpoints.save(state, meta)
        checkpoints.close()
        write_text(new / "config.yaml", to_yaml(experiment.config))
        write_json(new / MARK, notes)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError as e:
        raise unwritable(f"{folder}:", e) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def load_state(folder: Path, experiment: Experiment) -> tuple[TrainState, Progress, dict[str, Phase], dict[str, Any]]:
    """What `save_state` wrote, or the last state of a finished run: state, progress, phases, notes.

    Raises:
        UserError: the folder does not exist, is damaged or not finished, or holds another network or other classes.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: holds nothing that learn.save wrote.")
    config = from_file(folder / "config.yaml")
    saved, ours = config.model, experiment.config.model
    if (saved.backbone, saved.head) != (ours.backbone, ours.head):
        theirs, network = (f"{m.backbone} with the {m.head} head" for m in (saved, ours))
        raise UserError(f"{folder}: holds a {theirs}; this Learner has a {network}.")
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    step = checkpoints.pick("last")
    meta = checkpoints.meta(step)
    if tuple(meta["classes"]) != experiment.index.classes:
        theirs, classes = ", ".join(meta["classes"]), ", ".join(experiment.index.classes)
        raise UserError(f"{folder}: has the classes {theirs}; the images have {classes}.")
    notes = {"history": [], "kept_best": False}
    if (folder / MARK).is_file():
        notes = json.loads((folder / MARK).read_text(encoding="utf-8"))
    elif meta["progress"]["epoch"] != sum(p.epochs for p in config.phases.values()):
        raise UserError(f"{folder}: is a run that isn't finished; finish it with `train --resume --workdir {folder}`.")
    plan = PhasePlan(0, meta["phase"], config.phases[meta["phase"]])
    state = checkpoints.restore(step, abstract_state(experiment.model, plan))
    checkpoints.close()
    return state, Progress(**meta["progress"]), dict(config.phases), notes | {"own": meta.get("own", {})}
