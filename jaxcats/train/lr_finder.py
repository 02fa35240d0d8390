"""lr_find: the learning rate range test of a phase, its curve, its suggestions, and why there may be none.

`find_lr` runs the test from given weights, or for several fresh heads at once. The test is Smith's (WACV 2017);
the smoothing, the points and the four rules are those of fastai 2.8 (fastai.callback.schedule), number for number, in
float32 as there (tests/golden/lr_find.json). The reasons not to trust them are ours.
"""

import base64
import contextlib
import html
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxcats.common.compile_cache import jit
from jaxcats.common.errors import UserError
from jaxcats.common.io import write_bytes, write_json
from jaxcats.core import scan
from jaxcats.core.schedules import Schedule, constant, exponential
from jaxcats.train.drivers import resident_arrays, scans, streamed
from jaxcats.train.experiment import Experiment, PhasePlan, make_phase, stable_number

if TYPE_CHECKING:
    from jaxcats.plots import Figure

IMAGE_CHUNK = 10  # iterations per program when the batches are images; bounds the memory
STOPPED = ("end", "diverged", "nan")  # by the reason of core.scan.RangeTest
ENOUGH_POINTS = 16  # The slide rule compares slopes 15 steps apart; with fewer points fastai raises IndexError.
# Rules that differ by more than this factor look at different parts of the curve. The lowest or highest of the four may do so:
# one noisy batch misleads `steep` or `slide` on curves that are otherwise good (8 of 8 on real photos).
AGREEMENT = 30.0
WINDOW, STANDARD_ERRORS, SHARE = 10, 4.0, 0.01  # see `changes`


# --- running the test ---


@dataclass(frozen=True)
class Sweep:
    """The settings of a range test; the defaults are fastai v2's. Impossible values raise UserError.

    Attributes:
        start: first learning rate.
        end: the rate after the last iteration would be this: `start (end / start)^(i / iterations)`.
        iterations: number of batches; the dataset is repeated where it has fewer.
        seeds: more than one: this number of fresh heads, each with its own initialisation, order and dropout, in one
            program; it needs features.
    """

    start: float = 1e-7
    end: float = 10.0
    iterations: int = 100
    seeds: int = 1

    def __post_init__(self) -> None:
        counts = all(isinstance(n, int) and n >= 1 for n in (self.iterations, self.seeds))
        if not counts or not 0 < self.start < self.end < float("inf"):
            raise UserError(
                f"lr_find: {self} can't be used; expected 0 < start < end, and whole numbers from 1 as iterations and seeds."
            )


def find_lr(
    experiment: Experiment,
    plan: PhasePlan,
    weights: tuple[Any, Any],
    features: np.ndarray | None,
    sweep: Sweep = Sweep(),
) -> "LRFindResult":
    """Trains a copy for a while under a learning rate that grows, and records the losses.

    Args:
        experiment: what all phases share.
        plan: the phase to find a rate for. Three rates keep their ratios; the reported one is that of the last group.
        weights: (params, batch_stats) where it starts; unchanged afterwards, bit for bit.
        features: float32 [n, F] of the training images, with precompute.
        sweep: the rates to go through, and how often.

    Raises:
        UserError: several seeds without features, or a phase without a rate for its last layer group.
    """
    if features is None and sweep.seeds > 1:
        raise UserError("seeds: several at once need cached features; set precompute: true, or use seeds 1.")
    if features is not None:  # The step does not need the backbone, and without it there is less to carry.
        weights = ({"backbone": {}, "head": weights[0]["head"]}, {"backbone": {}, "head": weights[1]["head"]})
    rates = group_rates(plan, sweep)
    lrs = np.asarray(jax.vmap(rates[-1])(np.arange(sweep.iterations)), np.float64)
    first = experiment.config.seed
    seeds = range(first, first + sweep.seeds)
    orders = [cycled_order(experiment, plan, sweep.iterations, seed=seed) for seed in seeds]
    if sweep.seeds == 1:
        tests = [_test_weights(experiment, plan, weights, features, rates, orders[0])]
    else:
        tests = zip(*_test_fresh_heads(experiment, plan, weights, features, rates, orders, seeds), strict=True)
    curves = []
    for losses, averages, count, reason in tests:
        arrays = [np.asarray(values[: int(count)], np.float64) for values in (lrs, losses, averages)]
        curves.append(Curve(*arrays, iterations=sweep.iterations, stopped=STOPPED[int(reason)]))
    return LRFindResult(tuple(curves))


