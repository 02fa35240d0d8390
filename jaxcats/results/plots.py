"""Figures, returned and not shown; the only module that knows matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

RIGHT, WRONG = "#1b6ca8", "#c1440e"  # told apart by colour-blind readers, and by the words beside them


def gallery(
    pictures: Sequence[Path | Image.Image], titles: Sequence[str], *, wrong: Sequence[bool], columns: int = 4
) -> Figure:
    """Pictures in a grid, each under its title; titles of wrong answers are in another colour.

    Args:
        pictures: files or Pillow pictures.
        titles: one per picture.
        wrong: whether each is a wrong answer.
        columns: pictures per row.
    """
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, picture, title, bad in zip(axes.flat, pictures, titles, wrong, strict=False):
        with Image.open(picture) if isinstance(picture, (str, Path)) else picture as image:
            ax.imshow(image.convert("RGB"))
        ax.set_title(title, fontsize=11, color=WRONG if bad else RIGHT)
    return figure
