"""Training with several processes: how a process joins the others, and what only the primary process does.

jax.distributed does the work: it finds the other processes, checks that they are alive, and ends all when one dies.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar, cast

import numpy as np

from jaxcats.common.config import DistributedConfig
from jaxcats.common.errors import UserError, first_line

T = TypeVar("T")
HEARTBEAT = 30  # seconds without a sign of life before a process counts as dead

# Variables in which clusters that JAX can read by itself give the number of processes.
_PROCESS_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")

_has_joined = False


def is_requested(settings: DistributedConfig) -> bool:
    """Whether the configuration or the environment names several processes.

    Raises:
        UserError: the settings are incomplete or contradict each other.
    """
    given = (settings.coordinator, settings.num_processes, settings.process_id)
    if given == (None, None, None):
        env, indexed_job = os.environ, {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"}
        if "," in env.get("TPU_WORKER_HOSTNAMES", "") or env.keys() >= indexed_job:
            return True
        return any(env.get(name, "1") not in ("", "0", "1") for name in _PROCESS_COUNTS)
    if settings.coordinator is None or settings.num_processes is None or settings.process_id is None:
        raise UserError("distributed: coordinator, num_processes and process_id belong together; give all or none.")
    if settings.process_id >= settings.num_processes:
        raise UserError(f"distributed.process_id: {settings.process_id} can't be used; it must be below num_processes.")
    return True


def start(settings: DistributedConfig) -> None:
    """Joins the other processes if the configuration or the environment names any; call it before JAX is first used.

    Raises:
        UserError: the settings are incomplete, or the other processes can't be reached.
    """
    global _has_joined
    if not is_requested(settings):
        return
    import jax

    given = (settings.coordinator, settings.num_processes, settings.process_id)
    try:
        # A process that ends with an error waits for the others no longer than they wait for a dead one.
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        address = settings.coordinator or "the coordinator that the environment names"
        raise UserError(f"distributed: can't join the other processes at {address} ({first_line(error)}).") from None
    _has_joined = True


def has_joined() -> bool:
    """Whether this process has joined others; unlike `is_multiprocess` it uses no backend, which may wait for them."""
    return _has_joined


def is_primary() -> bool:
    """Whether this process is the one that writes and prints."""
    import jax

    return jax.process_index() == 0


def is_multiprocess() -> bool:
    """Whether this is one of several processes."""
    import jax

    return jax.process_count() > 1


def all_or_none(work: Callable[[], T]) -> T:
    """Does `work` in every process and returns its result; if it fails in one of them, all stop."""
    if not is_multiprocess():
        return work()
    result = error = None
    try:
        result = work()
    except Exception as caught:  # raised below, once the other processes know
        error = caught
    failed = np.flatnonzero(_gather(np.array([error is not None])))
    if error is not None:
        raise error
    if len(failed):
        raise UserError(f"Process {failed[0]} has stopped; its own output gives the reason.")
    return cast(T, result)


def on_primary(work: Callable[[], T]) -> T | None:
    """Does `work` in the primary process; the others wait, return None, and stop if it fails."""
    return all_or_none(lambda: work() if is_primary() else None)


def primary_first(work: Callable[[], T]) -> T:
    """Does `work` in the primary process and then in the others, which find the caches that it has filled."""
    result = on_primary(work)
    return all_or_none(lambda: cast(T, result) if is_primary() else work())


def require_equal(subject: str, value: str) -> None:
    """Raises UserError in every process unless all have the same `value`; with different ones they would wait forever."""
    if not is_multiprocess():
        return
    hashes = _gather(np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8))
    others = np.flatnonzero((hashes != hashes[0]).any(1))
    if len(others):
        raise UserError(f"{subject} of process {others[0]} differ from those of process 0; all must have the same.")


def any_process(flags: np.ndarray) -> np.ndarray:
    """Flags, bool [N] -> bool [N]: which of them are set in at least one process."""
    return np.logical_or.reduce(_gather(flags), axis=0) if is_multiprocess() else flags


def _gather(values: np.ndarray) -> np.ndarray:
    """The arrays of all processes: [...] -> [processes, ...]."""
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(values))


def exit_now(message: str, code: int) -> NoReturn:
    """Ends only this process, at once; the others notice within HEARTBEAT seconds.

    A normal exit would wait for the others that long and then abort, because they do not know of the exit.
    """
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def silence_stdout() -> None:
    """Discards what every process but the primary one prints; errors still appear."""
    if not is_primary():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for the rest of the process