def _test_weights(
    experiment: Experiment,
    plan: PhasePlan,
    weights: tuple[Any, Any],
    features: np.ndarray | None,
    rates: list[Schedule],
    order: np.ndarray,
) -> tuple[Any, ...]:
    """(losses, averages, count, reason) of one range test from given weights, a chunk at a time."""
    train_step, create_state = make_phase(experiment, plan, rates=rates, params=weights[0])
    run = jit(scan.make_range_test(train_step, iterations=len(order)), convolutions=features is None)
    test = scan.begin_range_test(create_state(*weights))
    outputs = []
    for arrays, rows in chunks(experiment, plan, order, features):
        test, losses_and_averages = run(test, arrays, rows)
        outputs.append(jax.device_get(losses_and_averages))
        if int(test.reason):
            break
    losses, averages = np.concatenate(outputs, axis=1)
    return losses, averages, test.count, test.reason


def _test_fresh_heads(
    experiment: Experiment,
    plan: PhasePlan,
    weights: tuple[Any, Any],
    features: np.ndarray | None,
    rates: list[Schedule],
    orders: list[np.ndarray],
    seeds: range,
) -> tuple[Any, ...]:
    """(losses, averages, count, reason), each with an axis of seeds, of a range test for each of several new heads."""

    def run_seed(seed: jax.Array, arrays: dict[str, jax.Array], order: jax.Array):
        key = jax.random.key(seed)
        init_key = jax.random.split(jax.random.fold_in(key, stable_number("init")))[1]
        heads = experiment.model.init_head(init_key)
        train_step, create_state = make_phase(experiment, plan, key=key, rates=rates, params=weights[0])
        state = create_state(*(tree | {"head": head} for tree, head in zip(weights, heads, strict=True)))
        run = scan.make_range_test(train_step, iterations=len(orders[0]))
        test, (losses, averages) = run(scan.begin_range_test(state), arrays, order)
        return losses, averages, test.count, test.reason

    run_seeds = jax.jit(jax.vmap(run_seed, in_axes=(0, None, 0)))
    arrays = resident_arrays(experiment, plan, features)
    return jax.device_get(run_seeds(np.arange(seeds.start, seeds.stop), arrays, np.stack(orders)))


def group_rates(plan: PhasePlan, sweep: Sweep) -> list[Schedule]:
    """An exponential rate for each layer group, in the ratios of the phase; the last group goes from `start` to `end`."""
    lrs = (1.0, 1.0, 1.0) if plan.phase.lr == "auto" else plan.phase.lrs
    if not lrs[-1]:
        raise UserError(f"lr_find: the rate of the last layer group is 0 in {lrs}; set it above 0.")
    ratios = [lr / lrs[-1] for lr in lrs]
    return [exponential(sweep.start * r, sweep.end * r, sweep.iterations) if r else constant(0.0) for r in ratios]


