"""Epochs as XLA programs: the step scanned over an index array that gathers from arrays resident on the device."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def epoch_order(n: int, *, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Which rows each step of an epoch sees: int32 [steps, B], a full permutation without its remainder.

    A pure function of its arguments; B = min(batch_size, n).
    """
    batch = min(batch_size, n)
    rows = np.random.default_rng([seed, epoch]).permutation(n).astype(np.int32)
    return rows[: n // batch * batch].reshape(-1, batch)


def make_scan(step: Callable) -> Callable:
    """A pure function `(state, arrays, order [K, B]) -> (state, metrics [K])`: K steps of `step` in one program.

    `arrays` is a dict of arrays with a row per picture; each step gathers the rows that `order` names.
    """

    def scan_steps(state: Any, arrays: dict[str, jax.Array], order: jax.Array):
        def body(state, rows):
            batch = {k: v[rows] for k, v in arrays.items()}
            return step(state, batch)

        return jax.lax.scan(body, state, order)

    return scan_steps


def scan_epoch(
    scan_steps: Callable, state: Any, arrays: dict[str, jax.Array], *, order: np.ndarray, chunk: int
) -> Iterator[tuple[Any, Any]]:
    """Drives a jitted `make_scan` over an epoch in chunks of a fixed number of steps; the state is donated by the jit.

    Args:
        scan_steps: `jax.jit(make_scan(step), donate_argnums=0)`.
        state: not usable afterwards.
        arrays: see `make_scan`.
        order: int32 [steps, B], the epoch's remaining steps. For the same bits after a resumption they must start at a
            multiple of `chunk`: programs of other lengths may round otherwise.
        chunk: steps per program.

    Yields:
        (state, metrics with a leading axis of the chunk's steps) after each chunk.
    """
    for at in range(0, len(order), chunk):
        state, metrics = scan_steps(state, arrays, order[at : at + chunk])
        yield state, metrics


def stream_epoch(step: Callable, state: Any, batches: Iterator[dict[str, np.ndarray]]) -> Iterator[tuple[Any, Any]]:
    """Drives a jitted step over batches from the host; yields like `scan_epoch`, in chunks of one step."""
    for batch in batches:
        state, metrics = step(state, batch)
        yield state, jax.tree.map(lambda x: x[None], metrics)
