"""lr_find: the learning rate range test of a phase, its curve, its suggestions, and why there may be none.

`find_lr` runs the test from given weights, or for several fresh heads at once. The test is Smith's (WACV 2017);
the smoothing, the points and the four rules are those of fastai 2.8 (fastai.callback.schedule), number for number, in
float32 as there (tests/golden/lr_find.json). The reasons not to trust them are ours.
"""

import base64
import contextlib
import html
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxcats.common.compile_cache import jit
from jaxcats.common.errors import UserError, nearest
from jaxcats.common.io import write_bytes, write_json
from jaxcats.core import scan
from jaxcats.core.schedules import Schedule, constant, exponential
from jaxcats.train.drivers import resident_arrays, scans, streamed
from jaxcats.train.experiment import Experiment, PhasePlan, make_phase, stable_number

if TYPE_CHECKING:
    from jaxcats.plots import Figure

START, END, ITERATIONS = 1e-7, 10.0, 100  # fastai v2's
IMAGE_CHUNK = 10  # iterations per program when the batches are images; bounds the memory
STOPPED = ("end", "diverged", "nan")  # by the reason of core.scan.RangeTest
ENOUGH_POINTS = 16  # The slide rule compares slopes 15 steps apart; with fewer points fastai raises IndexError.
# Rules that differ by more than this factor look at different parts of the curve. The lowest or highest of the four may do so:
# one noisy batch misleads `steep` or `slide` on curves that are otherwise good (8 of 8 on real photos).
AGREEMENT = 30.0
WINDOW, STANDARD_ERRORS, SHARE = 10, 4.0, 0.01  # see `changes`


# --- running the test ---


def find_lr(
    experiment: Experiment,
    plan: PhasePlan,
    weights: tuple[Any, Any],
    features: np.ndarray | None,
    *,
    start: float = START,
    end: float = END,
    iterations: int = ITERATIONS,
    seeds: int = 1,
) -> "LRFindResult | LRFindBand":
    """Trains a copy for a while under a learning rate that grows from `start` to `end`, and records the losses.

    Args:
        experiment: what all phases share.
        plan: the phase to find a rate for. Three rates keep their ratios; the reported one is that of the last group.
        weights: (params, batch_stats) where it starts; unchanged afterwards, bit for bit.
        features: float32 [n, F] of the training images, with precompute.
        start: first learning rate.
        end: the rate after the last iteration would be this: `start (end / start)^(i / iterations)`.
        iterations: number of batches; the dataset is repeated where it has fewer.
        seeds: more than one: this number of fresh heads, each with its own initialisation, order and dropout, in one
            program; it needs features.

    Raises:
        UserError: rates, iterations or seeds that are impossible.
    """
    check_range(start, end, iterations, seeds)
    if features is None and seeds > 1:
        raise UserError("seeds: several at once need cached features; set precompute: true, or use seeds 1.")
    if features is not None:  # The step does not need the backbone, and without it there is less to carry.
        weights = ({"backbone": {}, "head": weights[0]["head"]}, {"backbone": {}, "head": weights[1]["head"]})
    rates = group_rates(plan, start, end, iterations)
    lrs = np.asarray(jax.vmap(rates[-1])(np.arange(iterations)), np.float64)
    first = experiment.config.seed
    orders = [cycled_order(experiment, plan, iterations, seed=seed) for seed in range(first, first + seeds)]
    if seeds == 1:
        return _run_test(experiment, plan, weights, features, rates=rates, lrs=lrs, order=orders[0])

    def run_seed(seed: jax.Array, arrays: dict[str, jax.Array], order: jax.Array):
        key = jax.random.key(seed)
        init_key = jax.random.split(jax.random.fold_in(key, stable_number("init")))[1]
        heads = experiment.model.init_head(init_key)
        train_step, create_state = make_phase(experiment, plan, key=key, rates=rates, params=weights[0])
        state = create_state(*(tree | {"head": head} for tree, head in zip(weights, heads, strict=True)))
        run = scan.make_range_test(train_step, iterations=iterations)
        test, (losses, averages) = run(scan.begin_range_test(state), arrays, order)
        return losses, averages, test.count, test.reason

    run_seeds = jax.jit(jax.vmap(run_seed, in_axes=(0, None, 0)))
    arrays = resident_arrays(experiment, plan, features)
    outputs = jax.device_get(run_seeds(np.arange(first, first + seeds), arrays, np.stack(orders)))
    return LRFindBand(tuple(LRFindResult.of_test(lrs, *parts) for parts in zip(*outputs, strict=True)))