def cycled_order(experiment: Experiment, plan: PhasePlan, iterations: int, *, seed: int) -> np.ndarray:
    """Rows of each iteration, int32 [iterations, B]: epoch after epoch, as training would see them."""
    n, first = len(experiment.index.splits["train"]), plan.first_epoch
    epochs = range(first, first - (-iterations // plan.steps_per_epoch))
    orders = [scan.epoch_order(n, batch_size=plan.phase.batch_size, seed=seed, epoch=epoch) for epoch in epochs]
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
        while parts := list(islice(batches, IMAGE_CHUNK)):
            yield {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}, rows


def write_lr_find(folder: Path, result: "LRFindResult", *, name: str = "lr_find") -> list[Path]:
    """Writes NAME.json and figures/NAME.png into a folder; returns their paths."""
    image = io.BytesIO()
    result.plot().savefig(image, format="png", dpi=120)
    files = [folder / f"{name}.json", folder / "figures" / f"{name}.png"]
    write_json(files[0], result.to_dict())
    write_bytes(files[1], image.getvalue())
    return files


# --- its result ---


@dataclass(frozen=True, eq=False)
class Curve:
    """One range test: what was recorded, where and why it stopped, and the rates that the rules read off it.

    Attributes:
        lrs: float64 [m], learning rate of the last layer group at each iteration that ran.
        losses: float64 [m], raw training losses; the last may be NaN.
        smoothed: float64 [m], their average, as `stats.smooth` computes it.
        iterations: the number of iterations requested; m is at most this.
        stopped: "end", "diverged" (the smoothed loss passed 4 times its best) or "nan" (or infinite).
    """

    lrs: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    iterations: int
    stopped: str

    @property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Rates and smoothed losses that the rules look at: without the first tenth, the last five, and all from a NaN on."""
        # fastai continues after a NaN (not after an infinite loss), so there the last five are part of the tail; this record
        # ends at the NaN instead.
        goes_on = self.stopped == "nan" and not np.isinf(self.smoothed[-1])
        end = (self.iterations if goes_on else len(self.lrs)) - 5
        part = slice(self.iterations // 10, max(end, 0))
        good = np.logical_and.accumulate(~np.isnan(self.smoothed[part]))
        return self.lrs[part][good], self.smoothed[part][good]

    @property
    def why(self) -> str:
        """Where and why the test stopped."""
        if self.stopped == "end":
            return f"ran all {self.iterations} iterations (learning rate {self.lrs[0]:.2g} to {self.lrs[-1]:.2g})"
        reason = "the smoothed loss passed 4 x its best"
        if self.stopped == "nan":
            reason = f"the loss was {'infinite' if np.isinf(self.losses[-1]) else 'not a number'}"
        return f"stopped at iteration {len(self.lrs)} of {self.iterations} (learning rate {self.lrs[-1]:.2g}): {reason}"

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
            needed = f"{len(lrs)} of the {ENOUGH_POINTS} needed"
            return f"too few points: {needed}; the test {self.why}; ask for more iterations or a lower start"
        infinite = np.isinf(smoothed)
        if infinite.sum() > 1:  # One infinite loss ends a test; with more, slopes would be differences of infinities.
            return f"the loss is infinite: from learning rate {lrs[infinite.argmax()]:.2g} on, and the test continued"
        if not fell:
            return "no descent: the loss never fell clearly below its noise; is the model trained already, or frozen?"
        return disagreement(self.rates)


@dataclass(frozen=True, eq=False, repr=False)
class LRFindResult:
    """One range test, or a band: the same test under several seeds (other initialisations, other orders of the images)."""

    curves: tuple[Curve, ...]

    @cached_property
    def trusted(self) -> list[dict[str, float]]:
        """The rates of each test that suggests any."""
        return [curve.rates for curve in self.curves if not curve.refusal]

    @cached_property
    def refusal(self) -> str | None:
        """Why no rate can be suggested: the test suggests none, or fewer than half of the seeds do, or they disagree."""
        refusals = [curve.refusal for curve in self.curves if curve.refusal]
        if len(refusals) <= len(self.trusted):
            return disagreement(self._medians())
        if len(self.curves) == 1:
            return refusals[0]
        [(reason, times)] = Counter(refusal.split(":")[0] for refusal in refusals).most_common(1)
        answers = f"{len(self.trusted)} of {len(self.curves)} seeds give a rate, fewer than half"
        return f"{answers}; {times} times {reason}"

    def _medians(self) -> dict[str, float]:
        return {name: float(np.median([rates[name] for rates in self.trusted])) for name in RULES}

    @property
    def suggestions(self) -> dict[str, float]:
        """The learning rate by each of valley, steep, minimum and slide (for a band: the median); empty when refused."""
        return {} if self.refusal else self._medians()

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The lowest and the highest suggestion of the seeds by each method; empty when refused."""
        values = {name: [rates[name] for rates in self.trusted] for name in self.suggestions}
        return {name: (min(rates), max(rates)) for name, rates in values.items()}

    @property
    def outliers(self) -> tuple[str, ...]:
        """Methods whose suggestion is more than a factor 30 from the middle of the four; not to be trusted."""
        return outliers(self.suggestions) if self.suggestions else ()

    def suggestion(self, method: str = "valley") -> float:
        """The learning rate by a method; UserError with the reason when none can be trusted."""
        if method not in RULES:
            raise UserError(f"method {method!r} is not one of {', '.join(RULES)}.")
        if self.refusal:
            raise UserError(f"lr_find has no trustworthy rate: {self.refusal}")
        if method in self.outliers:
            middle = f"more than a factor {AGREEMENT:.0f} from the middle of the four"
            raise UserError(
                f"lr_find has no trustworthy rate by {method}: its rate is {middle}; choose another method."
            )
        return self.suggestions[method]

    @property
    def why(self) -> str:
        """Where and why the test stopped; of a band, how far its tests ran and how many give a rate."""
        if len(self.curves) == 1:
            return self.curves[0].why
        lengths = [len(curve.lrs) for curve in self.curves]
        ran = f"ran {min(lengths)} to {max(lengths)} of {self.curves[0].iterations} iterations"
        return f"{ran} under {len(self.curves)} seeds, of which {len(self.trusted)} give a rate"

    def table(self) -> str:
        """The result as plain text."""
        band = len(self.curves) > 1
        lines = [f"learning rate range test: {self.why}"]
        if band:
            lines += [f"  seed {i}: {curve.refusal}" for i, curve in enumerate(self.curves) if curve.refusal]
        if self.refusal:
            return "\n".join([*lines, f"no suggestion: {self.refusal}"])
        lines.append(f"{'method':<9}  learning rate")
        for name, (low, high) in self.ranges.items():
            line = f"{name:<9}  {self.suggestions[name]:<9.2g}"
            if band:
                line += f" ({low:.2g} to {high:.2g})"
            if name in self.outliers:
                line += f"  not to be trusted: more than a factor {AGREEMENT:.0f} from the middle of the others"
            lines.append(line.rstrip())
        return "\n".join(lines)

    def plot(self) -> "Figure":
        """Loss by learning rate (for a band: median and spread of the seeds), with the suggestions or the refusal."""
        from jaxcats import plots  # Importing matplotlib takes half a second.

        return plots.lr_find(
            [(curve.lrs, curve.losses, curve.smoothed) for curve in self.curves],
            suggestions=self.suggestions,
            ranges=self.ranges,
            doubtful=self.outliers,
            refusal=self.refusal,
            skip_start=self.curves[0].iterations // 10,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, a band with the result of each seed; NaN is null and an infinite loss the string "inf"."""
        summary = {"refusal": self.refusal, "suggestions": self.suggestions, "outliers": list(self.outliers)}
        first, *others = self.curves
        if others:
            seeds = [LRFindResult((curve,)).to_dict() for curve in self.curves]
            return {**summary, "ranges": self.ranges, "seeds": seeds}
        series = {name: [*map(_to_json, getattr(first, name))] for name in ("lrs", "losses", "smoothed")}
        return {"iterations": first.iterations, "stopped": first.stopped, "why": first.why, **summary, **series}

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        image = base64.b64encode(self.plot()._repr_png_()).decode()
        return f'<pre>{html.escape(self.table())}</pre><img src="data:image/png;base64,{image}" alt="loss by learning rate">'


def disagreement(rates: Mapping[str, float]) -> str | None:
    """Why the rates of the four rules contradict each other, in one line; None when they agree."""
    _, low, high, _ = sorted(rates.values())
    if high > AGREEMENT * low:
        return f"the methods disagree: even the middle two are a factor {high / low:,.1f} apart; choose from the figure"
    if "valley" in outliers(rates):
        valley_rate = f"the valley ({rates['valley']:.2g}) is more than a factor {AGREEMENT:.0f} from the middle"
        return f"the methods disagree: {valley_rate} of the four; choose from the figure"
    return None


def outliers(rates: Mapping[str, float]) -> tuple[str, ...]:
    """The rules whose rate is more than a factor AGREEMENT from the middle of the four."""
    _, low, high, _ = sorted(rates.values())
    middle = (low * high) ** 0.5
    return tuple(name for name, x in rates.items() if not middle / AGREEMENT <= x <= middle * AGREEMENT)


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

    Slopes are losses by step (Gugger's rule in fastai); it needs ENOUGH_POINTS.
    """
    with np.errstate(invalid="ignore"):
        slope = np.gradient(np.asarray(losses, np.float32))
    right, left = len(losses) - 1, len(losses) - 16
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
    losses = losses[np.logical_and.accumulate(np.isfinite(losses))]
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
