"""What can be read from a curve of losses under a growing learning rate: the average, four rules, and whether it moved.

The average and the rules are those of fastai 2.8 (fastai.callback.schedule), number for number, in float32 as there; see
tests/golden/lr_find.json. They take the points to judge as they are: which points those are, `LRFindResult.points` says.
"""

import base64
import contextlib
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxcats.common.compile_cache import jit
from jaxcats.common.errors import UserError, nearest
from jaxcats.common.io import write_bytes, write_json
from jaxcats.common.stats import smooth
from jaxcats.core import scan
from jaxcats.core.schedules import Schedule, constant, exponential
from jaxcats.train.drivers import resident, scans, streamed
from jaxcats.train.experiment import Experiment, PhasePlan, make_phase, stable_number

if TYPE_CHECKING:
    from jaxcats.plots import Figure


# A level is the mean of this many batches. It counts as changed when it is this many standard errors from the mean of all
# batches before it (pure noise gets there in 2 to 3 tests of 100) and, downwards, this share of it: a fall too small to use.
WINDOW, STANDARD_ERRORS, SHARE = 10, 4.0, 0.01


def valley(lrs: np.ndarray, losses: np.ndarray) -> float:
    """The rate half-way down the longest valley (a strictly decreasing subsequence, gaps allowed): [m], [m] -> rate.

    Half is a third plus a sixth of the way, each rounded down, as fastai has it (Novetta's rule).
    """
    losses = np.asarray(losses, np.float32)
    length = np.ones(len(losses), int)  # of the longest strictly decreasing subsequence that ends here
    for i in range(1, len(losses)):
        length[i] = 1 + max(length[:i][losses[i] < losses[:i]], default=0)
    end = int(length.argmax())
    # One before the subsequence would start if it had no gaps: so in fastai, where -1 also means the last point.
    start = end - int(length[end]) if length[end] > 1 else 0
    third = (end - start) / 3
    return float(lrs[start + int(third) + int(third / 2)])


def steep(lrs: np.ndarray, losses: np.ndarray) -> float:
    """The rate where the loss falls fastest by the logarithm of the rate: [m], [m] -> rate."""
    losses = np.asarray(losses, np.float32)
    with np.errstate(invalid="ignore"):
        slopes = np.diff(losses) / np.diff(np.log(np.asarray(lrs, np.float32)))
    return float(lrs[int(slopes.argmin())])


def minimum(lrs: np.ndarray, losses: np.ndarray) -> float:
    """A tenth of the rate at the lowest loss: [m], [m] -> rate."""
    return float(lrs[int(np.asarray(losses, np.float32).argmin())]) / 10


def slide(lrs: np.ndarray, losses: np.ndarray) -> float:
    """The left end of a window of 15 steps that slides left while the slopes at its ends differ by more than 0.005.

    Slopes are losses by step (Gugger's rule in fastai). Raises IndexError with fewer than 16 points, as fastai does.
    """
    with np.errstate(invalid="ignore"):
        slope = np.gradient(np.asarray(losses, np.float32))
    right, left = len(losses) - 1, len(losses) - 16
    if left < 0:
        raise IndexError(f"slide needs 16 points, got {len(losses)}")
    found = left
    while left >= 0 and abs(slope[right] - slope[left]) > 0.005:
        found, right, left = left, right - 1, left - 1
    return float(lrs[found])


RULES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {f.__name__: f for f in (valley, steep, minimum, slide)}


def changes(losses: np.ndarray) -> tuple[int, int]:
    """Iterations (from 1) by which the raw losses had surely fallen and surely risen; 0 where they never did."""
    losses = losses[: int(np.isfinite(losses).argmin())] if not np.isfinite(losses).all() else losses
    fell = rose = 0
    for end in range(2 * WINDOW, len(losses) + 1):
        before, now = losses[: end - WINDOW], losses[end - WINDOW : end]
        # The deviation by successive differences, whose median neither a slope nor a few wild batches move.
        noise = 1.4826 / np.sqrt(2) * np.median(np.abs(np.diff(before)))
        error = noise * np.sqrt(1 / WINDOW + 1 / len(before))
        sure = max(STANDARD_ERRORS * error, SHARE * abs(before.mean()))
        change = now.mean() - before.mean()
        fell = fell or (end if change < -sure else 0)
        rose = rose or (end if change > sure else 0)
    return fell, rose


__all__ = ["LRFindBand", "LRFindResult", "minimum", "slide", "smooth", "steep", "valley"]

