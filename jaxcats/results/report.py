"""The page: one self-contained HTML file about a run, which opens from disk and asks nobody for anything."""

import base64
import hashlib
import html
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from jaxcats.data.preprocess import PictureError, open_picture, open_upright, upright
from jaxcats.results import metrics
from jaxcats.storage.atomic import write_text

BUDGET = 5_000_000  # bytes of a page: what still goes through mail
SIDE, LARGE_SIDE = 110, 224  # shorter side of a picture in the gallery, in pixels
QUALITY = 60  # of the gallery's WebP
LARGE = 48  # pictures kept in the larger size: the wrong ones, then the least sure
LEAST_SURE = 100  # right but least sure ones that are always shown, however many pictures there are
MARKUP = 450  # bytes around a picture and its names
WIDEST = 3  # longer side of a gallery picture, in shorter sides; what is beyond is cut off
SUSPECTS = 48  # shown with their picture
PERCENT = "\N{NO-BREAK SPACE}%"
LARGEST_FIGURE = (1800, 9000)  # in pixels; of figures that come as pictures


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures that were judged.

    Attributes:
        root: the folder that `paths` are relative to.
        paths: N of them.
        labels: int [N], all known.
        log_probs: float [N, C], as predict says them: after the temperature.
        threshold: of the probability below which the classifier abstains; None: it never does.
    """

    root: Path
    paths: Sequence[str]
    labels: np.ndarray
    log_probs: np.ndarray
    threshold: float | None = None


@dataclass(frozen=True)
class Figure:
    """One figure: `image` is an <svg> element from plots.to_svg (it goes into the page as it is) or a picture file's content.

    `caption` is a sentence that says how to read it, `alt` what it shows to someone who can't see it; a `wide` one gets
    a row of its own.
    """

    id: str
    title: str
    caption: str
    alt: str
    image: str | bytes
    wide: bool = False


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page says.

    Attributes:
        title: its heading.
        classes: names, in the order of the labels.
        trained: what was trained on what, name to text.
        found: metrics.json's content (see metrics.judge); only "n" and "errors" must be there.
        pictures: for the gallery.
        notes: what to worry about, the gravest first: ("serious" | "caution" | "note", a sentence).
        figures: in order.
        findings: about the data, {"what", "count", "examples", "meaning", "grave"} each (see data.findings).
        suspects: likely label errors, {"path", "label", "suggested", "reason"} each, the likeliest first; reason "label"
            (another class fits better), "outlier" (unlike others) or "label, outlier".
        config: YAML.
        facts: versions and hashes, name to text.
        commands: what one may want to do next, to the command that does it.
    """

    title: str
    classes: Sequence[str]
    trained: Mapping[str, str]
    found: Mapping[str, Any]
    pictures: Pictures
    notes: Sequence[tuple[Literal["serious", "caution", "note"], str]] = ()
    figures: Sequence[Figure] = ()
    findings: Sequence[Mapping[str, Any]] = ()
    suspects: Sequence[Mapping[str, Any]] = ()
    config: str = ""
    facts: Mapping[str, str] | None = None
    commands: Mapping[str, str] | None = None


def write_report(path: Path, report: Report, *, budget: int = BUDGET) -> None:
    """Writes the page, of at most `budget` bytes: pictures that don't fit are left out, and it says which.

    Raises OSError where it can't be written. A picture that can't be read any more is shown by its name and the reason.
    """
    write_text(path, render(report, budget=budget))


def page_environment() -> Any:
    """jinja2's environment for pages, which escapes whatever a template says."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"line": shown_name, "percent": percent, "sha256": _sha256, "breadth": _breadth}
    return environment


def render(report: Report, *, budget: int = BUDGET) -> str:
    """The page as text without lone surrogates; see `write_report`."""
    template = page_environment().get_template("report.html.j2")
    d = metrics.percent_digits(report.found["n"])
    figures = [replace(f, image=f.image if isinstance(f.image, str) else _embed(f.image)) for f in report.figures]
    facts = {
        "r": report,
        "figures": sorted(
            figures, key=lambda figure: "wide" in _breadth(figure)
        ),  # so that none leaves a gap beside it
        "result": metrics.sentence(report.found["errors"], report.found["n"]).replace(" %", PERCENT),
        "share": lambda value: "–" if value is None else f"{100 * value:.{d}f}{PERCENT}",
        "number": lambda value: "–" if value is None else f"{value:.4g}",
    }
    suspects = _suspects(report)
    bare = template.render(**facts, suspects=suspects, items=[], shown="")
    items, shown = _gallery(report, room=budget - len(bare.encode("utf-8", "replace")))
    page = template.render(**facts, suspects=suspects, items=items, shown=shown)
    # File names that are not UTF-8 hold surrogates, which no page may hold.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def thumbnail(source: "str | os.PathLike[str] | bytes", *, side: int = SIDE, quality: int = QUALITY) -> bytes:
    """A picture as a small WebP file, upright and whole (but of a strip only the middle): `side` pixels on its shorter side.

    Smaller pictures keep their size. Raises PictureError with the reason.
    """
    with open_picture(source) as image:
        image.draft(None, (2 * side, 2 * side))  # JPEG decodes straight to half, a quarter or an eighth
        picture = upright(image)
    width, height = picture.size
    short = min(width, height)
    wide, high = min(width, WIDEST * short), min(height, WIDEST * short)
    left, top = (width - wide) / 2, (height - high) / 2
    scale = min(1.0, side / short)
    size = max(1, round(wide * scale)), max(1, round(high * scale))
    box = (left, top, left + wide, top + high)
    return _webp(picture.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0), quality=quality)


def shown_name(name: Any) -> str:
    """A file's or class's name on one line: what can't be printed (newlines, odd bytes, reversed writing) is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def percent(p: float) -> str:
    """'97.1 %'; a probability below 1 is never shown as 100."""
    if 0.9995 <= p < 1:
        return f">\N{NO-BREAK SPACE}99.9{PERCENT}"
    return f"<\N{NO-BREAK SPACE}0.1{PERCENT}" if 0 < p < 0.0005 else f"{100 * p:.1f}{PERCENT}"


