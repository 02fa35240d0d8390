"""Draws the animals of the demo images with Pillow and a random generator.

Cats and dogs differ in shape only (ears, muzzle, whiskers, tongue, tail). Colours, places, backgrounds and light have the
same distribution for both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]

_FURS = (
    (214, 136, 62),
    (240, 214, 170),
    (120, 120, 124),
    (62, 58, 58),
    (232, 230, 224),
    (146, 98, 60),
    (92, 64, 44),
    (196, 176, 150),
    (168, 158, 150),
    (180, 104, 52),
)
_EYES = ((120, 160, 60), (190, 160, 50), (96, 66, 36), (90, 140, 180), (140, 100, 40))


@dataclass(frozen=True)
class _Pen:
    """Draws in units of the head: its centre is (0, 0), its radius is 1, and y points down."""

    draw: ImageDraw.ImageDraw
    centre: tuple[float, float]
    radius: float
    tilt: float
    mirror: bool

    def at(self, points: Sequence[tuple[float, float]] | np.ndarray) -> list[tuple[float, float]]:
        xy = np.asarray(points, float) * ((-1 if self.mirror else 1), 1)
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        turned = xy @ np.array([[cos, sin], [-sin, cos]]) * self.radius + self.centre
        return [(float(x), float(y)) for x, y in turned]

    def polygon(self, points: Sequence[tuple[float, float]] | np.ndarray, colour: Colour) -> None:
        self.draw.polygon(self.at(points), fill=colour)

    def oval(self, x: float, y: float, across: float, down: float, colour: Colour, turn: float = 0.0) -> None:
        angle = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        u, v = across * np.cos(angle), down * np.sin(angle)
        cos, sin = math.cos(turn), math.sin(turn)
        self.polygon(np.stack([x + u * cos - v * sin, y + u * sin + v * cos], axis=1), colour)

    def line(self, points: Sequence[tuple[float, float]] | np.ndarray, width: float, colour: Colour) -> None:
        """Draws a line with round ends: a smooth curve for three points, otherwise straight pieces."""
        knots = np.asarray(points, float)
        if len(knots) == 3:
            t = np.linspace(0, 1, 16)[:, None]
            knots = (1 - t) ** 2 * knots[0] + 2 * t * (1 - t) * knots[1] + t**2 * knots[2]
        thick = max(1, round(width * self.radius))
        self.draw.line(self.at(knots), fill=colour, width=thick, joint="curve")
        for x, y in self.at([knots[0], knots[-1]]) if thick > 3 else ():
            self.draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=colour)


def _shade(colour: Sequence[float], by: float) -> Colour:
    """Makes a colour darker (by < 0) or lighter (by > 0); `by` is from -1 to 1."""
    target = 255 if by > 0 else 0
    red, green, blue = (int(c + (target - c) * abs(by)) for c in colour)
    return red, green, blue


def _fur(rng: np.random.Generator) -> Colour:
    red, green, blue = np.clip(np.array(_FURS[rng.integers(len(_FURS))]) + rng.normal(0, 12, 3), 10, 245).astype(int)
    return int(red), int(green), int(blue)


def _body(pen: _Pen, rng: np.random.Generator, fur: Colour, *, cat: bool) -> None:
    """Draws the body behind the head, sitting or standing; tail and build differ between cats and dogs."""
    dark, wide = _shade(fur, -0.18), 0.85 if cat else 1.0
    if rng.random() < 0.5:  # sitting
        if cat:
            side = rng.uniform(1.3, 2.2)
            pen.line([(0.5, 3.0), (side + 0.8, 3.1), (side, rng.uniform(0.6, 2.0))], 0.3, dark)
        else:
            pen.line([(0.6, 2.7), (1.5, 2.6), (1.8, rng.uniform(1.6, 2.3))], 0.34, dark)
        pen.oval(0, 2.0, wide, 1.5, fur)
        pen.oval(-0.62 * wide, 2.9, 0.5, 0.5, dark)
        pen.oval(0.62 * wide, 2.9, 0.5, 0.5, dark)
        pen.oval(0, 1.7, wide * 0.5, 0.9, _shade(fur, 0.3))
        for x in (-0.35, 0.35):
            pen.line([(x * wide, 2.0), (x * wide, 3.25)], 0.36 if cat else 0.44, _shade(fur, 0.08))
            pen.oval(x * wide, 3.3, 0.28, 0.18, _shade(fur, 0.35))
        return
    long, legs = rng.uniform(2.4, 3.2), (2.5 if cat else 2.9)
    if cat:
        pen.line([(long, 0.9), (long + 1.3, 0.7), (long + rng.uniform(0.3, 1.2), -1.2)], 0.28, dark)
    else:
        pen.line([(long, 0.8), (long + 0.6, 0.4), (long + 0.7, rng.uniform(-0.6, 0.3))], 0.32, dark)
    for x in (0.9, long - 0.1):
        pen.line([(x, 1.2), (x, legs - 0.1)], 0.36, dark)
    pen.oval(long / 2 + 0.3, 1.15, long / 2 + 0.4, 0.8 * wide, fur)
    for x in (0.5, long - 0.5):
        pen.line([(x, 1.2), (x, legs)], 0.4, _shade(fur, 0.05))
        pen.oval(x - 0.08, legs + 0.05, 0.28, 0.17, _shade(fur, 0.3))
    pen.oval(0.35, 0.75, 0.7, 0.7, fur)


def _cat_head(pen: _Pen, rng: np.random.Generator, fur: Colour, yaw: float) -> None:
    dark, light, pink = _shade(fur, -0.3), _shade(fur, 0.4), (222, 150, 150)
    tip, lean = rng.uniform(1.35, 1.65), rng.uniform(-0.1, 0.15)
    for side in (-1, 1):
        near = 1 + 0.2 * side * yaw
        ear = np.array([(-0.88, -0.3), (-0.72 - lean, -tip), (-0.12, -0.78)]) * (-side * near, 1)
        pen.polygon(ear, fur)
        pen.polygon(ear.mean(0) + (ear - ear.mean(0)) * 0.6 + (0, 0.06), pink)
    pen.oval(0, 0, 1.02, 0.86, fur)
    for side in (-1, 1):
        pen.oval(0.62 * side, 0.3, 0.42, 0.36, fur, 0.3 * side)
    if rng.random() < 0.6:  # tabby
        for x in (-0.3, 0.0, 0.3):
            pen.line([(x * 0.8, -0.8), (x * 0.6 + 0.2 * yaw, -0.4)], 0.1, dark)
        for side in (-1, 1):
            for y in (0.05, 0.25):
                pen.line([(0.97 * side, y), (0.68 * side, y + 0.08)], 0.08, dark)
    shift, iris = 0.25 * yaw, _EYES[rng.integers(len(_EYES))]
    slit, open_ = rng.uniform(0.04, 0.13), rng.uniform(0.13, 0.2)
    for side in (-1, 1):
        x = 0.42 * side + shift
        pen.oval(x, -0.08, 0.25, open_ + 0.04, dark, 0.25 * side)
        pen.oval(x, -0.08, 0.21, open_, iris, 0.25 * side)
        pen.oval(x, -0.08, slit, open_ * 0.95, (12, 12, 14))
        pen.oval(x - 0.06, -0.15, 0.04, 0.04, (250, 250, 250))
    for side in (-1, 1):
        pen.oval(0.17 * side + shift, 0.38, 0.24, 0.19, light)
    pen.oval(shift, 0.56, 0.16, 0.12, light)
    pen.polygon([(shift - 0.13, 0.2), (shift + 0.13, 0.2), (shift, 0.33)], (206, 120, 122))
    for side in (-1, 1):
        pen.line([(shift, 0.33), (shift + 0.03 * side, 0.5), (shift + 0.22 * side, 0.47)], 0.035, _shade(fur, -0.6))
        for k in range(3):
            end = (shift + rng.uniform(1.15, 1.5) * side, 0.18 + 0.2 * k + rng.uniform(-0.05, 0.1))
            middle = (shift + 0.7 * side, 0.25 + 0.1 * k)
            whisker = (245, 245, 240) if sum(fur) < 560 else (70, 66, 62)
            pen.line([(shift + 0.28 * side, 0.36 + 0.05 * k), middle, end], 0.022, whisker)


def _dog_head(pen: _Pen, rng: np.random.Generator, fur: Colour, yaw: float) -> None:
    dark, light = _shade(fur, -0.35), _shade(fur, 0.4)
    shift, ears = 0.3 * yaw, dark if rng.random() < 0.7 else fur
    long, wide = rng.uniform(0.6, 0.85), rng.uniform(0.27, 0.38)
    pen.oval(0, -0.05, 0.84, 0.95, fur)
    pen.oval(0, 0.35, 0.72, 0.6, fur)
    if rng.random() < 0.4:  # a blaze
        pen.oval(shift * 0.7, -0.35, 0.16, 0.6, light)
    if rng.random() < 0.35:  # an eye patch
        pen.oval(0.36 + shift, -0.2, 0.3, 0.32, dark)
    prick = rng.random() < 0.3
    for side in (-1, 1):
        if prick:
            ear = np.array([(-0.78, -0.3), (-0.74, -1.3), (-0.15, -0.8)]) * (-side, 1)
            pen.polygon(ear, ears)
            pen.polygon(ear.mean(0) + (ear - ear.mean(0)) * 0.5, _shade(ears, 0.25))
            continue
        pen.oval((0.84 + 0.1 * side * yaw) * side, 0.02 + 0.1 * long, wide, long, ears, -0.28 * side)
        pen.oval(0.62 * side, -0.58, 0.28, 0.2, ears, 0.5 * side)
    if rng.random() < 0.65:
        tongue = rng.uniform(0.95, 1.25)
        pen.oval(shift * 1.3, 0.75, 0.36, 0.22, (70, 30, 34))
        pen.line([(shift * 1.3, 0.72), (shift * 1.35, tongue)], 0.32, (226, 110, 124))
        pen.line([(shift * 1.3, 0.76), (shift * 1.35, tongue)], 0.03, (180, 76, 92))
    for side in (-1, 1):
        pen.oval(0.23 * side + shift * 1.2, 0.48, 0.34, 0.3, light)
    pen.oval(shift * 1.2, 0.28, 0.3, 0.34, light)
    pen.oval(shift * 1.4, 0.2, 0.23, 0.17, (24, 22, 24))
    pen.oval(shift * 1.4 - 0.07, 0.14, 0.06, 0.035, (150, 150, 154))
    for side in (-1, 1):
        at = shift * 1.3
        pen.line([(at, 0.36), (at + 0.04 * side, 0.68), (at + 0.4 * side, 0.6)], 0.045, (50, 36, 34))
        x = 0.36 * side + shift
        pen.oval(x, -0.2, 0.17, 0.17, _shade(fur, -0.5))
        pen.oval(x, -0.2, 0.14, 0.14, (74, 46, 26))
        pen.oval(x, -0.19, 0.085, 0.09, (10, 8, 8))
        pen.oval(x - 0.05, -0.25, 0.035, 0.035, (250, 250, 250))
        pen.line([(x - 0.13, -0.46), (x, -0.53), (x + 0.13, -0.46)], 0.06, dark)


def _noise(rng: np.random.Generator, size: tuple[int, int], cell: int) -> np.ndarray:
    """Smooth noise, float [height, width], with mean 0 and standard deviation 1; `cell` is the size of its grain in pixels."""
    width, height = size
    small = rng.normal(0, 40, (height // cell + 2, width // cell + 2)).clip(-127, 127) + 128
    grown = Image.fromarray(small.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return (np.asarray(grown, np.float32) - 128) / 40


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Draws a room, a meadow or a plain backdrop with some clutter, and blurs it."""
    width, height = size
    first, second = rng.integers(30, 235, 3), rng.integers(30, 235, 3)
    kind = rng.integers(3)
    if kind == 0:  # a backdrop that fades
        angle = rng.uniform(0, 2 * math.pi)
        y, x = np.mgrid[0:height, 0:width]
        t = ((x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle) + 0.7) / 1.4
        array = first + (second - first) * t.clip(0, 1)[..., None]
    else:
        if kind == 1:
            first = np.array([rng.integers(120, 220), rng.integers(160, 230), rng.integers(190, 250)])
            second = np.array([rng.integers(50, 130), rng.integers(100, 170), rng.integers(30, 90)])
        horizon = int(height * rng.uniform(0.3, 0.8))
        array = np.broadcast_to(first, (height, width, 3)).astype(np.float32).copy()
        array[horizon:] = second
    array = array + _noise(rng, size, int(rng.integers(3, 40)))[..., None] * rng.uniform(4, 22)
    image = Image.fromarray(array.clip(0, 255).astype(np.uint8))
    _clutter(ImageDraw.Draw(image), rng, size, most=8)
    return _blurred(image, rng.uniform(0, 5))