STOPPED = ("end", "diverged", "nan")  # at the number that core.scan.RangeTest gives as its reason
# The slide rule compares slopes 15 steps apart: with fewer points fastai raises IndexError.
ENOUGH_POINTS = 16
# Rules that differ by more than this look at different parts of the curve. One of the four at either end may do so: a single
# noisy batch throws off `steep` or `slide` on curves that are as good as any (8 of 8 on real photos), and not the others.
AGREEMENT = 30.0


class _Found:
    """What one test and several have in common; `suggestions` and `refusal` are their own."""

    results: tuple["LRFindResult", ...]
    if TYPE_CHECKING:  # each is a cached property

        @property
        def refusal(self) -> str | None: ...
        @property
        def suggestions(self) -> dict[str, float]: ...

    def suggestion(self, method: str = "valley") -> float:
        """The learning rate by a method (of a band: the seeds' median); UserError saying why when there is none to trust."""
        if method not in RULES:
            raise UserError(f"method {method!r} is not one of {', '.join(RULES)}.{nearest(method, list(RULES))}")
        if self.refusal:
            raise UserError(f"lr_find has no trustworthy answer: {self.refusal}")
        if method in self.outliers:
            raise UserError(
                f"lr_find has no trustworthy answer by {method}: {_rate(self.suggestions[method])} is more than a factor "
                f"{AGREEMENT:.0f} from the middle of the four; choose another method, or from the figure"
            )
        return self.suggestions[method]

    @property
    def outliers(self) -> tuple[str, ...]:
        """Methods whose suggestion is more than a factor 30 from the middle of the four; not to be trusted."""
        return _outliers(self.suggestions)

    def range(self, method: str = "valley") -> tuple[float, float]:
        """Lowest and highest of the seeds' suggestions; UserError like `suggestion`."""
        self.suggestion(method)
        return self._span(method)

    def _span(self, method: str) -> tuple[float, float]:
        found = [r.suggestions[method] for r in self.results if not r.refusal]
        return min(found), max(found)

    def table(self) -> str:
        """The result as plain text."""
        raise NotImplementedError

    def plot(self) -> "Figure":
        """Loss by learning rate (of a band: the seeds' median and spread), with the suggestions or the refusal."""
        from jaxcats import plots  # matplotlib takes half a second to import

        return plots.lr_find(
            [(r.lrs, r.losses, r.smoothed) for r in self.results],
            suggestions=self.suggestions,
            ranges={name: self._span(name) for name in self.suggestions},
            doubtful=self.outliers,
            refusal=self.refusal,
            skip_start=self.results[0].iterations // 10,
        )

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        image = base64.b64encode(self.plot()._repr_png_()).decode()
        return f'<pre>{html.escape(self.table())}</pre><img src="data:image/png;base64,{image}" alt="loss by learning rate">'


