"""Pictures of every mode as RGB, a band of rows at a time."""

import math
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from jaxcats.data.colour import deep_grey, see_through

# Pixels converted at a time: whole large pictures would be held once more for every step of their conversion.
BAND = 2**18


def to_rgb(image: Image.Image, colours: Callable[[Image.Image], Image.Image] | None, *, ours: bool) -> Image.Image:
    """A decoded picture of any mode as RGB: alpha laid on white, deep greys scaled.

    Args:
        image: it may be changed where it is `ours`.
        colours: how any part of it becomes sRGB (see colour.to_srgb); None: it is so already.
    """
    if deep_grey(image):
        return _by_bands(image, _deep_grey_to_rgb(image), Image.new("RGB", image.size))
    veiled = see_through(image)
    if colours is None and not veiled:
        return image if image.mode == "RGB" else image.convert("RGB")

    def convert(part: Image.Image) -> Image.Image:
        part = colours(part) if colours else part
        return _on_white(part) if veiled else part

    in_place = ours and image.mode == "RGB" and not veiled
    out = _by_bands(image, convert, image if in_place else Image.new("RGB", image.size))
    out.info.pop("icc_profile", None)  # which is applied now
    return out


def _by_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image], into: Image.Image) -> Image.Image:
    for box in _bands(image):
        into.paste(convert(image.crop(box)), box)
    return into


def _bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    width, height = image.size
    rows = max(1, BAND // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _on_white(part: Image.Image) -> Image.Image:
    # Premultiplied and palette alpha have no direct way to RGBA in Pillow.
    straight = {"La": "LA", "RGBa": "RGBA"}.get(part.mode, part.mode)
    picture = part.convert(straight).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _deep_grey_to_rgb(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """How any part of it becomes RGB: 16 bits scaled by 257, floats from 0..1, a picture beyond that by its own range.

    Infinite values are the ends of the finite ones, NaN is 0, and what has the transparent value is white.
    """
    clear, (low, high) = image.info.get("transparency"), _finite_range(image)
    base, span = 0.0, 1.0 if image.mode == "F" else 65535.0
    if low < 0 or high > span:
        base, span = low, max(high - low, 1e-12)

    def convert(part: Image.Image) -> Image.Image:
        values = _numbers(part)
        grey = np.round((np.clip(values, low, high) - base) * (255.0 / span)).astype(np.uint8)
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")

    return convert


def _finite_range(image: Image.Image) -> tuple[float, float]:
    """Least and greatest of the values; for 16 bits those that are possible, as they are scaled the same anyway."""
    if image.mode.startswith("I;16"):
        return 0.0, 65535.0
    low, high = math.inf, -math.inf
    for box in _bands(image):
        values = _numbers(image.crop(box))
        finite = values[np.isfinite(values)]
        low, high = min(low, finite.min(initial=math.inf)), max(high, finite.max(initial=-math.inf))
    return (float(low), float(high)) if low <= high else (0.0, 0.0)


def _numbers(part: Image.Image) -> np.ndarray:
    values = np.asarray(part).astype(np.float64)
    return np.where(np.isnan(values), 0.0, values)
