"""What a classifier gets wrong, and how far its confidence can be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from jaxcats.common.stats import percent_digits, wilson_interval
from jaxcats.plots.base import COLOURS, GREY, INK, RIGHT, WRONG, Figure, fit, named_axes, words

MOST_NUMBERS, MOST_NAMES, MOST_PAIRS, MOST_ROWS = 15, 30, 10, 30
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g} %")
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
TICKS = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)


def confusion(matrix: np.ndarray | Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Actual class by row, predicted class by column, errors in a colour of their own.

    The shade is the share of the row's images. That of errors ends at the worst share there is, and its square root
    is drawn, so that one error of a hundred is seen beside ninety-nine right answers. Up to 15 classes have numbers in
    their cells; beyond that the ten most confused pairs are listed beside the matrix; beyond 30 some names only.

    Args:
        matrix: int [C, C].
        classes: C names; long ones lose their middle.
    """
    counts = np.asarray(matrix)
    c = len(counts)
    listed = c > MOST_NUMBERS
    side = min(3.0 + 0.45 * c, 6.2)
    figure = Figure(figsize=(side + 1.2 + (3.4 if listed else 0), side + 0.6), layout="compressed")
    both = figure.subplots(1, 2, width_ratios=(side, 3.0)) if listed else (figure.subplots(), None)
    ax, rows = both[0], counts.sum(1, keepdims=True)
    shares = counts / np.maximum(rows, 1)
    errors = shares * (1 - np.eye(c))
    worst = errors.max()
    opacity = np.where(np.eye(c) > 0, 0.75 * shares, np.sqrt(errors / (worst or 1)))
    opacity = np.where(counts > 0, np.clip(opacity, 0.2, None), 0)
    colour = np.where(np.eye(c)[..., None] > 0, to_rgb(RIGHT), to_rgb(WRONG))
    ax.imshow(np.dstack([colour, opacity]), interpolation="none")
    if not listed:
        _numbers(ax, counts, shares, opacity)
    _class_ticks(ax, classes, side)
    lines = np.arange(c + 1) - 0.5
    if c <= MOST_NAMES:
        ax.set_xticks(lines, minor=True)
        ax.set_yticks(lines, minor=True)
        ax.grid(which="minor", color=GREY, alpha=0.25, linewidth=0.6)
    ax.tick_params(which="both", length=0, colors=INK)
    ax.spines[:].set_color(GREY)
    ax.set_ylabel("actual", color=INK, fontsize=11)
    ax.set_xlabel("predicted", color=INK, fontsize=11)
    end = f"the darkest is {_percent(worst)} of its row" if worst else "none here"
    figure.suptitle(f"blue: right; orange: errors, {end}", fontsize=10, color=INK, x=0.02, ha="left")
    if both[1] is not None:
        _pairs(both[1], counts, classes)
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.{3 if share > 0.01 else 2}g} %"


def _numbers(ax: Axes, counts: np.ndarray, shares: np.ndarray, opacity: np.ndarray) -> None:
    size = (14 if len(counts) <= 4 else 10 if len(counts) <= 10 else 8) * (1 if counts.max() < 1000 else 0.8)
    for (i, j), n in np.ndenumerate(counts):
        if n or len(counts) <= 4:
            text = f"{n:,}" + (f"\n{_percent(float(shares[i, j]))}" if len(counts) <= 4 else "")
            colour = "#ffffff" if opacity[i, j] > 0.8 else INK
            ax.text(j, i, text, ha="center", va="center", color=colour, fontsize=size)