def _gallery(report: Report, *, room: int) -> tuple[list[dict[str, Any]], str]:
    """The pictures for the page, top losses first, and a sentence on those left out."""
    pictures = report.pictures
    n, labels = len(pictures.labels), np.asarray(pictures.labels)
    log_probs: np.ndarray = np.maximum(np.asarray(pictures.log_probs, np.float64), -1e6)
    predicted, losses = log_probs.argmax(1), -log_probs[np.arange(n), labels]
    highest = np.sort(np.exp(log_probs), axis=1)
    sure, margin = highest[:, -1], highest[:, -1] - highest[:, -2]
    by_loss, by_margin = np.argsort(-losses, kind="stable"), np.argsort(margin, kind="stable")
    wrong = by_loss[predicted[by_loss] != labels[by_loss]]
    right = by_margin[predicted[by_margin] == labels[by_margin]]
    rest = np.random.default_rng(0).permutation(right[LEAST_SURE:])
    order = [int(i) for i in np.concatenate([wrong, right[:LEAST_SURE], rest])]

    shown = _fit(report, order, room=room, quality=QUALITY)
    if len(shown) < n <= 1.5 * len(shown):
        shown = _fit(report, order, room=room, quality=QUALITY // 2)  # two thirds of the bytes: all of them may fit
    items = [
        {
            "path": shown_name(pictures.paths[i]),
            "src": shown[i][0],
            "reason": shown[i][1],
            "actual": int(labels[i]),
            "predicted": int(predicted[i]),
            "sure": float(sure[i]),
            "margin": float(margin[i]),
            "loss": float(losses[i]),
            "wrong": bool(labels[i] != predicted[i]),
            "unsure": pictures.threshold is not None and bool(sure[i] < pictures.threshold),
        }
        for i in by_loss.tolist()
        if i in shown
    ]
    return items, _left_out(len(shown), n, len(wrong))


def _fit(report: Report, order: Sequence[int], *, room: int, quality: int) -> dict[int, tuple[str, str]]:
    """(data URI, reason) of the pictures that `room` bytes hold, in that order; the first ones in the larger size."""
    root, paths = report.pictures.root, [report.pictures.paths[i] for i in order]
    sides = [LARGE_SIDE if k < LARGE else SIDE for k in range(len(order))]
    names = 2 * max(_length(name) for name in report.classes)
    shown: dict[int, tuple[str, str]] = {}
    for i, path, (src, reason) in zip(order, paths, _thumbnails(root, paths, sides, quality=quality), strict=True):
        room -= len(src) + 2 * _length(path) + _length(reason) + names + MARKUP
        if room < 0:
            break
        shown[i] = src, reason
    return shown


def _length(text: str) -> int:
    """Bytes of a name or a reason in the page."""
    return len(html.escape(shown_name(text)).encode())


def _left_out(kept: int, n: int, wrong: int) -> str:
    if kept == n:
        return ""
    least = min(LEAST_SURE, max(0, kept - wrong))
    drawn = kept - wrong - least
    parts = [f"all {wrong:,} wrong ones" if kept >= wrong else f"of the {wrong:,} wrong ones those of the highest loss"]
    parts += [f"the {least:,} least sure of the right ones"] if least else ["none of the right ones"]
    parts += [f"{drawn:,} of the others drawn at random"] if drawn > 0 else []
    return f"{kept:,} of {n:,} pictures are on this page, to keep it small: {', '.join(parts)}."


def _thumbnails(
    root: Path, paths: Sequence[str], sides: Sequence[int], *, quality: int = QUALITY
) -> Iterator[tuple[str, str]]:
    """(data URI, "") of each picture in turn, or ("", the reason) where it can't be read; a few ahead, in threads."""

    def one(path: str, side: int) -> tuple[str, str]:
        try:
            return _embed(thumbnail(root / path, side=side, quality=quality)), ""
        except PictureError as e:
            return "", str(e)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), 64):
            yield from pool.map(one, paths[start : start + 64], sides[start : start + 64])


def _suspects(report: Report) -> list[dict[str, Any]]:
    rows = list(report.suspects)[:SUSPECTS]
    found = _thumbnails(report.pictures.root, [row["path"] for row in rows], [SIDE] * len(rows))
    return [{**row, "src": src, "bad": reason} for row, (src, reason) in zip(rows, found, strict=True)]


def _embed(image: bytes) -> str:
    """A picture file as a data URI."""
    if image[8:12] != b"WEBP":
        picture = open_upright(image).copy()
        picture.thumbnail(LARGEST_FIGURE)
        image = _webp(picture, quality=85)
    return "data:image/webp;base64," + base64.b64encode(image).decode()


def _breadth(figure: Figure) -> str:
    """Classes of a figure: "wide" has a row of its own, "broad" is scrolled on a narrow screen, not shrunk to nothing."""
    box = re.search(r'^<svg[^>]* viewBox="\S+ \S+ ([\d.]+)', str(figure.image)[:1000])
    width = float(box[1]) if box else 0.0  # points of what is mostly text of ten points
    return " ".join(["wide"] * (figure.wide or width > 600) + ["broad"] * (width > 450))


def _webp(image: Image.Image, *, quality: int) -> bytes:
    data = io.BytesIO()
    image.save(data, "WEBP", quality=quality, method=2)
    return data.getvalue()


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
