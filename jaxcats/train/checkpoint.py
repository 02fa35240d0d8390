"""Checkpoints through Orbax: the latest and the best state, saved in the background, complete or absent.

Only this module knows Orbax.
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

# Orbax narrates every save at INFO and WARNING, and prints at ERROR what it raises as well.
logging.getLogger("absl").setLevel(logging.CRITICAL)

MAY_BE_WHOLE = ("PERMISSION_DENIED", os.strerror(errno.EACCES), os.strerror(errno.EPERM), os.strerror(errno.EIO))


def selection_metric(metrics: Mapping[str, float]) -> float:
    """What `best` minimises: validation errors, ties broken by the lower loss (a loss of any size counts for less than one error)."""
    loss = metrics["loss"]
    return metrics["errors"] + (loss / (1 + loss) if loss < float("inf") else 1.0)


class Checkpoints:
    """The checkpoints of one run, numbered by the global step.

    Keeps the latest, and the best of those that have metrics.
    """

    def __init__(self, folder: str | Path, *, read_only: bool = False):
        keep = [
            policies.LatestN(1),
            policies.BestN(get_metric_fn=lambda m: -selection_metric(m), n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=lambda m: -selection_metric(m),
            best_mode="max",
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
        )
        self.folder = Path(folder).absolute()
        _hush_abandoned()
        try:
            if not read_only:
                on_primary(self._bring_back)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as e:
            raise unwritable(f"{self.folder}:", e) from None
        except (ValueError, RecursionError) as e:  # a damaged JSON file in one of the checkpoints
            raise UserError(
                f"{self.folder}: can't be opened ({_reason(e)}). Remove the damaged checkpoint, or train again."
            ) from e
        self._best: dict[str, Any] | None = None  # {"step", "badness"} of the best so far
        if not read_only and self.steps():  # a reader may be beside a run that removes some meanwhile
            self._take_up()

    def save(self, state: Any, meta: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving a TrainState and JSON-able facts; returns when the arrays are copied, so the state may be donated."""
        saved = copy(state)
        judged = dict(metrics) if metrics else None
        if judged and (
            self._best is None or selection_metric(judged) <= self._best["badness"]
        ):  # of equals the later, as Orbax
            self._best = {"step": int(meta["step"]), "badness": selection_metric(judged)}
        facts = {"meta": dict(meta), "metrics": judged, "best": self._best, "arrays": tree_hash(saved)}
        sealed = ocp.args.JsonSave({"facts": facts, "sha256": _json_hash(facts)})
        args = ocp.args.Composite(state=ocp.args.StandardSave(saved), meta=sealed)
        step = int(meta["step"])
        with self._saving():
            if step in self._manager.all_steps():  # the evaluation after it was broken off, and has come again
                self._manager.wait_until_finished()
                if judged is None:
                    return
                self._replace(step, args=args, metrics=judged, force=True)
            else:
                self._manager.save(step, args=args, metrics=judged, force=True)

    def _replace(self, step: int, **saving: Any) -> None:
        """Orbax replaces none. The one that is there steps aside until the new one is whole; killed meanwhile, it comes back."""
        on_primary(lambda: os.rename(self.folder / str(step), self.folder / f".{step}.replaced"))
        self._manager.reload()
        try:
            self._manager.save(step, **saving)
            self._manager.wait_until_finished()
        finally:
            on_primary(self._bring_back)
            self._manager.reload()

    def _bring_back(self) -> None:
        """What stepped aside takes its place again, or goes where another has taken it."""
        for aside in self.folder.glob(".*.replaced"):
            if (name := REPLACED_CHECKPOINT.fullmatch(aside.name)) is None:
                continue
            if (self.folder / name[1]).exists():
                shutil.rmtree(aside)
            else:
                os.rename(aside, self.folder / name[1])

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
            raise UserError(
                f"--checkpoint {which}: not there; choose last, best or one of {', '.join(map(str, steps))}."
            )
        return int(which)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON facts saved at `step`; verified by their hash."""
        return self._facts(step)["meta"]

    def identity(self, step: int) -> str:
        """The hash of the state saved at `step`, which no other training has."""
        return self._facts(step)["arrays"]

    def _facts(self, step: int) -> dict[str, Any]:
        """{"meta", "metrics", "best": {"step", "badness"} so far, "arrays": hash of the state}, as they were saved."""
        found = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
        if not isinstance(found, dict) or _json_hash(found.get("facts")) != found.get("sha256"):
            raise self._damaged(step, "its facts are not those that were saved")
        return found["facts"]

    def _best_so_far(self, steps: list[int]) -> dict[str, Any] | None:
        facts = self._facts(steps[-1])
        best = facts["best"]
        if best and best["step"] not in steps:  # somebody removed it
            best = {"step": steps[-1], "badness": selection_metric(facts["metrics"])} if facts["metrics"] else None
        return best

    def _take_up(self) -> None:
        """Goes on with what is there: the latest and the best. What a killed process was removing is removed.

        UserError where the numbers by which Orbax chooses the best, and removes others, are not those saved.
        """
        steps = self.steps()
        self._best = self._best_so_far(steps)
        keep = {steps[-1]} | ({self._best["step"]} if self._best else set())
        left = [p for p in self.folder.iterdir() if p.name.isdigit() and int(p.name) not in keep]
        if left:
            on_primary(lambda: [shutil.rmtree(path) for path in left])
            self._manager.reload()
        for step in keep:
            if _json_hash(self._manager.metrics(step)) != _json_hash(self._facts(step)["metrics"]):
                raise self._damaged(step, "its metrics are not those that were saved")

    def restore(self, step: int, target: Any) -> Any:
        """The state saved at `step`, with the structure and shapes of `target`, on the first device, or whole on each of several; verified by its hash."""
        # Without a placement Orbax wants the devices that saved it.
        here = (
            mesh.replicated() if mesh.has_many_devices() else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), target)
        state = self._restore(step, state=ocp.args.StandardRestore(abstract))["state"]
        if tree_hash(state) != self._facts(step)["arrays"]:
            raise self._damaged(step, "its arrays are not those that were saved")
        return state

    def _restore(self, step: int, **args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as e:  # Orbax and tensorstore raise many kinds for a damaged file
            if "tructure" in str(e) and "ismatch" in str(e):
                raise UserError(
                    f"{self.folder / str(step)}: saved from another network than config.yaml beside it says (backbone, head, "
                    f"optimizer). Restore that config.yaml."
                ) from e
            if not (self.folder / str(step)).exists():
                raise UserError(
                    f"{self.folder / str(step)}: this checkpoint has been removed meanwhile, by a training that goes on; give "
                    f"the command again."
                ) from e
            if isinstance(e, MemoryError) or any(words in str(e) for words in MAY_BE_WHOLE):
                raise UserError(f"{self.folder / str(step)}: this checkpoint can't be read ({_reason(e)}).") from e
            raise self._damaged(step, _reason(e)) from e

    def _damaged(self, step: int, reason: str) -> UserError:
        return UserError(
            f"{self.folder / str(step)}: this checkpoint can't be used ({reason}). Remove that folder to use an older one, "
            f"or train again."
        )

    def wait(self) -> None:
        """Waits for saves under way; RunError where one failed, of which nothing is left but the one before it."""
        with self._saving():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # Orbax and tensorstore have many kinds of their own
            reason = os.strerror(errno.ENOSPC) if is_full(e) else _reason(e)
            raise RunError(
                f"{self.folder}: a checkpoint can't be saved ({reason}); the one before it, if any, is whole. {MAKE_ROOM}"
            ) from None

    def close(self) -> None:
        """Waits for saves under way and ends."""
        try:
            self.wait()
        finally:
            self._manager.close()


@functools.cache
def _hush_abandoned() -> None:
    """Once: when one of several reads or writes fails, tensorstore leaves the others, each of which complains on stderr."""
    before = sys.unraisablehook

    def hook(said: Any) -> None:
        if "Event loop is closed" not in str(said.exc_value):
            before(said)

    sys.unraisablehook = hook
    theirs = ("orbax", "tensorstore")
    logging.getLogger("asyncio").addFilter(lambda record: not any(name in record.getMessage() for name in theirs))


def _reason(error: Exception) -> str:
    return first_line(error).partition("See full")[0].strip()


def _json_hash(tree: Any) -> str:
    """SHA-256 of what a tree is once it has been through JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(tree)), sort_keys=True).encode()).hexdigest()