def _run_test(
    experiment: Experiment,
    plan: PhasePlan,
    weights: tuple[Any, Any],
    features: np.ndarray | None,
    *,
    rates: list[Schedule],
    lrs: np.ndarray,
    order: np.ndarray,
) -> "LRFindResult":
    """One range test from given weights, a chunk at a time."""
    train_step, create_state = make_phase(experiment, plan, rates=rates, params=weights[0])
    run = jit(scan.make_range_test(train_step, iterations=len(lrs)), convolutions=features is None)
    test = scan.begin_range_test(create_state(*weights))
    losses, averages = [], []
    for arrays, rows in chunks(experiment, plan, order, features):
        test, (loss, average) = run(test, arrays, rows)
        losses.append(np.asarray(loss))
        averages.append(np.asarray(average))
        if int(test.reason):
            break
    return LRFindResult.of_test(lrs, np.concatenate(losses), np.concatenate(averages), test.count, test.reason)


def check_range(start: float, end: float, iterations: int, seeds: int = 1) -> None:
    """Raises UserError for a range test that is impossible."""
    for name, value in (("iterations", iterations), ("seeds", seeds)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}: {value!r} can't be used; expected a whole number, at least 1.")
    if not 0 < start < end < float("inf"):
        raise UserError(f"lr_find: the rates {start} to {end} can't be used; expected 0 < start < end.")


def group_rates(plan: PhasePlan, start: float, end: float, iterations: int) -> list[Schedule]:
    """An exponential rate for each layer group, in the ratios of the phase; `start` to `end` is that of the last group."""
    lrs = (1.0, 1.0, 1.0) if plan.phase.lr == "auto" else plan.phase.lrs
    last = lrs[-1]
    if not last:
        raise UserError(
            f"lr_find: the rate of the last layer group is 0 in {lrs}; give it one, so that one can be found."
        )
    return [exponential(start * lr / last, end * lr / last, iterations) if lr else constant(0.0) for lr in lrs]


