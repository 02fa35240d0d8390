"""What a learning rate range test (`lr_find`) found: its curve, its suggestions, and why there may be none.

The test is Smith's (WACV 2017), the smoothing, the points and the four rules are those of fastai 2.8, number for number
(tests/golden/lr_find.json); when not to trust them is ours.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcats.errors import UserError, nearest
from jaxcats.results.lr_rules import RULES, changes, minimum, slide, smooth, steep, valley

if TYPE_CHECKING:
    from jaxcats.results.plots import Figure

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
        from jaxcats.results import plots  # matplotlib takes half a second to import

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
        picture = base64.b64encode(self.plot()._repr_png_()).decode()
        return f'<pre>{html.escape(self.table())}</pre><img src="data:image/png;base64,{picture}" alt="loss by learning rate">'


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
    """The same range test under several seeds (other initialisation, other order of the pictures)."""

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
