"""Curves of training and of the learning rate range test: losses and learning rates by step, loss by learning rate."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, zip_longest

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from jaxcats.common.stats import smooth
from jaxcats.plots.base import BLUE, GREEN, INK, LIGHT_BLUE, ORANGE, PINK, WRONG, Figure, message_figure, style_axes

GROUP_LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PINK, ":"))
MARKERS = {"valley": (ORANGE, "o"), "steep": (GREEN, "^"), "minimum": ("#a0527f", "s"), "slide": ("#000000", "D")}
PLAIN_NUMBER = StrMethodFormatter("{x:g}")
SKIP_END = 5  # iterations of the range test that are left out at its end, as fastai does


def lr_find(
    runs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    suggestions: Mapping[str, float],
    doubtful: Sequence[str] = (),
    refusal: str | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    skip_start: int = 10,
) -> Figure:
    """Shows loss by learning rate of a range test, or the median and spread of several, with the suggestions.

    Args:
        runs: learning rates, raw losses and smoothed losses of each seed, [m] each; m may differ between seeds.
        suggestions: learning rate by method; empty when there is a refusal.
        doubtful: methods whose suggestion contradicts the others; their labels say so.
        refusal: why there is no suggestion.
        ranges: lowest and highest suggestion of all seeds, by method.
        skip_start: number of iterations that are left out at the start.
    """
    # Arrays [seeds, m], with NaN where a seed has ended or a loss is not finite.
    padded = (np.array([*zip_longest(*series, fillvalue=np.nan)], float).T for series in zip(*runs, strict=True))
    lrs, raw, smoothed = (np.where(np.isfinite(values), values, np.nan) for values in padded)
    shown = np.ones(lrs.shape[1], bool)
    if len(shown) > skip_start + SKIP_END + 1:
        shown[:skip_start] = shown[-SKIP_END:] = False
    # Where fewer than half of the seeds have a loss, the median of the rest would mislead.
    shown &= 2 * np.isfinite(smoothed).sum(0) >= len(runs)
    if not shown.any():
        return message_figure("Learning rate range test", refusal or "no finite loss to show")
    rates, raw, smoothed = np.nanmax(lrs[:, shown], axis=0), raw[:, shown], smoothed[:, shown]
    median = np.nanmedian(smoothed, axis=0)
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    ax = style_axes(figure.subplots(), "learning rate (last layer group)", "training loss")
    if len(runs) == 1:
        ax.plot(rates, raw[0], color=LIGHT_BLUE, alpha=0.7, linewidth=1, label="each batch")
        ax.plot(rates, median, color=BLUE, linewidth=2.2, label="smoothed")
    else:
        spread = np.nanmin(smoothed, axis=0), np.nanmax(smoothed, axis=0)
        ax.fill_between(rates, *spread, color=LIGHT_BLUE, alpha=0.35, linewidth=0, label="lowest to highest")
        ax.plot(rates, median, color=BLUE, linewidth=2.2, label=f"median of {len(runs)} seeds, smoothed")
    ax.set_xscale("log")
    ends = [rates[0], rates[-1], *suggestions.values()]
    ax.set_xlim(min(ends), max(*ends, rates[0] * 1.01))
    # The loss explodes at the end. The figure cuts that off, because it would flatten the valley.
    faint = raw if len(runs) == 1 else smoothed
    start = np.nanmax(smoothed[:, 0]) or np.inf
    high = min(2.5 * start, max(np.nanmax(smoothed), np.nanquantile(faint, 0.95)))
    low = min(np.nanmin(smoothed), np.nanquantile(faint, 0.02), 0.9 * high)  # a flat curve should look flat
    margin = 0.06 * (high - low) or 1.0
    ax.set_ylim(low - margin, high + margin)
    ax.xaxis.set_major_formatter(PLAIN_NUMBER)
    ax.legend(loc="best" if refusal else "lower left", frameon=False, fontsize=9)
    if refusal:
        ax.set_title("\n".join(textwrap.wrap(f"No suggestion: {refusal}", 90)), fontsize=10, color=WRONG, loc="left")
    labels = {name: f"{name}\n{lr:.2g}" for name, lr in suggestions.items()}
    for name, (lowest, highest) in (ranges or {}).items():
        if lowest < highest:
            labels[name] += f"\n({lowest:.2g} to {highest:.2g})"
    for name in doubtful:
        labels[name] += "\n(not trusted)"
    _mark_suggestions(ax, suggestions, labels, rates, median)
    return figure


def _mark_suggestions(
    ax: Axes, suggestions: Mapping[str, float], labels: Mapping[str, str], rates: np.ndarray, losses: np.ndarray
) -> None:
    """Marks the suggestions on the curve and labels them in a row above it, without overlap."""
    left, right = np.log(ax.get_xlim())
    names = sorted(suggestions, key=lambda name: suggestions[name])
    places = [(np.log(suggestions[name]) - left) / (right - left) for name in names]
    for name, place in zip(names, _push_apart(places, 0.2), strict=True):
        lr, (colour, marker) = suggestions[name], MARKERS[name]
        loss = float(np.interp(np.log(lr), np.log(rates), losses))
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.9, "alpha": 0.6, "shrinkB": 0}
        style = {"ha": "center", "va": "bottom", "fontsize": 9, "color": colour, "arrowprops": line}
        ax.annotate(labels[name], (lr, loss), xytext=(place, 1.03), textcoords="axes fraction", **style)
        ax.plot(lr, loss, marker, color=colour, markersize=8, markeredgecolor="white", zorder=4, clip_on=False)


def _push_apart(places: Sequence[float], width: float) -> list[float]:
    """Moves ascending places in 0..1 as little as needed until they are `width` apart."""
    places = list(places)
    for i in range(len(places)):
        places[i] = max(places[i], places[i - 1] + width if i else width / 2)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - width if i + 1 < len(places) else 1 - width / 2)
    return places


def learning_rates(
    rates: Mapping[str, Sequence[float]] | Sequence[float], *, momentum: Sequence[float] | None = None
) -> Figure:
    """Shows the learning rate by iteration, one line per layer group where they differ, and the momentum below.

    Args:
        rates: [m] for all groups, or [m] by name of a group with the last group last.
        momentum: [m].
    """
    groups = rates if isinstance(rates, Mapping) else {"": rates}
    series = {name: np.asarray(values, float) for name, values in groups.items()}
    last = list(series.values())[-1]
    if all(np.array_equal(values, last) for values in series.values()):
        series = {"": last}
    figure = Figure(figsize=(7.6, 3.2 if momentum is None else 5), layout="constrained")
    axes = figure.subplots(1 if momentum is None else 2, 1, sharex=True, squeeze=False)[:, 0]
    ax = style_axes(axes[0], "iteration", "learning rate")
    ax.label_outer()
    for (name, values), (colour, line) in zip(series.items(), cycle(GROUP_LINES), strict=False):
        ax.plot(values, line, color=colour, linewidth=2, label=f"{name} (up to {values.max():.2g})")
    ax.set_ylim(0, None)
    if len(series) > 1:  # the rates of layer groups are factors apart
        ax.set_yscale("log")
        ax.set_ylim(min(values.max() for values in series.values()) / 50, None)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    elif last[0] < last[-1] / 1000:  # a range test
        ax.set_yscale("log")
        ax.set_ylim(last[0] / 2, None)
    ax.yaxis.set_major_formatter(PLAIN_NUMBER)
    if momentum is not None:
        style_axes(axes[1], "iteration", "momentum").plot(np.asarray(momentum, float), color=BLUE, linewidth=2)
    return figure


def losses(
    steps: Sequence[int], train: Sequence[float], ends: Sequence[int], valid: Sequence[float], best: int | None = None
) -> Figure:
    """Shows training loss by step and validation loss by epoch, so that overfitting can be seen.

    Args:
        steps, train: [m], the step and the raw loss of each batch.
        ends, valid: [epochs], the step at which each epoch ended and its validation loss.
        best: the epoch, counted from 0, with the lowest validation loss.
    """
    figure = Figure(figsize=(7.6, 4), layout="constrained")
    ax = style_axes(figure.subplots(), "step", "loss")
    smoothed = smooth(train)
    ax.plot(steps, train, color=LIGHT_BLUE, alpha=0.4, linewidth=0.8)
    ax.plot(steps, smoothed, color=BLUE, linewidth=2.2, label="training, smoothed")
    ax.plot(ends, valid, "o--", color=ORANGE, linewidth=1.5, markersize=6, label="validation, each epoch")
    if best is not None:
        ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK}
        ax.plot(ends[best], valid[best], "o", label=f"best: epoch {best}, {valid[best]:.3g}", **ring)
    values = np.concatenate([valid, smoothed, train])
    values = values[np.isfinite(values)]
    ax.set_ylim(0, 1.06 * float(np.quantile(values, 0.99)) or None if len(values) else 1)
    ax.legend(frameon=False, fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
