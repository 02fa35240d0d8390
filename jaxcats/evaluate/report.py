"""report.html: one self-contained page about an evaluated run, which opens from disk and loads nothing from anywhere.

Its text is in templates/report.html.j2.
"""

import csv
import html
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats import plots
from jaxcats.common import stats
from jaxcats.common.config import to_yaml
from jaxcats.common.errors import one_line, unwritable
from jaxcats.common.io import write_text
from jaxcats.data.images import ImageError
from jaxcats.evaluate import figures as run_figures
from jaxcats.evaluate import pages, ranking
from jaxcats.evaluate.figures import EvaluatedSplit
from jaxcats.evaluate.predictions import read_json
from jaxcats.train.epoch_table import overfitting
from jaxcats.train.run_folder import RunLog
from jaxcats.train.user_functions import describe_functions

BUDGET = 5_000_000  # greatest size of a page in bytes, so that it can still be mailed
LARGE, LARGE_SIDE = 48, 300  # images that are kept in a larger size, and its longer side in pixels
LEAST_SURE = 100  # right predictions that are always shown: the least sure ones
MARKUP = 450  # bytes around an image and its names
SUSPECTS = 48  # shown with their image
WIDE = ("reliability", "heat_maps")  # figures that get a row of their own


def write_evaluation(folder: Path, evaluated: EvaluatedSplit) -> None:
    """Draws figures/*.png and writes report.html into a folder; galleries whose images have gone are left out, with a message."""
    curves = run_figures.training_figures(evaluated.run.folder) | run_figures.metric_figures(evaluated)
    photos = {}
    try:
        photos = {"heat_maps": run_figures.heat_maps(evaluated)} | run_figures.galleries(evaluated)
    except (ImageError, OSError) as e:
        print(f"The galleries are not drawn: an image can't be read any more ({e}).", file=sys.stderr)
    try:
        for figures, dpi in ((curves, 120), (photos, 80)):  # at 80 a gallery of photos takes a megabyte
            for name, figure in figures.items():
                plots.write(figure, folder / "figures" / f"{name}.png", dpi=dpi)
        write_text(folder / "report.html", render(evaluated, page_figures(folder, evaluated, curves)))
    except OSError as e:
        raise unwritable(f"{folder}: figures and report", e) from None


def page_figures(folder: Path, evaluated: EvaluatedSplit, curves: Mapping[str, plots.Figure]) -> dict[str, str]:
    """The page's figures by name, each an <svg> element or a data URI; the wide ones last, so that none leaves a gap."""
    run = evaluated.run
    tested = [f"lr_find_{name}" for name, phase in run.config.phases.items() if phase.lr == "auto"]
    files = [run.folder / "figures" / f"{name}.png" for name in tested] + [folder / "figures" / "heat_maps.png"]
    figures = {f.stem: pages.embedded_image(f) for f in files if f.is_file()}
    figures |= {name: plots.to_svg(curve) for name, curve in curves.items()}
    wide = {name: figures.pop(name) for name in WIDE if name in figures}
    return figures | wide


def render(evaluated: EvaluatedSplit, figures: Mapping[str, str] | None = None, *, budget: int = BUDGET) -> str:
    """The page as text of at most `budget` bytes: images that don't fit are left out, and the page says how many.

    An image that can't be read any more is shown by its name and the reason.
    """
    run, metrics = evaluated.run, evaluated.metrics
    epochs = [row for row in RunLog.rows(run.folder / "metrics.jsonl") if "valid_loss" in row]
    suspects = read_suspects(run.folder)
    digits = stats.percent_digits(metrics["n"])
    context = {
        "run": run,
        "metrics": metrics,
        "figures": figures or {},
        "wide": WIDE,
        "data": read_json(run.folder / "data.json"),
        "versions": read_json(run.folder / "versions.json"),
        "artefact": read_json(run.folder / "model" / "model.json"),
        "config": to_yaml(run.config),
        "overfitting": overfitting([row for row in epochs if row.get("phase") == epochs[-1].get("phase")]),
        "suspects": suspects,
        "thumbnails": [pages.embedded_thumbnail(evaluated.split.root / row["path"]) for row in suspects[:SUSPECTS]],
        "result": stats.sentence(metrics["errors"], metrics["n"]).replace(" %", pages.PERCENT),
        "share": lambda value: "–" if value is None else f"{100 * value:.{digits}f}{pages.PERCENT}",
        "number": lambda value: "–" if value is None else f"{value:.4g}",
        "user_functions": describe_functions(run.user_functions) if run.user_functions else "",
        "least_sure": LEAST_SURE,
    }
    without_images = pages.render("report.html.j2", items=[], **context)
    items = list(gallery(evaluated, room=budget - len(without_images.encode())))
    return pages.render("report.html.j2", items=items, **context)


def read_suspects(run_folder: Path) -> list[dict[str, str]]:
    """The rows of suspects.csv; none where it is missing or damaged."""
    try:
        with (run_folder / "suspects.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, csv.Error):
        return []


def gallery(evaluated: EvaluatedSplit, *, room: int) -> Iterator[dict[str, Any]]:
    """Yields the images that fit into `room` bytes: the wrong ones, the least sure and some others; the top losses come first."""
    labels, correct, n = evaluated.split.labels, evaluated.correct, len(evaluated.split)
    log_probs = np.maximum(evaluated.log_probs, -1e6)
    by_loss, by_margin = ranking.top_losses(log_probs, labels, n=n), ranking.most_uncertain(log_probs, n=n)
    wrong, right = by_loss[~correct[by_loss]], by_margin[correct[by_margin]]
    rest = np.random.default_rng(0).permutation(right[LEAST_SURE:])
    shown = thumbnails_that_fit(evaluated, np.concatenate([wrong, right[:LEAST_SURE], rest]).tolist(), room=room)
    threshold = evaluated.metrics["abstain"]["threshold"]
    for i in [row for row in by_loss.tolist() if row in shown]:
        *_, second, highest = np.sort(np.exp(log_probs[i])).tolist()
        yield {
            "path": one_line(evaluated.split.paths[i]),
            "thumbnail": shown[i],
            "actual": labels[i],
            "predicted": log_probs[i].argmax(),
            "confidence": highest,
            "margin": highest - second,
            "loss": -log_probs[i, labels[i]],
            "wrong": not correct[i],
            "abstains": threshold is not None and highest < threshold,
        }


def thumbnails_that_fit(evaluated: EvaluatedSplit, rows: Sequence[int], *, room: int) -> dict[int, tuple[str, str]]:
    """By row, what `embedded_thumbnail` gives for as many images as `room` bytes hold; the first ones are larger."""

    def length(text: str) -> int:
        return len(html.escape(one_line(text)).encode())

    shown: dict[int, tuple[str, str]] = {}
    sides = [LARGE_SIDE] * LARGE + [pages.SIDE] * len(rows)
    around = MARKUP + 2 * max(length(name) for name in evaluated.run.classes)
    files = [evaluated.file(row) for row in rows[: room // around + 1]]  # more can't fit
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for row, (src, reason) in zip(rows, pool.map(pages.embedded_thumbnail, files, sides), strict=False):
            room -= len(src) + 2 * length(evaluated.split.paths[row]) + length(reason) + around
            if room < 0:
                break  # the end of the iterator cancels the images that are not loaded yet
            shown[row] = src, reason
    return shown
