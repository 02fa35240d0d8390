"""One mesh with a `data` axis over all devices of all processes, and how arrays are laid out on it.

With a single device, nothing here changes an array or a program.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"
_first_device_only = False


def has_many_devices() -> bool:
    """Whether the work is shared among more than one device."""
    return not _first_device_only and jax.device_count() > 1


def use_first_device_only() -> None:
    """Makes this process compute alone, on its first device, once the other processes have finished."""
    global _first_device_only
    _first_device_only = True


def to_local(tree: Any) -> Any:
    """Replicated global arrays as arrays on the first device of this process."""
    return jax.device_put(jax.tree.map(np.asarray, tree), jax.local_devices()[0])


@cache
def mesh() -> Mesh:
    """All devices of all processes along the axis `data`, those of one process next to each other."""
    return Mesh(np.array(sorted(jax.devices(), key=lambda d: (d.process_index, d.id))), (AXIS,))


def replicated() -> NamedSharding:
    """The sharding that keeps the whole array on every device."""
    return NamedSharding(mesh(), P())


def by_row(axis: int = 0) -> NamedSharding:
    """The sharding that keeps an equal part of the rows (along `axis`) on each device."""
    return NamedSharding(mesh(), P(*[None] * axis, AXIS))


def round_up_to_devices(batch: int) -> int:
    """The next multiple of the number of devices."""
    return -(-batch // jax.device_count()) * jax.device_count()


def local_slice(batch: int) -> slice:
    """The rows of a batch (a multiple of the number of devices) that belong to the devices of this process."""
    each = batch // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def replicate(tree: Any, sharding: NamedSharding | None = None) -> Any:
    """Turns host arrays, equal in every process, into global arrays: replicated, or with another `sharding`."""
    if not has_many_devices():
        return jax.device_put(tree)  # leaves arrays alone that are on the device already
    target = sharding or replicated()

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == target:
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, target, lambda index: host[index])

    return jax.tree.map(put, tree)


def place_rows(array: np.ndarray, rows: int) -> Any:
    """A global array of `rows` rows, sharded by row; `array` holds all of them, or the `local_slice` of this process."""
    if not has_many_devices():
        return array
    if len(array) == rows and jax.process_count() > 1:
        array = array[local_slice(rows)]
    return jax.make_array_from_process_local_data(by_row(), array, (rows, *array.shape[1:]))


def place_batch(batch: dict[str, np.ndarray], rows: int) -> dict[str, Any]:
    """`place_rows` for every array of a batch of `rows` images."""
    return {k: place_rows(v, rows) for k, v in batch.items()}


def place_order(order: np.ndarray) -> Any:
    """Row numbers int32 [steps, B], sharded so that each device gathers its part; replicated if B does not divide."""
    if not has_many_devices():
        return order
    return replicate(order, by_row(1) if order.shape[1] % jax.device_count() == 0 else replicated())


def gather_rows(array: np.ndarray, rows: int) -> Any:
    """Gathers all `rows` rows of an array in every process; `array` holds the `local_slice` of this process."""
    return _gather()(place_rows(array, rows)) if has_many_devices() else array


@cache
def _gather() -> Callable:
    return jax.jit(lambda x: x, out_shardings=replicated())


def replicated_outputs() -> dict[str, Any]:
    """Options for `jit` that replicate the results on every device, and so in every process."""
    return {"out_shardings": replicated()} if has_many_devices() else {}


def per_device(fun: Callable) -> Callable:
    """`fun(params, batch_stats, images)`, run by every device on its own rows; the rows must not depend on each other."""
    if not has_many_devices():
        return fun
    return jax.shard_map(fun, mesh=mesh(), in_specs=(P(), P(), P(AXIS)), out_specs=P(AXIS), check_vma=False)
