"""What all figures share: the Figure class, colours, axes, text that fits its place, and writing as PNG or SVG.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart; line style, marker or text repeat
what a colour says.
"""

import io
import re
import textwrap
import unicodedata
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

from jaxcats.common.io import write_bytes

BLUE, ORANGE, GREEN, PINK, YELLOW, LIGHT_BLUE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
RIGHT, WRONG = "#1b6ca8", "#c1440e"
INK, GREY = "#222222", "#777777"
# Fonts with the characters that matplotlib's own font lacks, by the names that operating systems give them.
FALLBACK_FONTS = """Noto Sans CJK SC, Noto Sans CJK JP, Microsoft YaHei, PingFang SC, Hiragino Sans, Malgun Gothic,
WenQuanYi Micro Hei, Droid Sans Fallback, Nirmala UI, Noto Sans Devanagari, Arial Unicode MS"""


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that a notebook shows when it is a cell's last expression, without pyplot."""

    def draw(self, renderer: Any) -> None:
        """Draws with the fonts that are installed, and without a warning for each character that no font has."""
        for text in self.findobj(Text):
            if isinstance(text, Text) and not text.get_text().isascii():
                text.set_fontfamily(_fonts())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        return _png(self, dpi=80)


@cache
def _fonts() -> list[str]:
    installed = set(fontManager.get_font_names())
    return ["sans-serif", *(name for name in re.split(r",\s", FALLBACK_FONTS) if name in installed)]


def _png(figure: matplotlib.figure.Figure, *, dpi: float) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def write(figure: matplotlib.figure.Figure, path: str | Path, *, dpi: float = 120) -> None:
    """Writes a PNG file atomically.

    Raises:
        OSError: the file cannot be written.
    """
    write_bytes(Path(path), _png(figure, dpi=dpi))


def to_svg(figure: matplotlib.figure.Figure) -> str:
    """Returns the figure as one <svg> element for an HTML page; the same figure gives the same text.

    The page decides the size (there is a viewBox but no width or height), the font, and the colour of text and axes
    (`currentColor`, which follows a dark theme). Styles are attributes, because the report's Content-Security-Policy
    forbids inline styles.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxcats"}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg)
    # Ids of groups are numbered from 1 in each figure, so two figures in one page would share them.
    svg = re.sub(r' id="[\w.]+_\d{1,4}"', "", svg)
    svg = re.sub(r' style="([^"]*)"', _attributes, svg)
    page = 'fill="currentColor" stroke-linejoin="round" font-family="system-ui, sans-serif"'
    return svg.replace("<svg", f"<svg {page}", 1)


def _attributes(style: re.Match[str]) -> str:
    """An inline style as attributes; the `font` of matplotlib 3.10 is a shorthand, which no attribute can hold."""
    values = dict(re.findall(r"([\w-]+): *([^;]+)", style[1]))
    values.pop("font-family", None)
    if size := re.search(r"[\d.]+px", values.pop("font", "")):
        values["font-size"] = size[0]
    text = "".join(f' {name}="{value}"' for name, value in values.items())
    return text.replace(INK, "currentColor").replace("#000000", "currentColor")


def fit(text: str, width: int, *, lines: int = 1) -> str:
    """Shortens a text to `lines` lines of `width` columns by replacing its middle with "…".

    A wide character (Chinese, Japanese, Korean) takes two columns. Characters that cannot be shown, such as control
    characters or bytes of a file name that are not UTF-8, become "?".
    """
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    columns = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    width = max(1, width * len(text) // max(columns, 1))
    length, wrapped = len(text), textwrap.wrap(text, width)
    while len(wrapped) > lines:
        length = min(length - 1, width * lines - 1)
        end = length // 2
        wrapped = textwrap.wrap(f"{text[: length - end]}…{text[len(text) - end :]}", width)
    return "\n".join(wrapped)


def style_axes(ax: Axes, x: str, y: str) -> Axes:
    """Labels the axes, draws a light grid and removes the box."""
    ax.set_xlabel(x, color=INK)
    ax.set_ylabel(y, color=INK)
    ax.tick_params(colors=INK)
    ax.spines[["left", "bottom"]].set_color(INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    return ax


def set_heading(figure: Figure, heading: str | None) -> None:
    """Writes a heading over all axes, wrapped to the figure's width."""
    if heading:
        lines = textwrap.wrap(heading, int(figure.get_figwidth() * 8))
        figure.suptitle("\n".join(lines), fontsize=13, color=INK, parse_math=False)


def message_figure(heading: str | None, message: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = Figure(figsize=(6, 1.6), layout="constrained")
    figure.text(0.5, 0.4, "\n".join(textwrap.wrap(message, 70)), ha="center", va="center", color=GREY)
    set_heading(figure, heading)
    return figure
