"""lr_find: the range test of a phase, on features or pictures, for one seed or several; its result is results.range_test's."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcats.compiling import jit
from jaxcats.core import scan
from jaxcats.core.schedules import Schedule, constant, exponential
from jaxcats.errors import UserError
from jaxcats.inputs import resident, scans, streamed
from jaxcats.job import Plan, Setup, make_phase, name_number
from jaxcats.results.range_test import STOPPED, LRFindBand, LRFindResult
from jaxcats.storage.atomic import write_bytes, write_json

START, END, ITERATIONS = 1e-7, 10.0, 100  # fastai v2's
PICTURE_CHUNK = 10  # iterations per program when the batches are pictures: bounds the memory


def find_lr(
    setup: Setup,
    plan: Plan,
    params: Any,
    batch_stats: Any,
    feats: np.ndarray | None,
    *,
    start: float = START,
    end: float = END,
    iterations: int = ITERATIONS,
) -> LRFindResult:
    """Trains a copy for a while under a learning rate that grows from `start` to `end`, and keeps the losses.

    Args:
        setup: what all phases share.
        plan: the phase to find a rate for. Three rates keep their ratios; the reported one is the last group's.
        params: where it starts; unchanged afterwards, bit for bit.
        batch_stats: likewise.
        feats: features [n, F] of the training pictures, with precompute.
        start: first learning rate.
        end: what the rate would be after the last iteration: `start (end / start)^(i / iterations)`.
        iterations: batches; the data are gone through again where they are fewer.

    Raises:
        UserError: rates or iterations that make no range.
    """
    check_range(start, end, iterations)
    if feats is not None:  # the backbone has done its work, and a carry without it is a lighter one
        params, batch_stats = head_only(params), head_only(batch_stats)
    rates = group_rates(plan, start, end, iterations)
    step, create = make_phase(setup, plan, rates=rates, params=params)
    run = jit(scan.make_range_test(step, iterations=iterations), convolutions=feats is None)
    test = scan.begin_range_test(create(params, batch_stats))
    order = cycled_order(setup, plan, iterations, seed=setup.config.seed)
    losses, averages = [], []
    for arrays, rows in chunks(setup, plan, order, feats):
        test, (loss, average) = run(test, arrays, rows)
        losses.append(np.asarray(loss))
        averages.append(np.asarray(average))
        if int(test.reason):
            break
    return to_result(
        np.concatenate(losses),
        np.concatenate(averages),
        lrs=rates_at(rates[-1], iterations),
        count=int(test.count),
        reason=int(test.reason),
    )


def find_lr_band(
    setup: Setup,
    plan: Plan,
    params: Any,
    batch_stats: Any,
    feats: np.ndarray | None,
    *,
    seeds: int,
    start: float = START,
    end: float = END,
    iterations: int = ITERATIONS,
) -> LRFindBand:
    """`find_lr` for `seeds` fresh heads, each with an initialisation, an order and dropout of its own, in one program.

    Arguments and errors as of `find_lr`; `feats` is needed. No test ends early: the frozen ones wait for the others.
    """
    check_range(start, end, iterations, seeds)
    if feats is None:
        raise UserError("seeds: several at once need cached features: set precompute: true, or use seeds 1.")
    params, batch_stats = head_only(params), head_only(batch_stats)
    rates = group_rates(plan, start, end, iterations)
    first = setup.config.seed
    orders = np.stack([cycled_order(setup, plan, iterations, seed=first + k) for k in range(seeds)])

    def one(seed: jax.Array, arrays: dict[str, jax.Array], order: jax.Array):
        key = jax.random.key(seed)
        head, stats = setup.model.init_head(jax.random.split(jax.random.fold_in(key, name_number("init")))[1])
        step, create = make_phase(setup, plan, key=key, rates=rates, params=params)
        test = scan.begin_range_test(create(params | {"head": head}, batch_stats | {"head": stats}))
        test, (losses, averages) = scan.make_range_test(step, iterations=iterations)(test, arrays, order)
        return losses, averages, test.count, test.reason

    run = jax.jit(jax.vmap(one, in_axes=(0, None, 0)))
    found = run(np.arange(first, first + seeds), resident(setup, plan, feats), orders)
    lrs = rates_at(rates[-1], iterations)
    return LRFindBand(
        tuple(
            to_result(loss, average, lrs=lrs, count=int(count), reason=int(reason))
            for loss, average, count, reason in zip(*jax.device_get(found), strict=True)
        )
    )


def check_range(start: float, end: float, iterations: int, seeds: int = 1) -> None:
    """UserError for a range test that can't be."""
    for name, value in (("iterations", iterations), ("seeds", seeds)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}: {value!r} can't be used; expected a whole number, at least 1.")
    if not 0 < start < end < float("inf"):
        raise UserError(f"lr_find: the rates {start} to {end} can't be used; expected 0 < start < end.")


