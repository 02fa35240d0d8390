"""Checkpoints through Orbax: the latest and the best state, saved in the background, complete or absent.

Only this module imports Orbax.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxcats.common.distributed import on_primary
from jaxcats.common.errors import MAKE_ROOM, RunError, UserError, first_line, is_full, unwritable
from jaxcats.common.io import REPLACED_CHECKPOINT
from jaxcats.core import mesh
from jaxcats.core.state import copy, tree_hash

# Orbax logs every save at INFO and WARNING, and at ERROR what it raises as well.
logging.getLogger("absl").setLevel(logging.CRITICAL)


def selection_metric(metrics: Mapping[str, float]) -> float:
    """What `best` minimises: validation errors, then the loss (mapped to less than one error)."""
    loss = metrics["loss"]
    return metrics["errors"] + (loss / (1 + loss) if loss < float("inf") else 1.0)


class Checkpoints:
    """The checkpoints of one run, numbered by the global step: the latest, and the best of those with metrics.

    Args:
        folder: where they are.
        read_only: for a reader beside a training; otherwise checkpoints that a killed process was removing are removed.

    Raises:
        UserError: the folder can't be opened or written, or a checkpoint is damaged.
    """

    def __init__(self, folder: str | Path, *, read_only: bool = False):
        best = policies.BestN(get_metric_fn=lambda m: -selection_metric(m), n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
            best_fn=lambda m: -selection_metric(m),
            best_mode="max",
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
        )
        self.folder = Path(folder).absolute()
        _silence_abandoned_operations()
        try:
            if not read_only:
                on_primary(self._restore_moved)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as e:
            raise unwritable(f"{self.folder}:", e) from None
        except (ValueError, RecursionError) as e:  # a damaged JSON file in one of the checkpoints
            raise UserError(f"{self.folder}: can't be opened ({_reason(e)}). Remove the damaged checkpoint.") from e
        self._best: dict[str, Any] | None = None  # {"step", "badness"} of the best so far
        if not read_only and self.steps():
            self._continue()

    def save(self, state: Any, meta: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving a TrainState with JSON facts; returns once the arrays are copied, so the state may be donated.

        Args:
            state: TrainState.
            meta: facts, with "step".
            metrics: {"errors", "loss"} of the validation images, where it was evaluated.
        """
        state, step = copy(state), int(meta["step"])
        if metrics:
            badness = selection_metric(metrics)
            if self._best is None or badness <= self._best["badness"]:  # the later of two equals
                self._best = {"step": step, "badness": badness}
        facts = {"meta": dict(meta), "metrics": metrics, "best": self._best, "arrays": tree_hash(state)}
        sealed = ocp.args.JsonSave({"facts": facts, "sha256": _json_hash(facts)})
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=sealed)
        with self._saving():
            if step not in self._manager.all_steps():
                self._manager.save(step, args=args, metrics=metrics, force=True)
                return
            # The evaluation after this step was interrupted, and a resumed run has done it.
            self._manager.wait_until_finished()
            if metrics is not None:
                self._replace(step, args=args, metrics=metrics, force=True)

    def _replace(self, step: int, **options: Any) -> None:
        """Saves a step again. Orbax never overwrites a checkpoint, so the old one is moved aside until the new one is complete."""
        on_primary(lambda: os.rename(self.folder / str(step), self.folder / f".{step}.replaced"))
        self._manager.reload()
        try:
            self._manager.save(step, **options)
            self._manager.wait_until_finished()
        finally:
            on_primary(self._restore_moved)
            self._manager.reload()

    def _restore_moved(self) -> None:
        """If a save failed or was killed, moves the old checkpoint back; if it succeeded, deletes the old one."""
        for moved in self.folder.glob(".*.replaced"):
            if name := REPLACED_CHECKPOINT.fullmatch(moved.name):
                place = self.folder / name[1]
                if place.exists():
                    shutil.rmtree(moved)
                else:
                    os.rename(moved, place)

    def _continue(self) -> None:
        """Continues from the checkpoints that are there: finds the best, and removes what a killed process was removing.

        UserError where the metrics by which Orbax chooses the best are not those that were saved.
        """
        steps = self.steps()
        self._best = self._best_so_far(steps)
        keep = {steps[-1]} | ({self._best["step"]} if self._best else set())
        if superfluous := [p for p in self.folder.iterdir() if p.name.isdigit() and int(p.name) not in keep]:
            on_primary(lambda: [shutil.rmtree(path) for path in superfluous])
            self._manager.reload()
        for step in keep:
            if _json_hash(self._manager.metrics(step)) != _json_hash(self._facts(step)["metrics"]):
                raise self._unusable(step, "its metrics are not those that were saved")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def pick(self, which: str) -> int:
        """The step that "last", "best" or a number names; UserError when there is none."""
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder}: holds no complete checkpoint; train first, or name another run.")
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self._best_so_far(steps)
            return best["step"] if best else steps[-1]
        if which not in map(str, steps):
            raise UserError(f"--checkpoint {which}: choose last, best or one of {', '.join(map(str, steps))}.")
        return int(which)

    def _best_so_far(self, steps: list[int]) -> dict[str, Any] | None:
        facts = self._facts(steps[-1])
        best, metrics = facts["best"], facts["metrics"]
        if best and best["step"] not in steps:  # Somebody has removed it.
            return {"step": steps[-1], "badness": selection_metric(metrics)} if metrics else None
        return best

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON facts saved at `step`, verified by their hash."""
        return self._facts(step)["meta"]

    def identity(self, step: int) -> str:
        """The hash of the state saved at `step`, which no other training has."""
        return self._facts(step)["arrays"]

    def _facts(self, step: int) -> dict[str, Any]:
        """{"meta", "metrics", "best": {"step", "badness"} so far, "arrays": hash of the state}, as they were saved."""
        sealed = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        if not isinstance(sealed, dict) or _json_hash(sealed.get("facts")) != sealed.get("sha256"):
            raise self._unusable(step, "its facts are not those that were saved")
        return sealed["facts"]

    def restore(self, step: int, target: Any) -> Any:
        """The state saved at `step`, verified by its hash.

        Args:
            step: of the checkpoint.
            target: tree of arrays or ShapeDtypeStructs with the structure and shapes of the state.

        Returns:
            The state on the first device, or replicated on all where there are several.
        """
        # Without a placement Orbax would ask for the devices that saved it.
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        sharding = mesh.replicated() if mesh.has_many_devices() else first
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), target)
        state = self._read(step, state=ocp.args.StandardRestore(abstract))["state"]
        if tree_hash(state) != self._facts(step)["arrays"]:
            raise self._unusable(step, "its arrays are not those that were saved")
        return state

    def _read(self, step: int, **args: Any) -> Any:
        place = self.folder / str(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as e:  # Orbax and tensorstore raise many kinds for a damaged file.
            if "tructure" in str(e) and "ismatch" in str(e):
                raise UserError(
                    f"{place}: holds another network than config.yaml (backbone, head, optimizer); restore config.yaml."
                ) from e
            if not place.exists():
                raise UserError(
                    f"{place}: a running training has removed this checkpoint; run the command again."
                ) from e
            raise self._unusable(step, _reason(e)) from e

    def _unusable(self, step: int, reason: str) -> UserError:
        place = self.folder / str(step)
        return UserError(
            f"{place}: this checkpoint can't be used ({reason}). If it is damaged, remove that folder to use an older one."
        )

    def wait(self) -> None:
        """Waits until every save is complete; RunError where one failed, which leaves only the checkpoint before it."""
        with self._saving():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # Orbax and tensorstore raise many kinds of their own.
            reason = os.strerror(errno.ENOSPC) if is_full(e) else _reason(e)
            raise RunError(f"{self.folder}: a checkpoint can't be saved ({reason}). {MAKE_ROOM}") from None

    def close(self) -> None:
        """Waits until every save is complete, and ends."""
        try:
            self.wait()
        finally:
            self._manager.close()


@functools.cache
def _silence_abandoned_operations() -> None:
    """Silences complaints of tensorstore: when one of several operations fails, each that it abandons complains on stderr."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook
    libraries = ("orbax", "tensorstore")
    logging.getLogger("asyncio").addFilter(lambda record: not any(name in record.getMessage() for name in libraries))


def _reason(error: Exception) -> str:
    return first_line(error).partition("See full")[0].strip()


def _json_hash(tree: Any) -> str:
    """SHA-256 of a tree as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(tree)), sort_keys=True).encode()).hexdigest()
