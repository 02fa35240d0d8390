"""What training and the range test leave behind: lines by step or by learning rate."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from jaxcats.common.stats import smooth
from jaxcats.plots.base import COLOURS, INK, PLAIN, STYLES, WRONG, Figure, named_axes, set_limits, words

MARKS = {"valley": ("#d55e00", "o"), "steep": ("#009e73", "^"), "minimum": ("#a0527f", "s"), "slide": ("#000000", "D")}


def lr_find(
    runs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    suggestions: Mapping[str, float],
    doubtful: Sequence[str] = (),
    refusal: str | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    skip_start: int = 10,
    skip_end: int = 5,
) -> Figure:
    """Loss by learning rate of one range test, or the median and spread of several, and what follows from it.

    Args:
        runs: per seed (learning rates, raw losses, smoothed losses), each [m]; they may end at different m.
        suggestions: learning rate by method; empty when refused.
        doubtful: methods whose suggestion isn't to be trusted; shown as such.
        refusal: why there is none.
        ranges: lowest and highest of the seeds' suggestions, by method.
        skip_start, skip_end: iterations left out at either end, as fastai does.
    """
    length = max(len(run[0]) for run in runs)
    if length <= skip_start + skip_end + 1:
        skip_start = skip_end = 0  # a short record is better seen whole than not at all
    shown = slice(skip_start, length - skip_end)
    rates = max((run[0] for run in runs), key=len)[shown]
    raw, smoothed = (_rows([run[i][shown] for run in runs], len(rates)) for i in (1, 2))
    kept = 2 * np.isfinite(smoothed).sum(0) >= len(runs)  # a median of the few that got furthest would mislead
    if not kept.any():
        return words("Learning rate range test", refusal or "no finite loss to show")
    rates, raw, smoothed = rates[kept], raw[:, kept], smoothed[:, kept]
    middle = np.nanmedian(smoothed, axis=0)
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    ax = named_axes(figure.subplots(), "learning rate (last layer group)", "training loss")
    faint = raw if len(runs) == 1 else smoothed
    if len(runs) == 1:
        ax.plot(rates, raw[0], color=COLOURS[5], alpha=0.7, linewidth=1, label="each batch")
        ax.plot(rates, middle, color=COLOURS[0], linewidth=2.2, label="smoothed")
    else:
        spread = np.nanmin(smoothed, axis=0), np.nanmax(smoothed, axis=0)
        ax.fill_between(rates, *spread, color=COLOURS[5], alpha=0.35, linewidth=0, label="lowest to highest")
        ax.plot(rates, middle, color=COLOURS[0], linewidth=2.2, label=f"median of {len(runs)} seeds, smoothed")
    ax.set_xscale("log")
    ends = [rates[0], rates[-1], *suggestions.values()]
    ax.set_xlim(min(ends), max(*ends, rates[0] * 1.01))
    start = np.nanmax(smoothed[:, 0]) or np.inf  # a blow-up is cut off above: the valley is what is looked for
    high = min(2.5 * start, max(np.nanmax(smoothed), np.nanquantile(faint, 0.95)))
    set_limits(ax, min(np.nanmin(smoothed), np.nanquantile(faint, 0.02)), high)
    ax.xaxis.set_major_formatter(PLAIN)
    ax.legend(loc="best" if refusal else "lower left", frameon=False, fontsize=9)
    if refusal:
        ax.set_title("\n".join(textwrap.wrap(f"No suggestion: {refusal}", 90)), fontsize=10, color=WRONG, loc="left")
    else:
        _mark(ax, suggestions, ranges or {}, (rates, middle), doubtful)
    return figure


def _mark(
    ax: Axes,
    suggestions: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
    curve: tuple[np.ndarray, ...],
    doubtful: Sequence[str],
) -> None:
    """Suggestions on the curve, each with a line up to its label; labels stand in a row and push each other aside."""
    left, right = np.log(ax.get_xlim())
    names = sorted(suggestions, key=lambda name: suggestions[name])
    spans = {name: ranges[name] for name in names if name in ranges and ranges[name][0] < ranges[name][1]}
    width = 0.2 if spans else 0.14
    wanted = [(math.log(suggestions[name]) - left) / (right - left) for name in names]
    for name, at in zip(names, _spread(wanted, width), strict=True):
        lr, (colour, marker) = suggestions[name], MARKS[name]
        loss = float(np.interp(math.log(lr), np.log(curve[0]), curve[1]))
        text = f"{name}\n{lr:.2g}" + (f"\n({spans[name][0]:.2g} to {spans[name][1]:.2g})" if name in spans else "")
        text += "\n(not trusted)" if name in doubtful else ""
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.9, "alpha": 0.6, "shrinkB": 0}
        style = {"ha": "center", "va": "bottom", "fontsize": 9, "color": colour, "arrowprops": line}
        ax.annotate(text, (lr, loss), xytext=(at, 1.03), textcoords="axes fraction", **style)
        ax.plot(lr, loss, marker, color=colour, markersize=8, markeredgecolor="white", zorder=4, clip_on=False)


def _spread(wanted: Sequence[float], width: float) -> list[float]:
    """Places in 0..1, in order and `width` apart, as near as they can be to the ascending ones wanted."""
    places = list(wanted)
    for i in range(len(places)):
        places[i] = max(places[i], places[i - 1] + width if i else width / 2)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - width if i + 1 < len(places) else 1 - width / 2)
    return places


def learning_rates(
    rates: Mapping[str, Sequence[float]] | Sequence[float], *, momentum: Sequence[float] | None = None
) -> Figure:
    """The learning rate by iteration, a line per layer group where they differ, and the momentum below.

    Args:
        rates: [m] of all groups, or by name of a group, the last group last.
        momentum: [m].
    """
    groups = dict(rates) if isinstance(rates, Mapping) else {"": rates}
    series = {name: np.asarray(values, float) for name, values in groups.items()}
    last = list(series.values())[-1]
    if all(np.array_equal(values, last) for values in series.values()):
        series = {"": last}
    panels = 1 if momentum is None else 2
    figure = Figure(figsize=(7.6, 3.2 if momentum is None else 5), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    ax = named_axes(axes[0], "" if panels == 2 else "iteration", "learning rate")
    for i, (name, values) in enumerate(series.items()):
        ax.plot(values, STYLES[i % 4], color=COLOURS[i % 7], linewidth=2, label=f"{name} (up to {values.max():.2g})")
    _rate_axis(ax, last)
    if len(series) > 1:
        ax.set_yscale("log")  # groups are factors apart
        ax.yaxis.set_major_formatter(PLAIN)  # a new scale brings its own
        ax.set_ylim(min(values.max() for values in series.values()) / 50, None)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    if momentum is not None:
        named_axes(axes[1], "iteration", "momentum").plot(np.asarray(momentum, float), color=COLOURS[0], linewidth=2)
    return figure


def schedules(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Every schedule in a panel of its own, by name: learning rate by iteration, [m] each."""
    columns, rows = min(3, len(curves)), -(-len(curves) // 3)
    figure = Figure(figsize=(3.3 * columns, 2.3 * rows + 0.2), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[len(curves) :]:
        ax.axis("off")
    for i, (ax, (name, values)) in enumerate(zip(axes, curves.items(), strict=False)):
        last = i + columns >= len(curves)
        named_axes(ax, "iteration" if last else "", "learning rate" if i % columns == 0 else "")
        values = np.asarray(values, float)
        ax.plot(values, color=COLOURS[0], linewidth=2)
        ax.set_title("\n".join(textwrap.wrap(name, 34)), fontsize=10, loc="left", color=INK)
        ax.locator_params(nbins=4)
        _rate_axis(ax, values)
    return figure


def losses(
    steps: Sequence[int],
    train: Sequence[float],
    valid_steps: Sequence[int],
    valid: Sequence[float],
    *,
    best: int | None = None,
) -> Figure:
    """Training loss by step, validation loss by epoch, so that overfitting can be seen.

    Args:
        steps, train: [m], raw losses of batches.
        valid_steps, valid: [epochs], at the step where each epoch ended.
        best: which epoch, counted from 0, has the lowest validation loss.
    """
    figure = Figure(figsize=(7.6, 4), layout="constrained")
    ax = named_axes(figure.subplots(), "step", "loss")
    smoothed = smooth(train)
    ax.plot(steps, train, color=COLOURS[5], alpha=0.4, linewidth=0.8)
    ax.plot(steps, smoothed, color=COLOURS[0], linewidth=2.2, label="training, smoothed")
    ax.plot(valid_steps, valid, "o--", color=COLOURS[1], linewidth=1.5, markersize=6, label="validation, each epoch")
    if best is not None:
        at = valid_steps[best], valid[best]
        ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK}
        ax.plot(*at, "o", label=f"best: epoch {best}, {valid[best]:.3g}", **ring)
    seen = np.concatenate([valid, smoothed, train])
    seen = seen[np.isfinite(seen)]
    set_limits(ax, 0, float(np.quantile(seen, 0.99)) if len(seen) else 1)
    ax.legend(frameon=False, fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _rate_axis(ax: Axes, values: np.ndarray) -> None:
    if values.min() > 0 and np.median(values) < values.max() / 1000:
        ax.set_yscale("log")  # lr_find's range, of which a plain axis shows the end only
    else:
        ax.set_ylim(0, None)
    ax.yaxis.set_major_formatter(PLAIN)


def _rows(values: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Series of unlike lengths as one array [runs, length], NaN where one has ended or is not finite."""
    rows = np.full((len(values), length), np.nan)
    for row, part in zip(rows, values, strict=True):
        row[: len(part)] = np.where(np.isfinite(part), part, np.nan)
    return rows
