"""Images in a grid, each under its title; used by the report, the notebook, `predict --show` and label errors."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from jaxcats.data.images import open_upright
from jaxcats.plots.base import INK, RIGHT, WRONG, Figure, fit, message_figure, set_heading

LARGEST_SIDE = 480  # pixels of an image in a gallery; a screen shows no more
ImageSource = str | Path | Image.Image | np.ndarray


def gallery(
    images: Sequence[ImageSource],
    titles: Sequence[str],
    *,
    wrong: Sequence[bool] | None = None,
    heading: str | None = None,
    pairs: bool = False,
) -> Figure:
    """Shows images in a grid, each under its title; titles of wrong predictions have another colour.

    Args:
        images: files, Pillow images, or uint8 arrays [H, W, 3] or [H, W].
        titles: one per image; long ones are wrapped.
        wrong: whether each prediction is wrong; None for images without a label.
        heading: stands above all images.
        pairs: each image is two squares side by side, and gets twice the width.
    """
    n = len(images)
    if not n:
        return message_figure(heading, "no images to show")
    columns = 2 if pairs else 3 if n in (5, 6, 9) else 4 if n <= 16 else 6
    height = 2.6 if columns <= 4 else 2.1  # inches
    width = 2 * height if pairs else height
    columns = min(columns, n)
    rows = -(-n // columns)
    wrapped = [fit(title, int(width * 10), lines=6) for title in titles]
    title_lines = sum(max(t.count("\n") + 1 for t in wrapped[r * columns : (r + 1) * columns]) for r in range(rows))
    total_height = rows * height + 0.18 * title_lines + (0.5 if heading else 0)
    figure = Figure(figsize=(width * columns, total_height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    colours = [INK] * n if wrong is None else [WRONG if is_wrong else RIGHT for is_wrong in wrong]
    for ax, image, title, colour in zip(axes.flat[:n], images, wrapped, colours, strict=True):
        upright = open_upright(Image.fromarray(image) if isinstance(image, np.ndarray) else image).copy()
        upright.thumbnail((LARGEST_SIDE, LARGEST_SIDE))  # leaves smaller ones as they are
        ax.imshow(upright)
        ax.set_title(title, fontsize=11 if height > 2.5 else 9, color=colour, parse_math=False)
    set_heading(figure, heading)
    return figure


def heat_maps(
    images: Sequence[np.ndarray],
    heats: Sequence[np.ndarray],
    titles: Sequence[str],
    wrong: Sequence[bool],
    heading: str,
) -> Figure:
    """Shows each image, and beside it the same image with its heat map laid over.

    Args:
        images: uint8 [S, S, 3], the crop that the network sees, so that heat map and image agree.
        heats: float [h, w] from 0 to 1, as from `evaluate.figures.grad_cam`.
        titles, wrong, heading: as for `gallery`.
    """
    pairs = []
    for image, heat in zip(images, heats, strict=True):
        gap = np.full((len(image), max(2, len(image) // 50), 3), 255, np.uint8)
        pairs.append(np.concatenate([image, gap, overlay(image, heat)], axis=1))
    return gallery(pairs, titles, wrong=wrong, heading=heading, pairs=True)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lays a heat map, enlarged smoothly, over an image; where the heat is 0 the image only gets darker.

    Args:
        image: uint8 [H, W, 3].
        heat: float [h, w], 0 to 1.

    Returns:
        uint8 [H, W, 3].
    """
    height, width = image.shape[:2]
    small = Image.fromarray(np.asarray(heat, np.float32))
    large = np.clip(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)
    colour = 255 * matplotlib.colormaps["inferno"](large)[..., :3]  # ever brighter, so that a grey print shows it too
    share = (0.35 + 0.25 * large)[..., None]
    return np.round((1 - share) * image + share * colour).astype(np.uint8)


def top_loss_titles(log_probs: np.ndarray, labels: np.ndarray, classes: Sequence[str], rows: np.ndarray) -> list[str]:
    """Titles images as fastai's plot_top_losses does: "prediction / actual / loss / probability of the prediction".

    Args:
        log_probs: float [N, C].
        labels: int [N].
        classes: C names.
        rows: which of the N images, as from `ranking.top_losses`.
    """
    titles = []
    for row in rows:
        best, label = int(log_probs[row].argmax()), int(labels[row])
        loss, probability = abs(log_probs[row, label]), np.exp(log_probs[row, best])
        digits = 2 if probability < 0.995 else 4
        titles.append(f"{classes[best]} / {classes[label]} / {loss:.2f} / {probability:.{digits}f}")
    return titles