@dataclass(frozen=True, eq=False, repr=False)
class LRFindResult(_Found):
    """One range test: what was recorded, where and why it stopped, and what follows from it.

    Attributes:
        lrs: float64 [m], learning rate of the last layer group at each iteration that ran.
        losses: float64 [m], raw training losses; the last may be NaN.
        smoothed: float64 [m], their average, as `smooth` makes it.
        iterations: how many were asked for; m is that or less.
        stopped: "end", "diverged" (the smoothed loss passed 4 times its best) or "nan" (or infinite).
    """

    lrs: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    iterations: int
    stopped: str

    @property
    def results(self) -> "tuple[LRFindResult, ...]":
        return (self,)

    def __post_init__(self) -> None:
        for name in ("lrs", "losses", "smoothed"):
            values = np.array(getattr(self, name), np.float64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        if not self.lrs.ndim == 1 or not self.lrs.shape == self.losses.shape == self.smoothed.shape:
            raise ValueError(f"lrs, losses, smoothed: {self.lrs.shape}, {self.losses.shape}, {self.smoothed.shape}")
        if not 0 < len(self.lrs) <= self.iterations or self.stopped not in STOPPED:
            raise ValueError(f"{len(self.lrs)} of {self.iterations} iterations, stopped={self.stopped!r} ({STOPPED})")

    @property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Rates and smoothed losses that the rules judge: without the first tenth, the last five and what follows a NaN."""
        # fastai goes on after a NaN (not after an infinite loss), so there the last five fall into the tail; this record
        # ends at the NaN instead.
        goes_on = self.stopped == "nan" and not np.isinf(self.smoothed[-1])
        end = (self.iterations if goes_on else len(self.lrs)) - 5
        kept = slice(self.iterations // 10, max(end, 0))
        lrs, losses = self.lrs[kept], self.smoothed[kept]
        good = int(np.isnan(losses).argmax()) if np.isnan(losses).any() else len(losses)
        return lrs[:good], losses[:good]

    @property
    def why(self) -> str:
        """Where and why the test stopped, in words."""
        if self.stopped == "end":
            return f"ran all {self.iterations} iterations (learning rate {_rate(self.lrs[0])} to {_rate(self.lrs[-1])})"
        kind = "infinite" if np.isinf(self.losses[-1]) else "not a number"
        reason = "the smoothed loss passed 4 x its best" if self.stopped == "diverged" else f"the loss was {kind}"
        return (
            f"stopped at iteration {len(self.lrs)} of {self.iterations} (learning rate {_rate(self.lrs[-1])}): {reason}"
        )

    @cached_property
    def refusal(self) -> str | None:
        """Why no rate can be suggested, in one line; None when one can."""
        lrs, smoothed = self.points
        fell, rose = changes(self.losses)
        half = self.iterations // 2
        stopped_early = self.stopped != "end" and len(self.lrs) <= half
        if not fell and (stopped_early or 0 < rose <= half):
            return f"the loss diverged from the start: it never fell; the test {self.why}; start from a lower learning rate"
        if len(lrs) < ENOUGH_POINTS:
            cure = "more iterations" + ("" if self.stopped == "end" else " or start from a lower learning rate")
            return f"too few points: {len(lrs)} of the {ENOUGH_POINTS} needed; the test {self.why}; ask for {cure}"
        if np.isinf(smoothed).sum() > 1:  # one ends a test; with more, slopes are differences of infinities
            return f"the loss is infinite: from learning rate {_rate(lrs[np.isinf(smoothed).argmax()])} on, and the test went on"
        if not fell:
            return "no descent: the loss never fell clearly below its noise; is the model trained already, or frozen?"
        found = {name: rule(lrs, smoothed) for name, rule in RULES.items()}
        _, low, high, _ = sorted(found, key=lambda k: found[k])
        if found[high] > AGREEMENT * found[low]:
            return (
                f"the methods disagree: even the middle two, {low} and {high}, are a factor {found[high] / found[low]:,.1f} "
                f"apart, more than {AGREEMENT:.0f}; choose from the figure"
            )
        if "valley" in _outliers(found):
            return (
                f"the methods disagree: the valley ({_rate(found['valley'])}) is more than a factor {AGREEMENT:.0f} from the "
                f"middle of the four; choose from the figure"
            )
        return None

    @cached_property
    def suggestions(self) -> dict[str, float]:
        """The learning rate by each of valley, steep, minimum and slide; empty when refused."""
        return {} if self.refusal else {name: rule(*self.points) for name, rule in RULES.items()}

    def table(self) -> str:
        """The result as plain text."""
        best = int(np.nanargmin(self.smoothed)) if np.isfinite(self.smoothed).any() else 0
        lines = [
            f"learning rate range test: {self.why}",
            f"smoothed loss: {self.smoothed[0]:.3g} at first, {self.smoothed[best]:.3g} at its lowest "
            f"(learning rate {_rate(self.lrs[best])}), {self.smoothed[-1]:.3g} at last",
        ]
        rows = {name: _rate(value) for name, value in self.suggestions.items()}
        return "\n".join([*lines, *_answer(rows, self.refusal, self.outliers)])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON; NaN is null and an infinite loss the string "inf"."""
        return {
            "iterations": self.iterations,
            "stopped": self.stopped,
            "why": self.why,
            "refusal": self.refusal,
            "suggestions": self.suggestions,
            "outliers": list(self.outliers),
            **{name: [_to_json(x) for x in getattr(self, name)] for name in ("lrs", "losses", "smoothed")},
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "LRFindResult":
        """What `to_dict` wrote, after JSON or not."""
        arrays = {
            name: np.array([np.nan if x is None else float(x) for x in record[name]])
            for name in ("lrs", "losses", "smoothed")
        }
        return cls(**arrays, iterations=int(record["iterations"]), stopped=str(record["stopped"]))


@dataclass(frozen=True, eq=False, repr=False)
class LRFindBand(_Found):
    """The same range test under several seeds (other initialisation, other order of the images)."""

    results: tuple[LRFindResult, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "results", tuple(self.results))
        if not self.results:
            raise ValueError("a band needs at least one result")

    @cached_property
    def refusal(self) -> str | None:
        """Why no rate can be suggested: fewer than half of the seeds give an answer."""
        reasons = [r.refusal for r in self.results if r.refusal]
        answers = len(self.results) - len(reasons)
        if 2 * answers >= len(self.results):
            found = [r.suggestions for r in self.results if not r.refusal]
            medians = {name: float(np.median([each[name] for each in found])) for name in RULES}
            alone = "valley" in _outliers(medians)
            return "the methods disagree: the valley stands alone among the medians" if alone else None
        kinds = [reason.split(":")[0] for reason in reasons]
        common = max(kinds, key=kinds.count)
        return f"{answers} of {len(self.results)} seeds give an answer, fewer than half; {kinds.count(common)} times {common}"

    @cached_property
    def suggestions(self) -> dict[str, float]:
        """By each method the median of the seeds' suggestions, of those that have one; empty when refused."""
        if self.refusal:
            return {}
        found = [r.suggestions for r in self.results if not r.refusal]
        return {name: float(np.median([each[name] for each in found])) for name in RULES}

    @property
    def why(self) -> str:
        """How many seeds there were, how far they ran, and how many give an answer."""
        answers, ran = sum(not r.refusal for r in self.results), [len(r.lrs) for r in self.results]
        return (
            f"ran {min(ran)} to {max(ran)} of {self.results[0].iterations} iterations under {len(self.results)} seeds, of "
            f"which {answers} give an answer"
        )

    def table(self) -> str:
        """The result as plain text."""
        head = f"learning rate range test: {self.why}"
        refused = [f"  seed {i}: {r.refusal}" for i, r in enumerate(self.results) if r.refusal]
        spans = {name: self._span(name) for name in self.suggestions}
        rows = {
            name: f"{_rate(value):<9} ({_rate(spans[name][0])} to {_rate(spans[name][1])})"
            for name, value in self.suggestions.items()
        }
        return "\n".join([head, *refused, *_answer(rows, self.refusal, self.outliers)])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON: the summary, and every seed's result."""
        return {
            "refusal": self.refusal,
            "suggestions": self.suggestions,
            "outliers": list(self.outliers),
            "ranges": {name: list(self._span(name)) for name in self.suggestions},
            "seeds": [r.to_dict() for r in self.results],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "LRFindBand":
        """What `to_dict` wrote, after JSON or not."""
        return cls(tuple(LRFindResult.from_dict(r) for r in record["seeds"]))


def _outliers(suggestions: Mapping[str, float]) -> tuple[str, ...]:
    if not suggestions:
        return ()
    _, low, high, _ = sorted(suggestions.values())
    middle = (low * high) ** 0.5
    return tuple(n for n, x in suggestions.items() if not middle / AGREEMENT <= x <= middle * AGREEMENT)


def _answer(rows: Mapping[str, str], refusal: str | None, outliers: Sequence[str]) -> list[str]:
    if refusal:
        return [f"no suggestion: {refusal}"]
    far = dict.fromkeys(outliers, f"  not to be trusted: more than a factor {AGREEMENT:.0f} from the others' middle")
    lines = [f"{name:<9}  {row}".rstrip() + far.get(name, "") for name, row in rows.items()]
    return [f"{'method':<9}  learning rate", *lines]


def _rate(value: float) -> str:
    return f"{value:.2g}"


def _to_json(x: float) -> float | str | None:
    return None if np.isnan(x) else float(x) if np.isfinite(x) else str(float(x))


START, END, ITERATIONS = 1e-7, 10.0, 100  # fastai v2's
PICTURE_CHUNK = 10  # iterations per program when the batches are images: bounds the memory


def find_lr(
    setup: Experiment,
    plan: PhasePlan,
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
        feats: features [n, F] of the training images, with precompute.
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
    setup: Experiment,
    plan: PhasePlan,
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
        head, stats = setup.model.init_head(jax.random.split(jax.random.fold_in(key, stable_number("init")))[1])
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


def group_rates(plan: PhasePlan, start: float, end: float, iterations: int) -> list[Schedule]:
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


def cycled_order(setup: Experiment, plan: PhasePlan, iterations: int, *, seed: int) -> np.ndarray:
    """Rows of each iteration, int32 [iterations, B]: epoch after epoch as training would see them."""
    n, epochs = len(setup.index.splits["train"]), -(-iterations // plan.steps_per_epoch)
    orders = [
        scan.epoch_order(n, batch_size=plan.phase.batch_size, seed=seed, epoch=plan.first_epoch + e)
        for e in range(epochs)
    ]
    return np.concatenate(orders)[:iterations]


def chunks(
    setup: Experiment, plan: PhasePlan, order: np.ndarray, feats: np.ndarray | None
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """(arrays, order into them) of each stretch: one for features, ten batches at a time for images."""
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

    image = io.BytesIO()
    result.plot().savefig(image, format="png", dpi=120)
    files = [folder / f"{name}.json", folder / "figures" / f"{name}.png"]
    files[1].parent.mkdir(parents=True, exist_ok=True)
    write_json(files[0], result.to_dict())
    write_bytes(files[1], image.getvalue())
    return files