def head_only(tree: dict[str, Any]) -> dict[str, Any]:
    """Params or batch_stats without the backbone's."""
    return {"backbone": {}, "head": tree["head"]}


def group_rates(plan: Plan, start: float, end: float, iterations: int) -> list[Schedule]:
    """An exponential rate per layer group, in the ratios of the phase's own; `start` to `end` is the last group's."""
    lrs = (1.0, 1.0, 1.0) if plan.phase.lr == "auto" else plan.phase.lrs
    if not lrs[-1]:
        raise UserError(
            f"lr_find: the last layer group's rate is 0 in {lrs}; give it one, so that there is one to find."
        )
    # A group at rate 0 stays there.
    return [exponential(start * lr / lrs[-1], end * lr / lrs[-1], iterations) if lr else constant(0.0) for lr in lrs]


def rates_at(schedule: Schedule, iterations: int) -> np.ndarray:
    """The learning rate of each iteration, float64 [iterations]."""
    return np.asarray(jax.vmap(schedule)(np.arange(iterations)), np.float64)


def cycled_order(setup: Setup, plan: Plan, iterations: int, *, seed: int) -> np.ndarray:
    """Rows of each iteration, int32 [iterations, B]: epoch after epoch as training would see them."""
    n, epochs = len(setup.index.splits["train"]), -(-iterations // plan.steps_per_epoch)
    orders = [
        scan.epoch_order(n, batch_size=plan.phase.batch_size, seed=seed, epoch=plan.first_epoch + e)
        for e in range(epochs)
    ]
    return np.concatenate(orders)[:iterations]


def chunks(
    setup: Setup, plan: Plan, order: np.ndarray, feats: np.ndarray | None
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """(arrays, order into them) of each stretch: one for features, ten batches at a time for pictures."""
    if feats is not None or scans(plan.phase):
        yield resident(setup, plan, feats), order
        return
    size, whole = order.shape[1], -(-len(order) // PICTURE_CHUNK) * PICTURE_CHUNK
    padded = order[np.arange(whole) % len(order)]  # one program for every chunk; the iterations beyond do nothing
    with contextlib.closing(streamed(setup, plan, padded)) as batches:  # the test may end before they do
        for _ in range(0, whole, PICTURE_CHUNK):
            parts = [next(batches) for _ in range(PICTURE_CHUNK)]
            arrays = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
            yield arrays, np.arange(PICTURE_CHUNK * size, dtype=np.int32).reshape(PICTURE_CHUNK, size)


def to_result(losses: np.ndarray, averages: np.ndarray, *, lrs: np.ndarray, count: int, reason: int) -> LRFindResult:
    """The iterations that were run, with where and why they stopped."""
    return LRFindResult(
        lrs=lrs[:count],
        losses=losses[:count].astype(np.float64),
        smoothed=averages[:count].astype(np.float64),
        iterations=len(lrs),
        stopped=STOPPED[reason],
    )


def write_lr_find(folder: Path, result: LRFindResult | LRFindBand, *, name: str = "lr_find") -> list[Path]:
    """Writes NAME.json and figures/NAME.png into a folder; their paths."""
    import io

    picture = io.BytesIO()
    result.plot().savefig(picture, format="png", dpi=120)
    files = [folder / f"{name}.json", folder / "figures" / f"{name}.png"]
    files[1].parent.mkdir(parents=True, exist_ok=True)
    write_json(files[0], result.to_dict())
    write_bytes(files[1], picture.getvalue())
    return files