def _class_ticks(ax: Axes, classes: Sequence[str], side: float) -> None:
    """Names at every row and column while they can be read, else at about ten rows, to find one's way by."""
    c = len(classes)
    step = 1 if c <= MOST_NAMES else -(-c // 10)
    size = 10 if c <= 10 else 8
    below = max(1, min(3, int(side / c * 3)))  # lines of a name beside its row
    names = [fit(name, 20, lines=below) for name in classes]
    ax.set_yticks(range(0, c, step), names[::step], parse_math=False, fontsize=size)
    if c <= 4:
        ax.set_xticks(
            range(c), [fit(n, int(2.4 * side * 3 / c), lines=3) for n in classes], parse_math=False, fontsize=size
        )
    elif step == 1:
        ax.set_xticks(range(c), names, parse_math=False, fontsize=size, rotation=90)
    else:
        ax.set_xticks([])


def _pairs(ax: Axes, counts: np.ndarray, classes: Sequence[str]) -> None:
    """The most confused pairs in words."""
    ax.axis("off")
    errors = counts * (1 - np.eye(len(counts), dtype=int))
    pairs = np.count_nonzero(errors)
    found = [
        divmod(int(k), len(counts)) for k in np.argsort(-errors, axis=None, kind="stable")[: min(pairs, MOST_PAIRS)]
    ]
    title = f"the most confused of {pairs:,} pairs" if pairs > len(found) else "confused pairs" if found else ""
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    for k, (i, j) in enumerate(found):
        top = 0.98 - k / MOST_PAIRS
        style = {"transform": ax.transAxes, "va": "top", "fontsize": 9, "parse_math": False}
        ax.text(0.13, top, f"{errors[i, j]:,} ×", ha="right", color=WRONG, weight="bold", **style)
        ax.text(0.17, top, f"{fit(classes[i], 34)}\ntaken for {fit(classes[j], 24)}", color=INK, **style)


def reliability(
    bins: Sequence[Mapping[str, Any]],
    *,
    after: Sequence[Mapping[str, Any]] | None = None,
    ece: float | None = None,
    ece_after: float | None = None,
    confidence: np.ndarray | None = None,
    confidence_after: np.ndarray | None = None,
) -> Figure:
    """How often answers of a given confidence are right, with 95 % intervals, against the line where it is as often as said.

    Where most answers are surer than 95 % both axes are stretched towards 100 % (equal steps from 90 to 99 to 99.9 %);
    the last mark, 100 %, takes all from 99.999 % up.

    Args:
        bins: of equal mass, each {"n", "confidence", "accuracy", "low", "high"}, as `calibration.reliability` gives them.
        after: the same with the temperature, in a panel of its own.
        ece, ece_after: expected calibration errors, 0 to 1.
        confidence, confidence_after: float [N], the answers' probabilities; their histogram stands below.
    """
    if not bins:
        return words("Reliability", "no images to show")
    panels = [("as trained", bins, ece, confidence)]
    if after is not None:
        panels.append(("with the temperature", after, ece_after, confidence_after))
    rows = 1 if confidence is None else 2
    figure = Figure(figsize=(4.2 * len(panels) + 0.4, 3.9 if rows == 1 else 5.1), layout="constrained")
    axes = figure.subplots(rows, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1)[:rows])
    weights = [b["n"] for b in bins]
    middle = bins[int(np.searchsorted(np.cumsum(weights), sum(weights) / 2))]["confidence"]
    stretched = middle > 0.95
    for column, (name, found, error, _) in enumerate(panels):
        title = name if error is None else f"{name}: calibration error {100 * error:.2g} %"
        _bins(axes[0, column], found, stretched=stretched, first=column == 0)
        axes[0, column].set_title(title, fontsize=11, color=INK, loc="left")
        axes[-1, column].set_xlabel("confidence", color=INK)
    if rows == 2:
        _histograms(axes[1], [sure for *_, sure in panels], stretched=stretched)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _place(share: Any, stretched: bool) -> np.ndarray:
    """Where a share stands on an axis."""
    share = np.clip(np.asarray(share, float), 0, 1)
    return -np.log10(np.maximum(1 - share, 1 - TICKS[-1])) if stretched else share


def _bins(ax: Axes, bins: Sequence[Mapping[str, Any]], *, stretched: bool, first: bool) -> None:
    x, y, low, high = (_place([b[k] for b in bins], stretched) for k in ("confidence", "accuracy", "low", "high"))
    named_axes(ax, "", "share that is right" if first else "")
    end = float(_place(1.0, stretched))
    ax.plot([0, end], [0, end], "--", color=GREY, linewidth=1, label="as often as said")
    ax.vlines(x, low, high, color=COLOURS[5], alpha=0.8, linewidth=2)
    ax.plot(x, y, "o", color=COLOURS[0], markersize=6, label="answers, 95 % interval", clip_on=False)
    ax.set(xlim=(0, end), ylim=(0, end))
    ticks = list(TICKS) if stretched else [0, 0.25, 0.5, 0.75, 1]
    labels = [f"{100 * t:g}" for t in ticks[:-1]] + ["100 %"]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(_place(ticks, stretched), labels)


def _histograms(axes: Sequence[Axes], series: Sequence[np.ndarray | None], *, stretched: bool) -> None:
    """Answers by confidence; the axes share their height, in powers of ten where one bar would dwarf the others."""
    end = float(_place(1.0, stretched))
    highest, dwarfed = 1, False
    for ax, confidence in zip(axes, series, strict=True):
        named_axes(ax, "confidence", "answers" if ax is axes[0] else "")
        counts, edges = np.histogram(_place([] if confidence is None else confidence, stretched), 30, range=(0, end))
        ax.stairs(counts, edges, fill=True, color=COLOURS[5], alpha=0.8)
        highest = max(highest, counts.max())
        dwarfed |= counts.max() > 20 * max(np.median(counts[counts > 0]), 1)
    first = axes[0]
    if dwarfed:
        first.set_yscale("log")
        first.yaxis.set_major_locator(LogLocator(numticks=5))
    first.set_ylim(*((0.7, 2 * highest) if dwarfed else (0, 1.1 * highest)))
    if not dwarfed:
        first.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    first.yaxis.set_major_formatter(THOUSANDS)
    first.minorticks_off()


