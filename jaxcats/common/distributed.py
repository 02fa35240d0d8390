"""Several processes that train together: starting them, and who writes.

JAX does the work (jax.distributed): it finds the other processes, checks that they are alive, and ends all when one dies.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import numpy as np

from jaxcats.common.errors import UserError

T = TypeVar("T")
HEARTBEAT = 30  # seconds without a sign of life before a process counts as dead

# What clusters that JAX can read say about a job of several processes: the variable that holds their number.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")

_joined = False


def _found_by_jax() -> bool:
    """Whether the environment is one of several processes that jax.distributed can read by itself."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or ("KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ):
        return True
    return any(os.environ.get(name, "1") not in ("", "0", "1") for name in _COUNTS)


def is_requested(settings: Any) -> bool:
    """Whether the configuration or the environment names several processes; see `start`."""
    given = (settings.coordinator, settings.num_processes, settings.process_id)
    if all(x is None for x in given):
        return _found_by_jax()
    if any(x is None for x in given):
        raise UserError(
            "distributed: coordinator, num_processes and process_id belong together; give all three (process_id: 0 to "
            "num_processes - 1, another one in each process), or none."
        )
    host, _, port = settings.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"distributed.coordinator: {settings.coordinator!r} can't be used; expected HOST:PORT, as in 10.0.0.1:1234."
        )
    if settings.num_processes < 1:
        raise UserError(f"distributed.num_processes: {settings.num_processes} can't be used; expected 1 or more.")
    if not 0 <= settings.process_id < settings.num_processes:
        raise UserError(
            f"distributed.process_id: {settings.process_id} can't be used; expected 0 to num_processes - 1, "
            f"which is {settings.num_processes - 1}."
        )
    return True


def start(settings: Any) -> None:
    """Joins the other processes, where the configuration or the environment names any; before JAX is first used.

    Args:
        settings: has coordinator, num_processes, process_id; all None: as the environment says.

    Raises:
        UserError: half of the settings, or the others can't be reached.
    """
    global _joined
    if not is_requested(settings):
        return
    given = (settings.coordinator, settings.num_processes, settings.process_id)
    import jax

    try:
        # A process that leaves with an error waits for the others no longer than they would wait for a dead one.
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        where = settings.coordinator or "the coordinator that the environment names"
        raise UserError(f"distributed: can't join the other processes at {where} ({_first_line(error)}).") from None
    _joined = True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def has_joined() -> bool:
    """Whether this process has joined others; unlike `many` it asks no backend, which may wait for them."""
    return _joined


def is_primary() -> bool:
    """Whether this process is the one that writes and prints."""
    import jax

    return jax.process_index() == 0


def is_multiprocess() -> bool:
    """Whether this is one of several processes."""
    import jax

    return jax.process_count() > 1


def on_primary(work: Callable[[], T]) -> T | None:
    """What `work` returns, done by the first process alone; None in the others, which wait and stop where it fails."""
    if not is_multiprocess():
        return work()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    result = error = None
    if is_primary():
        try:
            result = work()
        except Exception as caught:  # raised below, when the others know
            error = caught
    failed = bool(broadcast_one_to_all(np.int32(error is not None)))
    if error is not None:
        raise error
    if failed:
        raise UserError("The first process has stopped; it says why.")
    return result


def all_or_none(work: Callable[[], T]) -> T:
    """What `work` returns in this process; where it fails in one of them, all stop."""
    if not is_multiprocess():
        return work()
    result = error = None
    try:
        result = work()
    except Exception as caught:  # raised below, when the others know
        error = caught
    failed = np.flatnonzero(_of_all(np.array([error is not None])))
    if error is not None:
        raise error
    if len(failed):
        raise UserError(f"Process {failed[0]} has stopped; it says why.")
    return cast(T, result)


def primary_first(work: Callable[[], T]) -> T:
    """What `work` returns in this process: the first does it before the others, which find its caches filled."""
    result = on_primary(work)
    return all_or_none(lambda: cast(T, result) if is_primary() else work())


def require_equal(what: str, value: str) -> None:
    """UserError in every process unless all have the same `value`; otherwise they would wait for each other for ever."""
    if not is_multiprocess():
        return
    every = _of_all(np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8))
    others = np.flatnonzero((every != every[0]).any(1))
    if len(others):
        raise UserError(f"{what} of process {others[0]} differ from those of process 0; all must have the same.")


def _of_all(own: np.ndarray) -> np.ndarray:
    """A small array of each process: [processes, ...]."""
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(own))


def any_process(flags: np.ndarray) -> np.ndarray:
    """Flags, bool [N], that are set in any of the processes."""
    return np.logical_or.reduce(_of_all(flags), axis=0) if is_multiprocess() else flags


def exit_now(said: str, code: int) -> NoReturn:
    """Ends this process at once, and it alone: the others find it dead within HEARTBEAT seconds.

    By the usual way out JAX would wait as long for them, who know of nothing, and then abort.
    """
    print(said, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def silence_stdout() -> None:
    """What a process prints that is not the first goes nowhere; its errors stay."""
    if not is_primary():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for the rest of the process