def cycled_order(experiment: Experiment, plan: PhasePlan, iterations: int, *, seed: int) -> np.ndarray:
    """Rows of each iteration, int32 [iterations, B]: epoch after epoch, as training would see them."""
    n, epochs = len(experiment.index.splits["train"]), -(-iterations // plan.steps_per_epoch)
    orders = [
        scan.epoch_order(n, batch_size=plan.phase.batch_size, seed=seed, epoch=plan.first_epoch + e)
        for e in range(epochs)
    ]
    return np.concatenate(orders)[:iterations]


def chunks(
    experiment: Experiment, plan: PhasePlan, order: np.ndarray, features: np.ndarray | None
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """(arrays, order into them) for each program: one for features, IMAGE_CHUNK batches at a time for images."""
    if features is not None or scans(plan.phase):
        yield resident_arrays(experiment, plan, features), order
        return
    steps = -(-len(order) // IMAGE_CHUNK) * IMAGE_CHUNK
    padded = order[np.arange(steps) % len(order)]  # one program for every chunk; extra iterations do nothing
    rows = np.arange(IMAGE_CHUNK * order.shape[1], dtype=np.int32).reshape(IMAGE_CHUNK, -1)
    with contextlib.closing(streamed(experiment, plan, padded)) as batches:  # The test may end before they do.
        for _ in range(0, steps, IMAGE_CHUNK):
            parts = [next(batches) for _ in range(IMAGE_CHUNK)]
            yield {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}, rows


def write_lr_find(folder: Path, result: "LRFindResult | LRFindBand", *, name: str = "lr_find") -> list[Path]:
    """Writes NAME.json and figures/NAME.png into a folder; returns their paths."""
    image = io.BytesIO()
    result.plot().savefig(image, format="png", dpi=120)
    files = [folder / f"{name}.json", folder / "figures" / f"{name}.png"]
    write_json(files[0], result.to_dict())
    write_bytes(files[1], image.getvalue())
    return files


# --- its result ---


class _Suggestions:
    """What one test and a band of tests have in common."""

    results: tuple["LRFindResult", ...]
    if TYPE_CHECKING:
        refusal: str | None
        why: str

    @cached_property
    def suggestions(self) -> dict[str, float]:
        """The learning rate by each of valley, steep, minimum and slide (for a band: the median); empty when refused."""
        return {} if self.refusal else _medians(self.results)

    @property
    def outliers(self) -> tuple[str, ...]:
        """Methods whose suggestion is more than a factor 30 from the middle of the four; not to be trusted."""
        return _outliers(self.suggestions)

    def suggestion(self, method: str = "valley") -> float:
        """The learning rate by a method; UserError with the reason when none can be trusted."""
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

    def range(self, method: str = "valley") -> tuple[float, float]:
        """The lowest and the highest suggestion of the seeds; UserError as `suggestion`."""
        self.suggestion(method)
        return self._range(method)

    def _range(self, method: str) -> tuple[float, float]:
        rates = [r.rates[method] for r in self.results if not r.refusal]
        return min(rates), max(rates)

    def _details(self) -> list[str]:
        """Lines of the table between its head and the suggestions."""
        raise NotImplementedError

    def table(self) -> str:
        """The result as plain text."""
        lines = [f"learning rate range test: {self.why}", *self._details()]
        if self.refusal:
            return "\n".join([*lines, f"no suggestion: {self.refusal}"])
        lines.append(f"{'method':<9}  learning rate")
        for name, value in self.suggestions.items():
            line = f"{name:<9}  {_rate(value)}"
            if len(self.results) > 1:
                low, high = self._range(name)
                line = f"{name:<9}  {_rate(value):<9} ({_rate(low)} to {_rate(high)})"
            if name in self.outliers:
                line += f"  not to be trusted: more than a factor {AGREEMENT:.0f} from the middle of the others"
            lines.append(line)
        return "\n".join(lines)

    def plot(self) -> "Figure":
        """Loss by learning rate (for a band: median and spread of the seeds), with the suggestions or the refusal."""
        from jaxcats import plots  # Importing matplotlib takes half a second.

        return plots.lr_find(
            [(r.lrs, r.losses, r.smoothed) for r in self.results],
            suggestions=self.suggestions,
            ranges={name: self._range(name) for name in self.suggestions},
            doubtful=self.outliers,
            refusal=self.refusal,
            skip_start=self.results[0].iterations // 10,
        )

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON."""
        return {"refusal": self.refusal, "suggestions": self.suggestions, "outliers": list(self.outliers)}

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        image = base64.b64encode(self.plot()._repr_png_()).decode()
        return f'<pre>{html.escape(self.table())}</pre><img src="data:image/png;base64,{image}" alt="loss by learning rate">'


@dataclass(frozen=True, eq=False, repr=False)
class LRFindResult(_Suggestions):
    """One range test: what was recorded, where and why it stopped, and the suggestions that follow from it.

    Attributes:
        lrs: float64 [m], learning rate of the last layer group at each iteration that ran.
        losses: float64 [m], raw training losses; the last may be NaN.
        smoothed: float64 [m], their average, as `stats.smooth` computes it.
        iterations: how many were asked for; m is that or less.
        stopped: "end", "diverged" (the smoothed loss passed 4 times its best) or "nan" (or infinite).
    """

    lrs: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    iterations: int
    stopped: str

    def __post_init__(self) -> None:
        for name in ("lrs", "losses", "smoothed"):
            values = np.array(getattr(self, name), np.float64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        if not self.lrs.ndim == 1 or not self.lrs.shape == self.losses.shape == self.smoothed.shape:
            raise ValueError(f"lrs, losses, smoothed: {self.lrs.shape}, {self.losses.shape}, {self.smoothed.shape}")
        if not 0 < len(self.lrs) <= self.iterations or self.stopped not in STOPPED:
            raise ValueError(f"{len(self.lrs)} of {self.iterations} iterations, stopped={self.stopped!r} ({STOPPED})")

    @classmethod
    def of_test(
        cls, lrs: np.ndarray, losses: np.ndarray, averages: np.ndarray, count: Any, reason: Any
    ) -> "LRFindResult":
        """The result of a RangeTest that ran `count` of the len(lrs) iterations."""
        n = int(count)
        return cls(lrs[:n], losses[:n], averages[:n], iterations=len(lrs), stopped=STOPPED[int(reason)])

    @property
    def results(self) -> "tuple[LRFindResult, ...]":
        return (self,)

    @property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Rates and smoothed losses that the rules look at: without the first tenth, the last five, and all from a NaN on."""
        # fastai continues after a NaN (not after an infinite loss), so there the last five are part of the tail; this record
        # ends at the NaN instead.
        goes_on = self.stopped == "nan" and not np.isinf(self.smoothed[-1])
        end = (self.iterations if goes_on else len(self.lrs)) - 5
        part = slice(self.iterations // 10, max(end, 0))
        lrs, losses = self.lrs[part], self.smoothed[part]
        good = int(np.isnan(losses).argmax()) if np.isnan(losses).any() else len(losses)
        return lrs[:good], losses[:good]

    @property
    def why(self) -> str:
        """Where and why the test stopped."""
        if self.stopped == "end":
            return f"ran all {self.iterations} iterations (learning rate {_rate(self.lrs[0])} to {_rate(self.lrs[-1])})"
        reason = "the smoothed loss passed 4 x its best"
        if self.stopped == "nan":
            reason = f"the loss was {'infinite' if np.isinf(self.losses[-1]) else 'not a number'}"
        where = f"iteration {len(self.lrs)} of {self.iterations} (learning rate {_rate(self.lrs[-1])})"
        return f"stopped at {where}: {reason}"

    @cached_property
    def rates(self) -> dict[str, float]:
        """The learning rate by each rule, trusted or not."""
        return {name: rule(*self.points) for name, rule in RULES.items()}

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
            remedy = "more iterations" + ("" if self.stopped == "end" else " or start from a lower learning rate")
            return f"too few points: {len(lrs)} of the {ENOUGH_POINTS} needed; the test {self.why}; ask for {remedy}"
        infinite = np.isinf(smoothed)
        if infinite.sum() > 1:  # One ends a test; with more, slopes are differences of infinities.
            return f"the loss is infinite: from learning rate {_rate(lrs[infinite.argmax()])} on, and the test went on"
        if not fell:
            return "no descent: the loss never fell clearly below its noise; is the model trained already, or frozen?"
        rates = self.rates
        _, low, high, _ = sorted(rates, key=lambda name: rates[name])
        if rates[high] > AGREEMENT * rates[low]:
            return (
                f"the methods disagree: even the middle two, {low} and {high}, are a factor {rates[high] / rates[low]:,.1f} "
                f"apart, more than {AGREEMENT:.0f}; choose from the figure"
            )
        if "valley" in _outliers(rates):
            return (
                f"the methods disagree: the valley ({_rate(rates['valley'])}) is more than a factor {AGREEMENT:.0f} from the "
                f"middle of the four; choose from the figure"
            )
        return None

    def _details(self) -> list[str]:
        best = int(np.nanargmin(self.smoothed)) if np.isfinite(self.smoothed).any() else 0
        return [
            f"smoothed loss: {self.smoothed[0]:.3g} at first, {self.smoothed[best]:.3g} at its lowest "
            f"(learning rate {_rate(self.lrs[best])}), {self.smoothed[-1]:.3g} at last"
        ]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON; NaN is null and an infinite loss the string "inf"."""
        record = {"iterations": self.iterations, "stopped": self.stopped, "why": self.why, **super().to_dict()}
        return record | {name: list(map(_to_json, getattr(self, name))) for name in ("lrs", "losses", "smoothed")}


@dataclass(frozen=True, eq=False, repr=False)
class LRFindBand(_Suggestions):
    """The same range test under several seeds: other initialisations, other orders of the images."""

    results: tuple[LRFindResult, ...]

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("a band needs at least one result")

    @cached_property
    def refusal(self) -> str | None:
        """Why no rate can be suggested: fewer than half of the seeds suggest one."""
        reasons = [r.refusal.split(":")[0] for r in self.results if r.refusal]
        n, answers = len(self.results), len(self.results) - len(reasons)
        if 2 * answers >= n:
            alone = "valley" in _outliers(_medians(self.results))
            return "the methods disagree: the valley stands alone among the medians" if alone else None
        common = max(reasons, key=reasons.count)
        return f"{answers} of {n} seeds give an answer, fewer than half; {reasons.count(common)} times {common}"

    @property
    def why(self) -> str:
        """How many seeds there were, how far they ran, and how many give an answer."""
        answers, ran = sum(not r.refusal for r in self.results), [len(r.lrs) for r in self.results]
        return (
            f"ran {min(ran)} to {max(ran)} of {self.results[0].iterations} iterations under {len(self.results)} seeds, of "
            f"which {answers} give an answer"
        )

    def _details(self) -> list[str]:
        return [f"  seed {i}: {r.refusal}" for i, r in enumerate(self.results) if r.refusal]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON: the summary, and the result of each seed."""
        ranges = {name: list(self._range(name)) for name in self.suggestions}
        return {**super().to_dict(), "ranges": ranges, "seeds": [r.to_dict() for r in self.results]}


def _medians(results: tuple[LRFindResult, ...]) -> dict[str, float]:
    """By each method the median of the results that suggest a rate."""
    answered = [r.rates for r in results if not r.refusal]
    return {name: float(np.median([rates[name] for rates in answered])) for name in RULES}


def _outliers(rates: Mapping[str, float]) -> tuple[str, ...]:
    if not rates:
        return ()
    _, low, high, _ = sorted(rates.values())
    middle = (low * high) ** 0.5
    return tuple(name for name, x in rates.items() if not middle / AGREEMENT <= x <= middle * AGREEMENT)


def _rate(value: float) -> str:
    return f"{value:.2g}"


def _to_json(x: float) -> float | str | None:
    return None if np.isnan(x) else float(x) if np.isfinite(x) else str(float(x))


# --- the rules: from rates [m] and smoothed losses [m] to a learning rate ---


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
    """Iterations (from 1) after which the raw losses had clearly fallen and clearly risen; 0 where they never had.

    A level is the mean of WINDOW batches. It has changed when it is STANDARD_ERRORS from the mean of all batches before it
    (pure noise gets there in 2 to 3 tests of 100) and, for a fall, at least SHARE of it: a smaller fall is of no use.
    """
    losses = losses[: int(np.isfinite(losses).argmin())] if not np.isfinite(losses).all() else losses
    fell = rose = 0
    for end in range(2 * WINDOW, len(losses) + 1):
        before, window = losses[: end - WINDOW], losses[end - WINDOW : end]
        # The deviation from successive differences: neither a slope nor a few outliers move their median.
        noise = 1.4826 / np.sqrt(2) * np.median(np.abs(np.diff(before)))
        error = noise * np.sqrt(1 / WINDOW + 1 / len(before))
        threshold = max(STANDARD_ERRORS * error, SHARE * abs(before.mean()))
        change = window.mean() - before.mean()
        fell = fell or (end if change < -threshold else 0)
        rose = rose or (end if change > threshold else 0)
    return fell, rose
