"""Augmentation on the device: pure JAX, each random number a function of (key, operation, epoch, index of the image).

`train` and `evaluate.tta` make a function from a preset with `make_augment`, or from a user's function with `per_image`.

The geometry is one affine map sampled once. dm-pix has the parts, but its `affine_transform` returns images of the
source's size, interpolates between channels too, reflects borders by the slower `map_coordinates`, and ran at a tenth
of this speed on CPU; its `adjust_contrast` turns about each channel's mean, where fastai's lighting has one mean.
"""

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcats.data.images import Preprocess

ZOOM = 8 / 7  # also the ratio of the source image's side to the network's: 256 to 224
Augment = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (images, epoch, index [B]) -> images


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image, whose source is a square of side R; after fastai 0.7's `tfms_from_model`.

    Attributes:
        flip: mirrored left-right with probability 1/2; of no effect with `dihedral`, which includes it.
        dihedral: one of the 8 symmetries of the square, uniformly.
        crop: the window lies anywhere in the source instead of in its centre. Needs a zoom above 1.
        zoom: the window's side is R/z, z uniform in [1, zoom]. Always drawn, whatever `p`: z = 1 is the whole source.
        rotate: degrees, uniform in +-rotate, about the centre of the source (the window is cut from the turned image);
            what lies outside is the source reflected in its edge. Positive is counter-clockwise.
        lighting: brightness b and contrast c, each uniform in +-lighting: with m the mean of the source on the 0..1
            scale, x becomes clip((x - m) c' + m + b, 0, 1), c' = 1 + c, or 1 / (1 - c) where c is negative.
        p: probability of the rotation, and of the lighting, for each image in each epoch.
    """

    flip: bool = False
    dihedral: bool = False
    crop: bool = False
    zoom: float = 1.0
    rotate: float = 0.0
    lighting: float = 0.0
    p: float = 0.75


_CROP = Augmentation(crop=True, zoom=ZOOM)
_BASIC = dataclasses.replace(_CROP, rotate=10.0, lighting=0.05)

PRESETS: dict[str, Augmentation | None] = {
    "none": None,
    "flip": Augmentation(flip=True),
    "crop": _CROP,
    "side_on": dataclasses.replace(_BASIC, flip=True),
    "top_down": dataclasses.replace(_BASIC, dihedral=True),
}


def source_preprocess(preprocess: Preprocess, augmentation: Augmentation | None) -> Preprocess:
    """The Preprocess that delivers what `make_augment(augmentation, size=preprocess.size)` takes.

    Where no window is cut it is `preprocess` itself. Otherwise it delivers the whole centre square of the image, with
    sides 8/7 as long (256 for 224), and the window is a part of that square. Evaluation frames the square as its
    policy says: "lesson" evaluates the whole square, the window of z = 1, so that with zoom 8/7 things appear in training as large
    as in evaluation or up to 8/7 larger. "weights" evaluates the middle of the square, `crop_fraction` of its side,
    the centred window of z = 1 / crop_fraction; with 7/8 and zoom 8/7, things appear as large as in evaluation or down
    to 7/8 of it.
    """
    if augmentation is None or augmentation.zoom == 1:
        return preprocess
    return dataclasses.replace(preprocess, size=round(preprocess.size * 8 / 7), policy="lesson")


def make_augment(augmentation: Augmentation, *, key: jax.Array, size: int) -> Augment:
    """A pure function `(images uint8 [B, R, R, C], epoch, index int32 [B]) -> images [B, size, size, C]`.

    The result for an image depends only on (key, epoch, its index, its pixels): not on its place in the batch, on the
    other images or on the devices. Adding or removing one operation leaves the choices of the others as they were.

    Args:
        key: base of all draws.
        size: side of the output; square images of 8/7 of it give windows without enlarging them.

    Returns:
        The function. Its output is uint8, the input's pixels in another order, where only mirroring is asked for and
        R = size; otherwise float32 in 0..255.

    >>> augment = make_augment(PRESETS["side_on"], key=jax.random.key(0), size=224)
    >>> augment(jnp.zeros((8, 256, 256, 3), jnp.uint8), 0, jnp.arange(8)).shape
    (8, 224, 224, 3)
    """

    def augment(images: jax.Array, epoch: jax.Array, index: jax.Array) -> jax.Array:
        side = images.shape[1]
        d = draw(augmentation, key=key, epoch=epoch, index=index)
        if augmentation.zoom > 1 or augmentation.rotate or side != size:
            out = sample(images, *affine(d, side=side, size=size), size=size)
        else:
            out = _symmetry(images, d) if augmentation.flip or augmentation.dihedral else images
        if augmentation.lighting:
            # Of the source, as in fastai. Each row's sum is exact in float32, so the order of summing can't matter.
            total = images.astype(jnp.float32).sum((2, 3)).astype(jnp.uint32).sum(1)
            out = relight(out, total.astype(jnp.float32) / images[0].size, d.brightness, d.contrast)
        return out

    return augment


def per_image(change: Callable, *, key: jax.Array) -> Augment:
    """`(images [B, S, S, 3], epoch, index [B]) -> images` from a function of one image.

    Args:
        change: `(image float32 [S, S, 3] from 0 to 255, key) -> image`.
        key: base of the images' keys, each a function of it, the epoch and the image's index.
    """

    def apply(images: jax.Array, epoch: jax.Array, index: jax.Array) -> jax.Array:
        epoch_key = jax.random.fold_in(key, epoch)
        keys = jax.vmap(lambda row: jax.random.fold_in(epoch_key, row))(index)
        return jax.vmap(change)(images.astype(jnp.float32), keys)

    return apply


class Draw(NamedTuple):
    """The random choices for B images; an operation that is off has its neutral value.

    Attributes:
        transpose, rows, columns: bool [B], whether rows and columns are swapped and then each mirrored.
        zoom: float32 [B], the source's side over the window's.
        place: float32 [B, 2], position of the window in the range of its possible positions, (down, right) in 0..1.
        angle: float32 [B], radians counter-clockwise.
        brightness, contrast: float32 [B], fastai's b and c.
    """

    transpose: jax.Array
    rows: jax.Array
    columns: jax.Array
    zoom: jax.Array
    place: jax.Array
    angle: jax.Array
    brightness: jax.Array
    contrast: jax.Array


def draw(augmentation: Augmentation, *, key: jax.Array, epoch: jax.Array | int, index: jax.Array) -> Draw:
    """The choices for images `index` int32 [B] in `epoch`; each image and operation is independent of the others."""

    def uniforms(operation: jax.Array, row: jax.Array) -> jax.Array:
        epoch_key = jax.random.fold_in(jax.random.fold_in(key, operation), epoch)
        return jax.random.uniform(jax.random.fold_in(epoch_key, row), (3,))

    # Draws for all operations, used or not: numbers cost nothing, and a program for each would be slow to compile.
    names = ("flip", "dihedral", "zoom", "crop", "rotate", "lighting")
    numbers = jnp.array([zlib.crc32(name.encode()) for name in names], jnp.uint32)
    drawn = jax.vmap(jax.vmap(uniforms, (None, 0), 1), (0, None))(numbers, index)  # [operations, 3, B] in [0, 1)
    u = dict(zip(names, drawn, strict=True))

    def sometimes(chance: jax.Array, x: jax.Array, most: float) -> jax.Array:
        return jnp.where(chance < augmentation.p, (2 * x - 1) * most, 0)

    if augmentation.dihedral:
        transpose, rows, columns = u["dihedral"] < 0.5
    else:
        transpose = rows = jnp.zeros(index.shape, bool)
        columns = (u["flip"][0] < 0.5) & augmentation.flip
    zoom = 1 + u["zoom"][0] * (augmentation.zoom - 1)
    place = u["crop"][:2].T if augmentation.crop else jnp.full((*index.shape, 2), 0.5)
    angle = sometimes(u["rotate"][0], u["rotate"][1], jnp.pi / 180 * augmentation.rotate)
    chance, *both = u["lighting"]
    brightness, contrast = (sometimes(chance, x, augmentation.lighting) for x in both)
    return Draw(transpose, rows, columns, zoom, place, angle, brightness, contrast)


def affine(d: Draw, *, side: int, size: int) -> tuple[jax.Array, jax.Array]:
    """(matrix [B, 2, 2], shift [B, 2]) of `sample` for a source of `side` and an output of `size` pixels."""
    window = side / d.zoom
    scale, zero = window / size, jnp.zeros_like(window)
    down, right = jnp.where(d.rows, -scale, scale), jnp.where(d.columns, -scale, scale)
    swapped, straight = [[zero, right], [down, zero]], [[down, zero], [zero, right]]
    symmetry = jnp.where(d.transpose[:, None, None], _matrices(swapped), _matrices(straight))
    cos, sin = jnp.cos(d.angle), jnp.sin(d.angle)
    turn = _matrices([[cos, sin], [-sin, cos]])
    centre = (d.place - 0.5) * (side - window)[:, None]
    # Written out: a matrix product would lose digits on devices that multiply in reduced precision.
    return (turn[..., None] * symmetry[:, None]).sum(2), (turn * centre[:, None]).sum(2)


def _matrices(entries: list[list[jax.Array]]) -> jax.Array:
    """A matrix of arrays [B] as an array [B, 2, 2]."""
    return jnp.moveaxis(jnp.array(entries), -1, 0)


def sample(images: jax.Array, matrix: jax.Array, shift: jax.Array, *, size: int) -> jax.Array:
    """Images [B, R, R, C] seen through affine maps, bilinear, reflected in the edges; float32 [B, size, size, C].

    Args:
        matrix: [B, 2, 2], from (down, right) of an output pixel's centre, seen from the output's centre, to source pixels.
        shift: [B, 2], added to that; the source's centre is (0, 0). Points are reflected once, so none may lie farther
            outside the source than its side.
    """
    side = images.shape[1]
    grid = jnp.arange(size, dtype=jnp.float32) - (size - 1) / 2

    def one(image: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
        def axis(row: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
            from_edge = row[0] * grid[:, None] + row[1] * grid + shift + side / 2
            from_edge = side - jnp.abs(side - jnp.abs(from_edge))
            at = jnp.clip(from_edge - 0.5, 0, side - 1)
            before = jnp.clip(jnp.floor(at), 0, max(side - 2, 0))
            return before.astype(jnp.int32), (at - before)[..., None]

        (top, down), (left, right) = axis(matrix[0], shift[0]), axis(matrix[1], shift[1])
        pixels, corner = image.reshape(side * side, -1), top * side + left

        def neighbour(offset: int) -> jax.Array:
            return jnp.take(pixels, corner + offset, axis=0, mode="clip").astype(jnp.float32)

        upper = neighbour(0) * (1 - right) + neighbour(1) * right
        lower = neighbour(side) * (1 - right) + neighbour(side + 1) * right
        return upper * (1 - down) + lower * down

    return jax.vmap(one)(images, matrix, shift)


def relight(images: jax.Array, mean: jax.Array, brightness: jax.Array, contrast: jax.Array) -> jax.Array:
    """fastai 0.7's `lighting` on the 0..255 scale: float32 [B, H, W, C], clipped to it.

    Args:
        mean: [B], the value that the contrast leaves unchanged, 0..255.
        brightness, contrast: [B], fastai's b and c, on its 0..1 scale.
    """
    factor = jnp.where(contrast >= 0, 1 + contrast, 1 / (1 - jnp.minimum(contrast, 0)))
    mean, shift, factor = (x[:, None, None, None] for x in (mean, mean + 255 * brightness, factor))
    return jnp.clip((images.astype(jnp.float32) - mean) * factor + shift, 0, 255)


def _symmetry(images: jax.Array, d: Draw) -> jax.Array:
    """The symmetries of `d`, without resampling."""

    transpose, rows, columns = (chosen[:, None, None, None] for chosen in d[:3])
    images = jnp.where(transpose, images.swapaxes(1, 2), images)
    images = jnp.where(rows, images[:, ::-1], images)
    return jnp.where(columns, images[:, :, ::-1], images)
