"""Images under their titles."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jaxcats.data.images import open_upright
from jaxcats.plots.base import INK, RIGHT, WRONG, Figure, fit, set_heading, words

LARGEST_SIDE = 480  # of an image in a gallery, in pixels: what a screen shows of it
# Black, purple, orange, yellow: brightness alone says as much (matplotlib's inferno, at these heats).
HEAT_COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


def gallery(
    pictures: Sequence[str | Path | Image.Image | np.ndarray],
    titles: Sequence[str],
    *,
    wrong: Sequence[bool] | None = None,
    columns: int | None = None,
    heading: str | None = None,
) -> Figure:
    """Images in a grid, each under its title; titles of wrong answers are in another colour.

    Args:
        images: files, Pillow images, or uint8 arrays [H, W, 3] or [H, W].
        titles: one per image; long ones are wrapped.
        wrong: whether each is a wrong answer; None is for images without a verdict.
        columns: images per row; None is four, three for 5, 6 or 9 images, and six for more than 16.
        heading: over all, as in the lesson's plot_val_with_title.
    """
    n = len(pictures)
    columns = min(columns or (3 if n in (5, 6, 9) else 4 if n <= 16 else 6), max(n, 1))
    side = 2.6 if columns <= 4 else 2.1
    return _grid(pictures, titles, wrong=wrong, columns=columns, heading=heading, size=(side, side))


def heat_maps(
    pictures: Sequence[np.ndarray],
    heats: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    wrong: Sequence[bool] | None = None,
    heading: str | None = None,
) -> Figure:
    """Each image, and beside it the same with its heat laid over; see `overlay`.

    Args:
        images: uint8 [S, S, 3], what the network saw (the square crop), so that heat and image agree.
        heats: float [h, w] from 0 to 1, as `results.cam.grad_cam` gives them.
        titles, wrong, heading: as for `gallery`.
    """
    pairs = []
    for picture, heat in zip(pictures, heats, strict=True):
        gap = np.full((len(picture), max(2, len(picture) // 50), 3), 255, np.uint8)
        pairs.append(np.concatenate([picture, gap, overlay(picture, heat)], axis=1))
    return _grid(pairs, titles, wrong=wrong, columns=min(2, max(len(pairs), 1)), heading=heading, size=(5.2, 2.6))


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, 3] with heat float [h, w], 0 to 1, enlarged smoothly and laid over: uint8 [H, W, 3].

    Heat 0 leaves the image as it is, only darker, so that it can be seen what is looked at and what is not.
    """
    height, width = picture.shape[:2]
    small = Image.fromarray(np.asarray(heat, np.float32))
    large = np.clip(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)
    stops = np.linspace(0, 1, len(HEAT_COLOURS))
    colour = np.stack([np.interp(large, stops, channel) for channel in zip(*HEAT_COLOURS, strict=True)], axis=-1)
    share = (0.35 + 0.25 * large)[..., None]
    return np.round((1 - share) * picture + share * colour).astype(np.uint8)


def top_loss_titles(
    log_probs: np.ndarray, labels: np.ndarray, classes: Sequence[str], rows: Sequence[int] | np.ndarray
) -> list[str]:
    """'prediction / actual / loss / probability' of each row, the probability that of the prediction, as fastai titles them.

    Args:
        log_probs: float [N, C].
        labels: int [N].
        classes: C names.
        rows: which of the N, as from `ranking.top_losses`.
    """
    titles = []
    for i in (int(row) for row in rows):
        best = int(log_probs[i].argmax())
        loss, probability = abs(log_probs[i, labels[i]]), np.exp(log_probs[i, best])
        digits = 2 if probability < 0.995 else 4
        titles.append(f"{classes[best]} / {classes[labels[i]]} / {loss:.2f} / {probability:.{digits}f}")
    return titles


def _grid(
    pictures: Sequence[str | Path | Image.Image | np.ndarray],
    titles: Sequence[str],
    *,
    wrong: Sequence[bool] | None,
    columns: int,
    heading: str | None,
    size: tuple[float, float],
) -> Figure:
    """Images under their titles, each in a place of `size` inches."""
    n = len(pictures)
    if len(titles) != n or (wrong is not None and len(wrong) != n):
        raise ValueError(f"{n} images, {len(titles)} titles, wrong={wrong}")
    if not n:
        return words(heading, "no images to show")
    rows, (width, height) = -(-n // columns), size
    lines = [fit(title, int(width * 10), lines=6) for title in titles]
    top = [max(t.count("\n") + 1 for t in lines[r * columns : (r + 1) * columns]) for r in range(rows)]
    figure = Figure(figsize=(width * columns, sum(height + 0.18 * t for t in top) + (0.5 if heading else 0)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for i, (ax, picture, title) in enumerate(zip(axes.flat, pictures, lines, strict=False)):
        ax.imshow(_pixels(picture))
        colour = INK if wrong is None else WRONG if wrong[i] else RIGHT
        ax.set_title(title, fontsize=11 if height > 2.5 else 9, color=colour, parse_math=False)
    set_heading(figure, heading)
    return figure


def _pixels(picture: str | Path | Image.Image | np.ndarray) -> Image.Image:
    image = open_upright(Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture)
    if max(image.size) > LARGEST_SIDE:
        image = image.copy()
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image
