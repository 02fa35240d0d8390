"""Checkpoints through Orbax: the latest and the best state, saved in the background, complete or absent.

Only this module knows Orbax.
"""

import contextlib
import errno
import functools
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxcats.core import mesh
from jaxcats.core.state import copy, tree_hash
from jaxcats.errors import MAKE_ROOM, RunError, UserError, is_full, unwritable

# Orbax narrates every save at INFO and WARNING, and prints at ERROR what it raises as well.
logging.getLogger("absl").setLevel(logging.CRITICAL)


def badness(metrics: Mapping[str, float]) -> float:
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
            policies.BestN(get_metric_fn=lambda m: -badness(m), n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=lambda m: -badness(m),
            best_mode="max",
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
        )
        self.folder = Path(folder).absolute()
        _hush_abandoned()
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as e:
            raise unwritable(f"{self.folder}:", e) from None
        except ValueError as e:  # a damaged JSON file in one of the checkpoints
            raise UserError(
                f"{self.folder}: can't be opened ({_reason(e)}). Remove the damaged checkpoint, or train again."
            ) from e

    def save(self, state: Any, meta: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving a TrainState and JSON-able facts; returns when the arrays are copied, so the state may be donated."""
        saved = copy(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(saved), meta=ocp.args.JsonSave(dict(meta) | {"arrays": tree_hash(saved)})
        )
        with self._saving():
            self._manager.save(int(meta["step"]), args=args, metrics=dict(metrics) if metrics else None, force=True)

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
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if which not in map(str, steps):
            raise UserError(
                f"--checkpoint {which}: not there; choose last, best or one of {', '.join(map(str, steps))}."
            )
        return int(which)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON facts saved at `step`."""
        return {k: v for k, v in self._meta(step).items() if k != "arrays"}

    def _meta(self, step: int) -> dict[str, Any]:
        return self._restore(step, meta=ocp.args.JsonRestore())["meta"]

    def restore(self, step: int, target: Any) -> Any:
        """The state saved at `step`, with the structure and shapes of `target`, on the first device, or whole on each of several; verified by its hash."""
        # Without a placement Orbax wants the devices that saved it.
        here = mesh.replicated() if mesh.several() else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), target)
        state = self._restore(step, state=ocp.args.StandardRestore(abstract))["state"]
        if tree_hash(state) != self._meta(step)["arrays"]:
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
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].partition("See full")[0].strip()[:200]
