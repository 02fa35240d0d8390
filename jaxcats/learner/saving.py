"""What a Learner keeps: a fit's rows and best state in memory, its own state in a folder."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcats.common.cli import from_file
from jaxcats.common.config import Phase, flat, to_yaml
from jaxcats.common.errors import UserError, unwritable
from jaxcats.common.io import write_json, write_text
from jaxcats.core.state import TrainState, copy
from jaxcats.train import experiment
from jaxcats.train.checkpoint import Checkpoints
from jaxcats.train.epoch_table import best_epoch
from jaxcats.train.loop import Progress


class Keeper:
    """A fit's log and checkpoints, in memory: rows of metrics, and with `best` the best state.

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


MARK = "learner.json"  # only `save_state` writes it: a folder without it is never replaced


def save_state(
    folder: Path,
    setup: experiment.Experiment,
    state: TrainState | None,
    progress: Progress,
    weights: tuple[Any, Any],
    notes: Mapping[str, Any],
) -> Path:
    """A Learner's state as a run folder, complete or absent; one that this function wrote there before is replaced.

    Raises:
        UserError: something else is there, or it can't be written.
    """
    name = list(setup.config.phases)[-1]
    if state is None:
        plan = experiment.PhasePlan(0, name, setup.config.phases[name], 0, 0, 1)
        state = experiment.make_phase(setup, plan)[1](*weights)
    if folder.exists() and not (folder / MARK).is_file():
        raise UserError(f"{folder}: is there already, and not from learn.save; choose another name.")
    meta = {
        "step": progress.step,
        "epoch": progress.epoch,
        "phase": name,
        "progress": vars(progress).copy(),
        "classes": list(setup.index.classes),
        "config": flat(setup.config),
        "dtype": setup.model.dtype,
        "fingerprint": experiment.fingerprint(setup.index),
        "kept_best": notes["kept_best"],
        **({"own": notes["own"]} if notes["own"] else {}),
    }
    fresh, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        fresh.mkdir(parents=True)
        checkpoints = Checkpoints(fresh / "checkpoints")
        checkpoints.save(state, meta)
        checkpoints.close()
        write_text(fresh / "config.yaml", to_yaml(setup.config))
        write_json(fresh / MARK, dict(notes))
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except OSError as e:
        raise unwritable(f"{folder}:", e) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def load_state(
    folder: Path, setup: experiment.Experiment
) -> tuple[TrainState, Progress, dict[str, Phase], dict[str, Any]]:
    """What `save_state` wrote, or the last state of a finished run: state, progress, phases, notes.

    Raises:
        UserError: not there, damaged, not finished, or of another network or other classes.
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
            f"{folder}: has the classes {', '.join(meta['classes'])}; the images have {', '.join(setup.index.classes)}."
        )
    marked = (folder / MARK).is_file()
    if not marked and meta["progress"]["epoch"] != sum(p.epochs for p in config.phases.values()):
        raise UserError(f"{folder}: is a run that isn't finished; finish it with `train --resume --workdir {folder}`.")
    plan = experiment.PhasePlan(0, meta["phase"], config.phases[meta["phase"]], 0, 0, 1)
    state = checkpoints.restore(step, experiment.abstract_state(setup.model, plan))
    checkpoints.close()
    notes = json.loads((folder / MARK).read_text(encoding="utf-8")) if marked else {"history": [], "kept_best": False}
    return state, Progress(**meta["progress"]), dict(config.phases), notes | {"own": meta.get("own", {})}
