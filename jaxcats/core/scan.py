"""Epochs and the range test as XLA programs: `lax.scan` of the train step over rows gathered from arrays on the device."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def epoch_order(n: int, *, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of each step of an epoch: int32 [steps, B], a permutation of all n rows without its remainder.

    It is a pure function of its arguments; B = min(batch_size, n).
    """
    batch = min(batch_size, n)
    rows = np.random.default_rng([seed, epoch]).permutation(n).astype(np.int32)
    return rows[: n // batch * batch].reshape(-1, batch)


def make_scan(step: Callable) -> Callable:
    """A pure function `(state, arrays, order [K, B]) -> (state, metrics [K])`: K steps of `step` in one program.

    `arrays` is a dict of arrays with a row per image; each step gathers the rows that `order` names.
    """

    def scan_steps(state: Any, arrays: dict[str, jax.Array], order: jax.Array):
        def body(state, rows):
            batch = {k: v[rows] for k, v in arrays.items()}
            return step(state, batch)

        return jax.lax.scan(body, state, order)

    return scan_steps


def scan_epoch(
    scan_steps: Callable,
    state: Any,
    arrays: dict[str, jax.Array],
    *,
    order: np.ndarray,
    chunk: int,
    place: Callable = lambda order: order,
) -> Iterator[tuple[Any, Any]]:
    """Drives a jitted `make_scan` over an epoch in chunks of a fixed number of steps; the state is donated by the jit.

    Args:
        scan_steps: `jax.jit(make_scan(step), donate_argnums=0)`.
        state: donated, so it can't be used afterwards.
        arrays: see `make_scan`.
        order: int32 [steps, B], the remaining steps of the epoch. For the same bits after resuming they must start at a
            multiple of `chunk`, because a program of another length may round differently.
        chunk: steps per program.
        place: lays the order of a chunk out on the devices.

    Yields:
        (state, metrics with a leading axis of the chunk's steps) after each chunk.
    """
    for at in range(0, len(order), chunk):
        state, metrics = scan_steps(state, arrays, place(order[at : at + chunk]))
        yield state, metrics


def stream_epoch(step: Callable, state: Any, batches: Iterator[dict[str, np.ndarray]]) -> Iterator[tuple[Any, Any]]:
    """Drives a jitted step over batches from the host; yields like `scan_epoch`, in chunks of one step."""
    for batch in batches:
        state, metrics = step(state, batch)
        yield state, jax.tree.map(lambda x: x[None], metrics)


BETA = 0.98  # decay of the average loss in the range test, as in fastai
DIVERGED = 4  # The range test stops when the average exceeds its best value by this factor.


@partial(jax.tree_util.register_dataclass, data_fields=["state", "average", "best", "count", "reason"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The state of a range test.

    Attributes:
        state: the TrainState before the next iteration.
        average: float32 scalar, running average of the loss, not yet debiased.
        best: float32 scalar, lowest debiased average so far.
        count: int32 scalar, iterations run so far.
        reason: int32 scalar; 0 while it runs, 1 once the loss has diverged, 2 once it is not a number.
    """

    state: Any
    average: jax.Array
    best: jax.Array
    count: jax.Array
    reason: jax.Array


def begin_range_test(state: Any) -> RangeTest:
    """A range test before its first iteration."""
    zero = jnp.zeros((), jnp.float32)
    return RangeTest(state, zero, jnp.full((), jnp.inf, jnp.float32), jnp.int32(0), jnp.int32(0))


def make_range_test(step: Callable, *, iterations: int) -> Callable:
    """A pure function `(test, arrays, order [K, B]) -> (test, (losses [K], averages [K]))`: K iterations of lr_find.

    It ends after a loss that is not a number, a debiased average above four times its best, or `iterations` in all: then the
    state no longer changes and the remaining losses are NaN. Outside vmap those iterations cost nothing.

    Args:
        step: from `make_train_step`, with a tx whose learning rate grows exponentially (schedules.exponential).
        iterations: number of iterations in all; the last chunk may be longer.

    Source: L. N. Smith, arXiv:1506.01186; the average and the end are fastai's.
    """

    def take(test: RangeTest, batch: Any):
        state, sums = step(test.state, batch)
        loss = sums["loss"] / sums["n"]
        average = BETA * test.average + (1 - BETA) * loss
        smooth = average / (1 - jnp.float32(BETA) ** (test.count + 1))
        best = jnp.minimum(test.best, smooth)
        reason = jnp.where(jnp.isfinite(loss), jnp.where(smooth > DIVERGED * best, 1, 0), 2).astype(jnp.int32)
        return RangeTest(state, average, best, test.count + 1, reason), (loss, smooth)

    def skip(test: RangeTest, batch: Any):
        return test, (jnp.float32(jnp.nan), jnp.float32(jnp.nan))

    def run(test: RangeTest, arrays: dict[str, jax.Array], order: jax.Array):
        def body(test, rows):
            batch = {k: v[rows] for k, v in arrays.items()}
            return jax.lax.cond((test.reason == 0) & (test.count < iterations), take, skip, test, batch)

        return jax.lax.scan(body, test, order)

    return run