def risk_coverage(
    coverage: np.ndarray | Sequence[float],
    risk: np.ndarray | Sequence[float],
    *,
    n: int | None = None,
    point: tuple[float, float] | None = None,
    max_error: float | None = None,
) -> Figure:
    """How many of the answers given are wrong, by how many are given when the least sure are left out.

    Args:
        coverage: share of the images that are answered, [k], 0 to 1.
        risk: share of those that are wrong, [k].
        n: images in all; with it the 95 % Wilson interval is shaded.
        point: (coverage, risk) at the chosen threshold.
        max_error: the share of errors that it was chosen for.
    """
    order = np.argsort(coverage)
    x, y = np.asarray(coverage, float)[order], np.asarray(risk, float)[order]
    if not len(x):
        return words("Errors among the answers given", "no images to show")
    if len(x) > 1000:  # more than there are dots on a screen
        keep = np.unique(np.linspace(0, len(x) - 1, 1000).astype(int))
        x, y = x[keep], y[keep]
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    ax = named_axes(figure.subplots(), "share of the images that get an answer", "share of the answers that is wrong")
    ax.plot(x, y, "o-" if len(x) < 3 else "-", color=COLOURS[0], linewidth=2, label="errors among the answers")
    top = max(y[-1], max_error or 0, point[1] if point else 0)
    if n is not None:
        given = np.round(x * n).astype(int)
        low, high = zip(*(wilson_interval(round(e * m), m) for e, m in zip(y, given, strict=True)), strict=True)
        ax.fill_between(x, low, high, color=COLOURS[5], alpha=0.3, linewidth=0, label="95 % interval")
        top = max(top, high[-1] / 1.3)
    if max_error is not None:
        label = f"wanted: at most {100 * max_error:.3g} %"
        ax.axhline(max_error, color=COLOURS[1], linestyle="--", linewidth=1.3, label=label)
    if point is not None:
        digits = percent_digits(n or 1)
        label = f"chosen: {100 * point[0]:.{digits}f} % answered, {100 * point[1]:.2g} % of them wrong"
        ring = {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.8}
        ax.plot(*point, "o", linestyle="none", label=label, clip_on=False, zorder=4, **ring)
    start = 0.0 if y[-1] > 0.1 or (point and point[0] < 0.6) else 0.5  # a good network has no more to show below
    ax.set(xlim=(start, 1), ylim=(0, min(1.5 * top, 1.05) or 0.01))
    ax.xaxis.set_major_formatter(PERCENT)
    ax.yaxis.set_major_formatter(PERCENT)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return figure


def per_class(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Recall of each class with its 95 % Wilson interval, the worst first, thirty at most.

    Args:
        rows: each {"class", "n", "recall", "recall_interval": (low, high)}, as `metrics.judge` gives them; a class without
            images has no recall and isn't drawn.
    """
    known = sorted((row for row in rows if row["n"] and row["recall"] is not None), key=lambda row: row["recall"])
    if not known:
        return words("Recall by class", "no images with a known class")
    shown = known[:MOST_ROWS]
    figure = Figure(figsize=(7.6, 1.3 + 0.27 * len(shown)), layout="constrained")
    ax = named_axes(figure.subplots(), "share of the class's images that is found (recall)", "")
    y = np.arange(len(shown))
    low, high = np.array([row["recall_interval"] for row in shown]).T
    ax.hlines(y, low, high, color=COLOURS[5], alpha=0.8, linewidth=3)
    ax.plot([row["recall"] for row in shown], y, "o", color=COLOURS[0], markersize=7, clip_on=False)
    ax.set_yticks(y, [fit(row["class"], 34) for row in shown], parse_math=False, fontsize=9)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    gap = max(1 - low.min(), 1e-6)
    power = 10.0 ** np.floor(np.log10(gap))
    ax.set_xlim(1 - min(1.0, power * next(k for k in (1, 2, 5, 10) if k * power >= 0.999 * gap)), 1)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(PERCENT)
    ax.tick_params(axis="y", length=0, pad=8)  # a dot at either end stands over the edge
    right = ax.secondary_yaxis("right")
    missed = [f"{row['n'] - round(row['recall'] * row['n']):,} of {row['n']:,} missed" for row in shown]
    right.set_yticks(y, missed, fontsize=9)
    right.tick_params(length=0, pad=8, colors=INK)
    right.spines[:].set_visible(False)
    notes = []
    if len(known) > len(shown):
        notes.append(f"the {len(shown)} worst of {len(known):,} classes")
    if len(rows) > len(known):
        notes.append(f"{len(rows) - len(known):,} without images")
    if notes:
        ax.set_title("; ".join(notes), fontsize=10, color=INK, loc="left")
    return figure
