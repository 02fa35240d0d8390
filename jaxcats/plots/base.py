"""What every figure shares: the Figure itself, colours, axes, words that fit, and how a figure is written.

Colours are Okabe and Ito's, told apart by colour-blind readers; line style, marker or words say the same again.
"""

import hashlib
import io
import re
import textwrap
import unicodedata
import warnings
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

from jaxcats.common.io import write_bytes

RIGHT, WRONG = "#1b6ca8", "#c1440e"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLES = ("-", "--", "-.", ":")
INK, GREY = "#222222", "#777777"
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
# Fonts with characters that matplotlib's own lacks, as systems name them.
MORE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
    "Malgun Gothic",
)
MORE_FONTS += ("WenQuanYi Micro Hei", "Droid Sans Fallback", "Nirmala UI", "Noto Sans Devanagari", "Arial Unicode MS")
SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows as a cell's last expression; pyplot knows nothing of it."""

    def draw(self, renderer: Any) -> None:
        """Draws with what fonts there are: a name in a script that none of them has is no reason for a page of warnings."""
        for text in self.findobj(Text):
            if isinstance(text, Text) and not text.get_text().isascii():
                text.set_fontfamily(_fonts())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            super().draw(renderer)

    def to_svg(self) -> str:
        """The figure as one <svg> element for a page; see `to_svg`."""
        return to_svg(self)

    def _repr_png_(self) -> bytes:
        return _png(self, dpi=80)

    def __repr__(self) -> str:
        return "<a figure: .savefig('x.png') writes it>"


@cache
def _fonts() -> list[str]:
    known = set(fontManager.get_font_names())
    return ["sans-serif", *(name for name in MORE_FONTS if name in known)]


def _png(figure: matplotlib.figure.Figure, *, dpi: float) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def write(figure: matplotlib.figure.Figure, path: str | Path, *, dpi: float = 120) -> None:
    """Writes a PNG file, whole or not at all; raises OSError."""
    write_bytes(Path(path), _png(figure, dpi=dpi))


def to_svg(figure: matplotlib.figure.Figure) -> str:
    """The figure as one <svg> element for a page: text as text, in the page's colours, nothing random or dated in it.

    Ink and black are `currentColor`, the background is the page's, the font the page's (`system-ui` unless its style
    says otherwise), the size the page's (there is a viewBox and neither width nor height). Styles are presentation
    attributes, which a page's CSS overrides and a strict Content-Security-Policy allows. Ids are the figure's own, so
    that several figures can stand in one page. Nothing is fetched from anywhere.
    """
    buffer = io.StringIO()
    facts = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxcats", "svg.image_inline": True}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=facts)
    text = buffer.getvalue()
    name = "f" + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (SVG + "metadata", SVG + "style"):
                parent.remove(child)
    used = set(re.findall(r"(?:url\(|href=\")#([^\")]+)", text))
    for element in root.iter():
        _plain_attributes(element, name, used)
    for size in ("width", "height"):
        root.attrib.pop(size)
    root.attrib |= {"fill": "currentColor", "stroke-linejoin": "round", "font-family": "system-ui, sans-serif"}
    root.set("xmlns", SVG[1:-1])
    return ElementTree.tostring(root, encoding="unicode")


def _plain_attributes(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Styles become attributes, ids get the figure's name or go, namespaces go, ink becomes the page's."""
    element.tag = element.tag.removeprefix(SVG)
    old, element.attrib = element.attrib, {}
    for key, value in old.items():
        if key == "id":
            if value in used:
                element.set("id", f"{name}-{value}")
        elif key == LINK:
            element.set("href", f"#{name}-{value[1:]}" if value[0] == "#" else "".join(value.split()))
        elif key != "style":
            element.set(key, value.replace("url(#", f"url(#{name}-"))
    for part in filter(None, old.get("style", "").split(";")):
        key, value = (word.strip() for word in part.split(":", 1))
        if key == "font":  # matplotlib 3.10 writes weight, size and family in one
            weight = re.search(r"\b(bold|[1-9]00)\b", value)
            size = re.search(r"[\d.]+px", value)
            element.attrib |= {"font-weight": weight[0]} if weight else {}
            element.attrib |= {"font-size": size[0]} if size else {}
        elif key != "font-family":
            element.set(key, "currentColor" if value in (INK, "#000000") else value)


def printable(text: str) -> str:
    """Text in one line; "?" for what can't be shown, such as a control character or a file name's byte that isn't UTF-8."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def fit(text: str, width: int, *, lines: int = 1) -> str:
    """Text in at most `lines` lines of `width` columns; of a longer one the middle is left out, "…" in its place.

    A wide character (Chinese, Japanese, Korean) takes two columns.
    """
    text = printable(text)
    columns = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    width = max(1, width * len(text) // max(columns, 1))
    keep, parts = len(text), textwrap.wrap(text, width)
    while len(parts) > lines:
        keep = min(keep - 1, width * lines - 1)
        end = keep // 2
        parts = textwrap.wrap(f"{text[: keep - end]}…{text[len(text) - end :]}", width)
    return "\n".join(parts)


def named_axes(ax: Axes, x: str, y: str) -> Axes:
    """The axes with their labels, a light grid and no box."""
    ax.set_xlabel(x, color=INK)
    ax.set_ylabel(y, color=INK)
    ax.tick_params(colors=INK)
    ax.spines[["left", "bottom"]].set_color(INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    return ax


def set_limits(ax: Axes, low: float, high: float) -> None:
    """The y axis from low to high with some room, or from 0 where low is 0."""
    least = 0.1 * abs(high)  # a flat curve is to look flat, not like its rounding errors
    low, high = min(low, high - least), max(high, low + least)
    room = 0.06 * (high - low) or 1.0
    ax.set_ylim(low - room if low else 0, high + room)


def set_heading(figure: Figure, heading: str | None) -> None:
    """A heading over all, wrapped to the figure's width."""
    if heading:
        width = int(figure.get_figwidth() * 8)
        figure.suptitle("\n".join(textwrap.wrap(heading, width)), fontsize=13, color=INK, parse_math=False)


def words(heading: str | None, text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = Figure(figsize=(6, 1.6), layout="constrained")
    figure.text(0.5, 0.4, "\n".join(textwrap.wrap(text, 70)), ha="center", va="center", color=GREY)
    set_heading(figure, heading)
    return figure
