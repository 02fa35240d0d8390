"""Figures of an evaluated split: confusion matrix, recall by class, reliability diagram, risk against coverage."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, StrMethodFormatter

from jaxcats.common.stats import percent_digits, wilson_interval
from jaxcats.plots.base import BLUE, GREY, INK, LIGHT_BLUE, ORANGE, RIGHT, WRONG, Figure, fit, style_axes

MOST_NUMBERS, MOST_NAMES, MOST_ROWS = 15, 30, 30
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g} %")
THOUSANDS = StrMethodFormatter("{x:,.0f}")
# Ticks of an axis that is stretched towards 100 %.
STRETCHED_TICKS = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)


def confusion(matrix: Sequence[Sequence[int]] | np.ndarray, classes: Sequence[str]) -> Figure:
    """Shows the confusion matrix: a row per actual class, a column per predicted class, errors in another colour.

    The shade is the cell's share of its row. For errors it is the square root of that share, relative to the largest
    share, so that one error in a hundred images is visible. Up to 15 classes have numbers in their cells; with more
    than 30, only some rows have names.

    Args:
        matrix: int [C, C].
        classes: C names; long ones are shortened.
    """
    counts, c = np.asarray(matrix), len(matrix)
    diagonal = np.eye(c, dtype=bool)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    worst = shares[~diagonal].max(initial=0)
    opacity = np.where(diagonal, 0.75 * shares, np.sqrt(shares / (worst or 1)))
    opacity = np.where(counts > 0, np.clip(opacity, 0.2, None), 0)
    colour = np.where(diagonal[..., None], to_rgb(RIGHT), to_rgb(WRONG))

    side = min(3.0 + 0.45 * c, 6.2)
    figure = Figure(figsize=(side + 1.2, side + 0.6), layout="compressed")
    ax = figure.subplots()
    ax.imshow(np.dstack([colour, opacity]), interpolation="none")
    few, step = c <= 4, 1 if c <= MOST_NAMES else -(-c // 10)
    size = (14 if few else 10 if c <= 10 else 8) * (0.8 if counts.max() >= 1000 else 1)
    for (i, j), n in np.ndenumerate(counts):
        if few or (n and c <= MOST_NUMBERS):
            text = f"{n:,}\n{100 * shares[i, j]:.3g} %" if few else f"{n:,}"
            ink = "#ffffff" if opacity[i, j] > 0.8 else INK
            ax.text(j, i, text, ha="center", va="center", color=ink, fontsize=size)
    names = [fit(name, int(7.2 * side / c) if few else 20, lines=3 if few else 1) for name in classes]
    style = {"parse_math": False, "fontsize": 10 if c <= 10 else 8}
    ax.set_xticks(range(0, c, step), names[::step], rotation=0 if few else 90, **style)
    ax.set_yticks(range(0, c, step), names[::step], **style)
    if c <= MOST_NAMES:
        ax.set_xticks(np.arange(c + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(c + 1) - 0.5, minor=True)
        ax.grid(which="minor", color=GREY, alpha=0.25, linewidth=0.6)
    ax.tick_params(which="both", length=0, colors=INK)
    ax.spines[:].set_color(GREY)
    ax.set_ylabel("actual", color=INK, fontsize=11)
    ax.set_xlabel("predicted", color=INK, fontsize=11)
    note = f"the darkest is {100 * worst:.3g} % of its row" if worst else "none here"
    figure.suptitle(f"blue: right; orange: errors, {note}", fontsize=10, color=INK, x=0.02, ha="left")
    return figure


def reliability(panels: Mapping[str, tuple[Sequence[Mapping[str, Any]], float, np.ndarray]]) -> Figure:
    """Shows accuracy by confidence with 95 % intervals, a panel for each calibration, and histograms below.

    Where most confidences are above 95 % both axes are stretched towards 100 % (equal steps from 90 to 99 to 99.9 %);
    the last tick, 100 %, stands for everything above 99.999 %.

    Args:
        panels: by title (bins, ece, confidence): bins of equal mass, each {"n", "confidence", "accuracy", "low", "high"},
            as from `calibration.reliability`; the expected calibration error, 0 to 1; the probabilities of the
            predictions, float [N].
    """
    figure = Figure(figsize=(4.2 * len(panels) + 0.4, 5.1), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    _, _, first_confidence = next(iter(panels.values()))
    stretched = bool(np.median(first_confidence) > 0.95)
    end = float(_position(1.0, stretched))
    ticks = STRETCHED_TICKS if stretched else (0, 0.25, 0.5, 0.75, 1)
    labels = [f"{100 * t:g}" for t in ticks[:-1]] + ["100 %"]
    for (top, bottom), (title, (bins, ece, confidence)) in zip(axes.T, panels.items(), strict=True):
        style_axes(top, "", "share that is right").label_outer()
        top.set_title(f"{title}: calibration error {100 * ece:.2g} %", fontsize=11, color=INK, loc="left")
        keys = "confidence", "accuracy", "low", "high"
        x, y, low, high = (_position([row[key] for row in bins], stretched) for key in keys)
        top.plot([0, end], [0, end], "--", color=GREY, linewidth=1, label="perfectly calibrated")
        top.vlines(x, low, high, color=LIGHT_BLUE, alpha=0.8, linewidth=2)
        top.plot(x, y, "o", color=BLUE, markersize=6, label="predictions, 95 % interval", clip_on=False)
        top.set(xlim=(0, end), ylim=(0, end))
        top.set_xticks(_position(ticks, stretched), labels)
        top.set_yticks(_position(ticks, stretched), labels)
        style_axes(bottom, "confidence", "predictions").label_outer()
        counts, edges = np.histogram(_position(confidence, stretched), 30, range=(0, end))
        bottom.stairs(counts, edges, fill=True, color=LIGHT_BLUE, alpha=0.8)
        bottom.set_yscale("log")  # one bar often dwarfs the others
        bottom.set_ylim(0.7, None)
    axes[1, 0].yaxis.set_major_locator(LogLocator(numticks=5))
    axes[1, 0].yaxis.set_major_formatter(THOUSANDS)
    axes[1, 0].minorticks_off()
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _position(share: Any, stretched: bool) -> np.ndarray:
    """The position of a share on an axis: the share itself, or its number of nines on a stretched axis."""
    share = np.clip(np.asarray(share, float), 0, 1)
    return -np.log10(np.maximum(1 - share, 1 - STRETCHED_TICKS[-1])) if stretched else share


def risk_coverage(
    coverage: np.ndarray, risk: np.ndarray, *, n: int, max_error: float, point: tuple[float, float] | None = None
) -> Figure:
    """Shows the error rate of the accepted predictions by coverage, when the least confident are left out.

    Args:
        coverage: share of the images whose prediction is accepted, [k], ascending, 0 to 1.
        risk: share of the accepted predictions that is wrong, [k].
        n: number of images, for the 95 % Wilson interval.
        max_error: the error rate that the threshold was chosen for.
        point: (coverage, risk) at the chosen threshold; None where no threshold reaches `max_error`.
    """
    shown = np.linspace(0, len(risk) - 1, min(len(risk), 1000)).astype(int)  # a screen has no more pixels
    x, y = coverage[shown], risk[shown]
    accepted = np.round(x * n).astype(int)
    low, high = zip(*(wilson_interval(round(e * m), m) for e, m in zip(y, accepted, strict=True)), strict=True)
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    ax = style_axes(
        figure.subplots(), "share of the images that get a prediction", "share of these predictions that is wrong"
    )
    ax.plot(x, y, "o-" if len(x) < 3 else "-", color=BLUE, linewidth=2, label="errors among the predictions")
    ax.fill_between(x, low, high, color=LIGHT_BLUE, alpha=0.3, linewidth=0, label="95 % interval")
    ax.axhline(max_error, color=ORANGE, linestyle="--", linewidth=1.3, label=f"wanted: at most {100 * max_error:.3g} %")
    top = max(y[-1], max_error, high[-1] / 1.3)
    if point is not None:
        label = f"chosen: {100 * point[0]:.{percent_digits(n)}f} % predicted, {100 * point[1]:.2g} % of them wrong"
        ring = {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.8}
        ax.plot(*point, "o", linestyle="none", label=label, clip_on=False, zorder=4, **ring)
        top = max(top, point[1])
    ax.set(xlim=(0, 1), ylim=(0, min(1.5 * top, 1.05) or 0.01))
    ax.xaxis.set_major_formatter(PERCENT)
    ax.yaxis.set_major_formatter(PERCENT)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return figure


def per_class(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Shows the recall of each class with its 95 % Wilson interval, the worst first, at most thirty.

    Args:
        rows: each {"class", "n", "recall", "recall_interval": (low, high)}, as in metrics.json; a class without images
            has no recall and is left out.
    """
    known = sorted((row for row in rows if row["recall"] is not None), key=lambda row: row["recall"])
    shown = known[:MOST_ROWS]
    figure = Figure(figsize=(7.6, 1.3 + 0.27 * len(shown)), layout="constrained")
    ax = style_axes(figure.subplots(), "share of the class's images that is predicted right (recall)", "")
    y = np.arange(len(shown))
    low, high = np.array([row["recall_interval"] for row in shown]).T
    ax.hlines(y, low, high, color=LIGHT_BLUE, alpha=0.8, linewidth=3)
    ax.plot([row["recall"] for row in shown], y, "o", color=BLUE, markersize=7, clip_on=False)
    ax.set_yticks(y, [fit(row["class"], 34) for row in shown], parse_math=False, fontsize=9)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    ax.set_xlim(max(0.0, locator.tick_values(low.min(), 1)[0]), 1)
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(PERCENT)
    ax.tick_params(axis="y", length=0, pad=8)  # room for a dot on the edge
    for place, row in enumerate(shown):
        missed = f"{row['n'] - round(row['recall'] * row['n']):,} of {row['n']:,} missed"
        ax.annotate(missed, (1, place), (10, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
    note = f"{len(shown)} of the {len(known):,} classes with images, worst first"
    ax.set_title(note, fontsize=10, color=INK, loc="left")
    return figure
