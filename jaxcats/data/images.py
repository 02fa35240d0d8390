"""Colours by an image's own ICC profile, as sRGB."""

import dataclasses
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from jaxcats.common.errors import UserError, first_line

# What a profile's colour space is called in Pillow, and the modes that can be converted by it.
_MODES = {"RGB": ("RGB", "RGBA"), "CMYK": ("CMYK",), "GRAY": ("L", "LA")}


@cache
def _srgb() -> Any:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def has_alpha(image: Image.Image) -> bool:
    """Whether an image has transparency, as a channel or as one colour that stands for it."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def is_high_bit_depth(image: Image.Image) -> bool:
    """Whether an image has greys of more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def to_srgb(image: Image.Image) -> tuple[Callable[[Image.Image], Image.Image] | None, str]:
    """How the colours of a decoded image, or of any part of it, become sRGB, and what to say of it, "" for nothing.

    None for images that stay as they are, bit for bit: those without a profile, with sRGB's own, and with one that is
    broken or of another kind than the image. Alpha is kept: what has any comes out RGBA, the rest RGB.
    """
    content = image.info.get("icc_profile")
    if not content:
        return None, ""
    mode = _converted_as(image)
    try:
        profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(content))
        name = " ".join(ImageCms.getProfileDescription(profile).split())
        space = profile.profile.xcolor_space.strip()
        if "sRGB" in name:
            return None, ""
        if is_high_bit_depth(image) and space == "GRAY":
            return None, "colour profile not applied to deep greys"
        if mode not in _MODES.get(space, ()):
            return None, "colour profile of another kind left out"
        colours = mode.removesuffix("A")
        transform = ImageCms.buildTransform(profile, _srgb(), colours, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None, "broken colour profile left out"

    def convert(part: Image.Image) -> Image.Image:
        # Transparency becomes a channel first: as one colour it would be looked for among the converted ones.
        whole = part if part.mode == mode else part.convert(mode)
        converted = transform.apply(whole if mode == colours else whole.convert(colours))
        if mode != colours:
            converted.putalpha(whole.getchannel("A"))
        return converted

    return convert, f"colours converted from {name[:80]}"


def _converted_as(image: Image.Image) -> str:
    """The mode that says the same as the image's own without a palette or a colour that stands for transparency."""
    mode = "RGB" if image.mode == "P" else image.mode
    return mode + "A" * (mode in ("L", "RGB") and "transparency" in image.info)


# Pixels converted at a time: whole large images would be held once more for every step of their conversion.
BAND = 2**18


def to_rgb(image: Image.Image, colours: Callable[[Image.Image], Image.Image] | None, *, ours: bool) -> Image.Image:
    """A decoded image of any mode as RGB: alpha laid on white, deep greys scaled.

    Args:
        image: it may be changed where it is `ours`.
        colours: how any part of it becomes sRGB (see colour.to_srgb); None: it is so already.
    """
    if is_high_bit_depth(image):
        return _by_bands(image, _deep_grey_to_rgb(image), Image.new("RGB", image.size))
    veiled = has_alpha(image)
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
    """How any part of it becomes RGB: 16 bits scaled by 257, floats from 0..1, an image beyond that by its own range.

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


# Part of every key under which pixels or features made from them are cached: raise it when evaluation_pixels changes.
TRANSFORM_VERSION = 3

# A longer side beyond this many times the shorter one is not resized whole (a 1 x 65,535 strip would take gigabytes).
STRIP_RATIO = 32

# Pillow refuses images of twice this many pixels: 200 megapixels, so that the largest phone cameras still pass.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, 100_000_000)
# Odd EXIF, large sizes and palettes make Pillow warn once per file; what matters is reported as a bad file instead.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Raster formats only: Pillow would run Ghostscript on PostScript content, whatever the file's name says.
FORMATS = {"JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "ICO"}
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_POLICIES = ("lesson", "weights")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that can't be decoded; the message is the reason alone, without the file's name."""


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the array that a backbone was trained on; it travels with the weights.

    Attributes:
        size: side of the square input, in pixels.
        mean: per channel (red, green, blue), on pixels scaled to 0..1; subtracted.
        std: per channel, likewise; divided by.
        interpolation: Pillow's resampling filter for the resize.
        policy: "lesson" resizes the shorter side to `size`, "weights" to `size / crop_fraction` (what the weights were
            measured with); both then crop the centre.
        crop_fraction: used by the policy "weights" only.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    policy: Literal["lesson", "weights"] = "lesson"
    crop_fraction: float = 0.875

    @property
    def resize_to(self) -> int:
        """The shorter side after the resize, in pixels."""
        return self.size if self.policy == "lesson" else int(self.size / self.crop_fraction)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return values | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocess":
        """The record that `to_dict` wrote; absent fields take their defaults, unknown or impossible ones are errors."""
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise UserError(f"preprocess: unknown field {unknown[0]!r}; the fields are {', '.join(names)}")
        for key, choices in (("interpolation", tuple(_FILTERS)), ("policy", _POLICIES)):
            if key in values and values[key] not in choices:
                raise UserError(f"preprocess.{key}: {values[key]!r} is not one of {', '.join(choices)}")
        triples = {key: tuple(float(x) for x in values[key]) for key in ("mean", "std") if key in values}
        return cls(**{**values, **triples})


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it can't be read."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises many kinds on corrupt EXIF, and an image without its tag is still an image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@cache
def _with_heif() -> bool:
    """Teaches Pillow HEIC, where the plug-in is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _open(source: "str | os.PathLike[str] | bytes") -> Image.Image:
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if isinstance(source, bytes):
            start = source[:12]
        else:
            with open(source, "rb") as opened:
                start = opened.read(12)
        if start[4:8] != b"ftyp" or start[8:12] in (b"avif", b"avis"):
            raise
        if not _with_heif():
            raise ImageError('HEIC needs the extra "heic": pip install "jaxcats[heic]"') from None
        return Image.open(file)


@contextmanager
def open_image(source: "str | os.PathLike[str] | bytes") -> Iterator[Image.Image]:
    """A file, or a file's content, opened by Pillow but not decoded yet; inside, every failure is an ImageError."""
    try:
        with _open(source) as image:
            if image.format not in FORMATS:
                raise ImageError(f"{image.format} is not an image format that jaxcats reads")
            yield image
    except MemoryError:
        raise
    # What a corrupt file raises depends on its format: OSError, SyntaxError, struct.error, IndexError...
    except Exception as error:
        raise ImageError(bad_reason(error)) from error


def open_upright(source: "str | os.PathLike[str] | bytes | Image.Image") -> Image.Image:
    """An image as Pillow RGB, upright, whatever its mode: the first frame, alpha laid on white, 16-bit greys scaled,
    colours of another profile than sRGB converted.

    Args:
        source: a path, a file's content, or a Pillow image (which is left as it was).

    Raises ImageError with the reason.
    """
    if isinstance(source, Image.Image):
        return upright(source, ours=False)
    with open_image(source) as image:
        return upright(image)


def bad_reason(error: Exception) -> str:
    """Why an image can't be used, in a few words, from whatever was raised while reading it."""
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {str(error).split(',')[0]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    reason = first_line(error)
    if any(words in reason for words in ("decoder error", "decoder object", "broken data stream", "broken PNG")):
        return f"damaged or cut off (Pillow: {reason[:160]})"
    return reason


def upright_with_remarks(image: Image.Image, content: bytes) -> tuple[Image.Image, list[str]]:
    """`upright`, and what is unusual about the image and what becomes of it; [] for nothing.

    Args:
        image: as `open_image(content)` gives it; it may be changed.
        content: the file's, which the frames are counted in.
    """
    picture, colours = _upright(image, ours=True)
    said = [_said_of_frames(image, content)]
    if is_high_bit_depth(image):
        said.append("more than 8 bits a pixel, scaled")
    elif image.mode == "CMYK":
        said.append("CMYK, made RGB")
    ranges: Any = image.getextrema() if image.mode in ("LA", "RGBA") else [(0, 0)]
    opaque = ranges[-1][0] == 255  # as in every screenshot
    if has_alpha(image) and not opaque:
        said.append("transparency laid on white")
    return picture, [remark for remark in (*said, colours) if remark]


def _said_of_frames(image: Image.Image, content: bytes) -> str:
    if image.format == "MPO":  # the others are previews
        return ""
    if image.format not in ("GIF", "TIFF"):
        frames = getattr(image, "n_frames", 1)
    else:
        # Counting moves from frame to frame, and would leave an image at the damaged one: hence a second opening.
        with _open(content) as again:
            try:
                frames = getattr(again, "n_frames", 1)
            except MemoryError:
                raise
            except Exception:  # of as many kinds as in open_image
                return "first of several frames, later ones damaged"
    return f"first of {frames:,} frames" if frames > 1 else ""


def upright(image: Image.Image, *, ours: bool = True) -> Image.Image:
    """An opened Pillow image decoded, turned by its EXIF orientation and made RGB.

    It may be changed where it is `ours`, which a large one with a colour profile takes half the memory for.
    """
    return _upright(image, ours=ours)[0]


def _upright(image: Image.Image, *, ours: bool) -> tuple[Image.Image, str]:
    # Loading comes first: a PNG's EXIF may follow its pixels, and Pillow turns TIFF upright itself as it loads.
    image.load()
    orientation = exif_orientation(image)
    turned = image if orientation == 1 else image.transpose(_UPRIGHT[orientation])
    colours, said = to_srgb(turned)
    return to_rgb(turned, colours, ours=ours or turned is not image), said


def evaluation_pixels(source: "str | os.PathLike[str] | bytes | Image.Image", preprocess: Preprocess) -> np.ndarray:
    """The one evaluation transform: upright RGB, shorter side resized, centre cropped; uint8 [size, size, 3].

    The geometry is that of torchvision's Resize and CenterCrop on Pillow images, and the pixels are Pillow's, bit for
    bit, except in strips more than 32 times as long as wide, where only the middle is resized. (Resizing just the
    cropped box is no substitute: Pillow holds a box in float32, which changes bits in most photos.)

    Raises ImageError with the reason.
    """
    size, method = preprocess.size, _FILTERS[preprocess.interpolation]
    image = _middle_of_strip(open_upright(source))
    width, height = image.size
    wide, high = resized_sides(width, height, preprocess.resize_to)
    top, left = round((high - size) / 2.0), round((wide - size) / 2.0)
    if (wide, high) != (width, height):
        image = image.resize((wide, high), method)
    return np.array(image.crop((left, top, left + size, top + size)))


def resized_sides(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Width and height once the shorter side is `shorter` (torchvision's rounding: down)."""
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _middle_of_strip(image: Image.Image) -> Image.Image:
    width, height = image.size
    limit = STRIP_RATIO * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, (width - limit) // 2), max(0, (height - limit) // 2)
    return image.crop((left, top, width - left, height - top))