def animal_image(rng: np.random.Generator, *, cat: bool) -> Image.Image:
    """Draws one animal in an image of about 256 pixels, with light, blur and grain."""
    width, height = (int(side) for side in rng.integers(224, 321, 2))
    twice = (width * 2, height * 2)  # drawn at double size and made smaller, which smooths the edges
    layer = Image.new("RGBA", twice, (0, 0, 0, 0))
    whole = rng.random() < 0.55
    radius = rng.uniform(0.13, 0.19) if whole else rng.uniform(0.22, 0.36)
    room = (0.28, 0.72, 0.22, 0.4) if whole else (0.3, 0.7, 0.38, 0.62)
    centre = rng.uniform(room[0], room[1]) * twice[0], rng.uniform(room[2], room[3]) * twice[1]
    draw, mirror = ImageDraw.Draw(layer), bool(rng.random() < 0.5)
    fur, length = _fur(rng), radius * min(twice)
    _body(_Pen(draw, centre, length, float(rng.normal(0, 0.05)), mirror), rng, fur, cat=cat)
    head = _Pen(draw, centre, length, float(rng.normal(0, 0.22)), mirror)
    (_cat_head if cat else _dog_head)(head, rng, fur, float(rng.uniform(-1, 1)))
    _clutter(ImageDraw.Draw(layer), rng, layer.size, most=3)  # something may stand in front
    layer = layer.resize((width, height), Image.Resampling.BOX)

    scene = np.asarray(_background(rng, (width, height)), np.float32)
    animal = np.asarray(layer, np.float32)
    grain = _noise(rng, (width, height), 2) * 7 + _noise(rng, (width, height), 9) * 9
    y, x = np.mgrid[0:height, 0:width]
    angle = rng.uniform(0, 2 * math.pi)
    slope = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)
    light = 1 + (slope * rng.uniform(0, 0.7)).astype(np.float32)
    tint = (rng.normal(1, 0.06, 3) * rng.uniform(0.6, 1.25)).astype(np.float32)
    pixels = scene + (animal[..., :3] + grain[..., None] - scene) * (animal[..., 3:] / 255)
    pixels = pixels * light[..., None] * tint
    speckle = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(0, 9))
    pixels = 128 + (pixels - 128) * np.float32(rng.uniform(0.65, 1.15)) + speckle
    return _blurred(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), rng.exponential(0.6))


def _clutter(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: tuple[int, int], *, most: int) -> None:
    width, height = size
    for _ in range(rng.integers(0, most + 1)):
        x, y, w, h = rng.uniform(0, 1, 4) * (width, height, width * 0.4, height * 0.4)
        shape = (draw.rectangle, draw.ellipse)[rng.integers(2)]
        shape((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=tuple(int(c) for c in rng.integers(20, 245, 3)))


def _blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius)) if radius > 0.3 else image
