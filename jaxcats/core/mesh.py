"""Devices: one mesh with a `data` axis over all devices of all processes, and how arrays lie on it.

With a single device nothing here changes an array or a program.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"


_alone = False


def has_many_devices() -> bool:
    """Whether there is more than one device to share the work among."""
    return not _alone and jax.device_count() > 1


def use_first_device_only() -> None:
    """From here on this process works by itself, on its first device: the others have nothing left to do."""
    global _alone
    _alone = True


def to_local(tree: Any) -> Any:
    """Replicated global arrays as arrays of this process's own first device."""
    return jax.device_put(jax.tree.map(np.asarray, tree), jax.local_devices()[0])


@cache
def mesh() -> Mesh:
    """All devices of all processes, each process's next to each other, along the axis `data`."""
    return Mesh(np.array(sorted(jax.devices(), key=lambda d: (d.process_index, d.id))), (AXIS,))


def replicated() -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh(), P())


def by_row(axis: int = 0) -> NamedSharding:
    """An equal part of the array's rows (along `axis`) on each device."""
    return NamedSharding(mesh(), P(*[None] * axis, AXIS))


def round_up_to_devices(batch: int) -> int:
    """The next multiple of the number of devices."""
    return -(-batch // jax.device_count()) * jax.device_count()


def local_slice(batch: int) -> slice:
    """The rows of a batch (a multiple of the number of devices) that lie on this process's devices."""
    each = batch // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def replicate(tree: Any, sharding: NamedSharding | None = None) -> Any:
    """Host arrays, the same in every process, as global arrays: whole on every device, or laid out as `sharding` says."""
    how = sharding or replicated()
    if not has_many_devices():
        return jax.device_put(tree)  # nothing is moved that is there

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == how:
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, how, lambda part: host[part])

    return jax.tree.map(put, tree)


def place_images(own: np.ndarray, rows: int) -> Any:
    """An array of `rows` rows laid out by row, of which this process has its `own_part` (or all, which is cut)."""
    if not has_many_devices():
        return own
    if len(own) == rows and jax.process_count() > 1:
        own = own[local_slice(rows)]
    return jax.make_array_from_process_local_data(by_row(), own, (rows, *own.shape[1:]))


def place_batch(batch: dict[str, np.ndarray], rows: int) -> dict[str, Any]:
    """Every array of a batch of `rows` images likewise."""
    return {k: place_images(v, rows) for k, v in batch.items()}


def place_order(order: np.ndarray) -> Any:
    """Row numbers [steps, B]: each device looks up its own part of every step's, where B divides among the devices."""
    if not has_many_devices():
        return order
    return replicate(order, by_row(1) if order.shape[1] % jax.device_count() == 0 else replicated())


def gather_rows(own: np.ndarray, rows: int) -> Any:
    """All `rows` rows of an array of which each process has its `own_part`."""
    if not has_many_devices():
        return own
    return _gather()(place_images(own, rows))


@cache
def _gather() -> Callable:
    return jax.jit(lambda x: x, out_shardings=replicated())


def replicated_outputs() -> dict[str, Any]:
    """Options of `jit` whose results every device, and so every process, is to have whole."""
    return {"out_shardings": replicated()} if has_many_devices() else {}


def per_device(fun: Callable) -> Callable:
    """`fun(params, batch_stats, images)`, whose rows know nothing of each other, run by every device on its own rows."""
    if not has_many_devices():
        return fun
    return jax.shard_map(fun, mesh=mesh(), in_specs=(P(), P(), P(AXIS)), out_specs=P(AXIS), check_vma=False)
