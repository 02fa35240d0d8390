"""The one evaluation transform: an image file of any kind becomes the uint8 pixels that a network sees, in Pillow.

Training, evaluation, export and predict get their pixels from `evaluation_pixels`. The index and doctor read files with
`decode`, the same reading without the resize, which also says what is unusual about an image.
"""

import dataclasses
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from jaxcats.common.errors import UserError, first_line

# Part of every key under which pixels or features made from them are cached: raise it when evaluation_pixels changes.
TRANSFORM_VERSION = 3
# A longer side beyond this many times the shorter one is not resized whole (a 1 x 65,535 strip would take gigabytes).
STRIP_RATIO = 32
# Pixels converted at a time: converting a large image whole would hold it once more for every step of the conversion.
BAND = 2**18

# Pillow refuses images of twice this many pixels: 200 megapixels, so that the largest phone cameras still pass.
Image.MAX_IMAGE_PIXELS = 100_000_000
# Odd EXIF, large sizes and palettes make Pillow warn once per file; what matters is reported as a bad file instead.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# The formats that are read, as Pillow names them, and their extensions. Raster formats only: Pillow would run Ghostscript
# on PostScript content, whatever the file's name says. Pillow reads HEIC with a plug-in only; without it the reason says so.
FORMATS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "MPO": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png",),
    "BMP": ("bmp",),
    "DIB": ("bmp",),
    "GIF": ("gif",),
    "WEBP": ("webp",),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "JPEG2000": ("jp2",),
    "AVIF": ("avif",),
    "HEIF": ("heic", "heif"),
    "ICO": (),
}
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

File = str | os.PathLike[str] | bytes  # a path, or a file's content
Conversion = Callable[[Image.Image], Image.Image]


class ImageError(ValueError):
    """An image that can't be decoded; the message is the reason alone, without the file's name."""


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the array that a backbone was trained on; it travels with the weights.

    Attributes:
        size: side of the square input, in pixels.
        mean: per channel (red, green, blue), on pixels scaled to 0..1; subtracted.
        std: per channel, on the same scale; divided by.
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
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocess":
        """The record that `to_dict` wrote; absent fields take their defaults.

        Raises:
            UserError: a field is unknown or has an impossible value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise UserError(f"preprocess: unknown field {unknown[0]!r}; the fields are {', '.join(names)}")
        for key, choices in (("interpolation", tuple(_FILTERS)), ("policy", ("lesson", "weights"))):
            if key in values and values[key] not in choices:
                raise UserError(f"preprocess.{key}: {values[key]!r} is not one of {', '.join(choices)}")
        triples = {key: tuple(float(x) for x in values[key]) for key in ("mean", "std") if key in values}
        return cls(**{**values, **triples})


def evaluation_pixels(source: File | Image.Image, preprocess: Preprocess) -> np.ndarray:
    """The one evaluation transform: upright RGB, shorter side resized, centre cropped.

    The geometry is that of torchvision's Resize and CenterCrop on Pillow images, and the pixels are Pillow's, bit for
    bit, except in strips more than 32 times as long as wide, where only the middle is resized. (Resizing just the
    cropped box is no substitute: Pillow holds a box in float32, which changes bits in most photos.)

    Args:
        source: a path, a file's content, or a Pillow image, which stays unchanged.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ImageError: the image can't be decoded.
    """
    image = open_upright(source)
    longest = STRIP_RATIO * min(image.size)
    if max(image.size) > longest:
        left, top = (max(0, (side - longest) // 2) for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    size, shorter = preprocess.size, preprocess.resize_to
    width, height = image.size
    # Rounded down, as torchvision does.
    resized = (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
    if resized != image.size:
        image = image.resize(resized, _FILTERS[preprocess.interpolation])
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return np.array(image.crop((left, top, left + size, top + size)))


def open_upright(source: File | Image.Image) -> Image.Image:
    """An image as Pillow RGB, upright, whatever its mode.

    The first frame of an animation is used, alpha is laid on white, greys of 16 bits are scaled to 8, and colours of
    another profile are converted to sRGB.

    Args:
        source: a path, a file's content, or a Pillow image, which stays unchanged.

    Raises:
        ImageError: the image can't be decoded.
    """
    if isinstance(source, Image.Image):
        return decode(source.copy()).image
    with open_image(source) as image:
        return decode(image).image


@contextmanager
def open_image(source: File) -> Iterator[Image.Image]:
    """An image opened by Pillow but not decoded yet; every failure inside the `with` block becomes an ImageError."""
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


def _open(source: File) -> Image.Image:
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        if content[4:8] != b"ftyp" or content[8:12] in (b"avif", b"avis"):
            raise
        try:
            import pillow_heif
        except ImportError:
            raise ImageError('HEIC needs the extra "heic": pip install "jaxcats[heic]"') from None
        pillow_heif.register_heif_opener()  # once: from now on Pillow opens HEIC itself
        return Image.open(io.BytesIO(content))


def bad_reason(error: Exception) -> str:
    """Why an image can't be used, in a few words, from whatever was raised while it was read."""
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {str(error).split(',')[0]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"damaged, cut off or of an unknown kind (Pillow: {first_line(error)})"


@dataclass(frozen=True)
class Decoded:
    """An upright RGB image, the EXIF orientation (1 to 8) of its file, and notes on unusual properties."""

    image: Image.Image
    orientation: int
    notes: tuple[str, ...]


def decode(image: Image.Image, content: bytes | None = None) -> Decoded:
    """Decodes an opened image, rotates it as its EXIF orientation says and makes it RGB.

    Args:
        image: an image of Pillow or `open_image`; it may change.
        content: the file's bytes, in which the frames are counted for a note; None: they are not counted.
    """
    # Pillow itself turns TIFF as it loads it, and then forgets the orientation. A PNG's EXIF may follow its pixels.
    stored = _exif_orientation(image) if image.format == "TIFF" else 1
    image.load()
    orientation = _exif_orientation(image)
    if orientation > 1:
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except MemoryError:
            raise
        except Exception:  # corrupt EXIF, which Pillow writes anew after it has turned the pixels
            pass
    to_srgb, colour_note = _srgb_conversion(image)
    notes = [_frames_note(image, content) if content else ""]
    if is_high_bit_depth(image):
        notes.append("more than 8 bits a pixel, scaled")
    elif image.mode == "CMYK":
        notes.append("CMYK, made RGB")
    is_opaque = image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema()[0] == 255  # as in every screenshot
    if has_alpha(image) and not is_opaque:
        notes.append("transparency laid on white")
    notes = tuple(note for note in (*notes, colour_note) if note)
    return Decoded(_to_rgb(image, to_srgb), max(stored, orientation), notes)


def _exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it can't be read."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises many kinds on corrupt EXIF, and an image without its tag is still an image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _frames_note(image: Image.Image, content: bytes) -> str:
    if image.format == "MPO":  # the others are previews
        return ""
    # Counting may read all frames and would leave the image at a damaged one, so the file is opened a second time.
    with _open(content) as reopened:
        try:
            frames = getattr(reopened, "n_frames", 1)
        except Exception:  # a damaged file raises many kinds, as in open_image
            return "first of several frames, later ones damaged"
    return f"first of {frames:,} frames" if frames > 1 else ""


def has_alpha(image: Image.Image) -> bool:
    """Whether an image has transparency, as a channel or as one colour that stands for it."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def is_high_bit_depth(image: Image.Image) -> bool:
    """Whether an image has greys of more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def _to_rgb(image: Image.Image, to_srgb: Conversion | None) -> Image.Image:
    """A decoded image of any mode as RGB: alpha laid on white, high bit depths scaled, colours converted to sRGB.

    An RGB image is converted in place, so that a large one takes half the memory.
    """
    if is_high_bit_depth(image):
        return _by_bands(image, _grey_conversion(image), Image.new("RGB", image.size))
    transparent = has_alpha(image)
    if to_srgb is None and not transparent:
        return image if image.mode == "RGB" else image.convert("RGB")

    def convert(part: Image.Image) -> Image.Image:
        part = to_srgb(part) if to_srgb else part
        return _on_white(part) if transparent else part

    in_place = image.mode == "RGB" and not transparent
    rgb = _by_bands(image, convert, image if in_place else Image.new("RGB", image.size))
    rgb.info.pop("icc_profile", None)  # it has been applied
    return rgb


def _by_bands(image: Image.Image, convert: Conversion, into: Image.Image) -> Image.Image:
    for box in _bands(image):
        into.paste(convert(image.crop(box)), box)
    return into


def _bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    width, height = image.size
    rows = max(1, BAND // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _on_white(part: Image.Image) -> Image.Image:
    # Pillow can't convert premultiplied and palette alpha to RGBA directly.
    straight = {"La": "LA", "RGBa": "RGBA"}.get(part.mode, part.mode)
    rgba = part.convert(straight).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey_conversion(image: Image.Image) -> Conversion:
    """How any part of an image of high bit depth becomes RGB.

    16 bits are divided by 257, floats multiplied by 255; an image with values beyond 0..65535, or 0..1, is scaled by its
    own range. Infinite values are the ends of the finite ones, NaN is 0, and the transparent value becomes white.
    """
    transparent, (low, high) = image.info.get("transparency"), _finite_range(image)
    base, span = 0.0, 1.0 if image.mode == "F" else 65535.0
    if low < 0 or high > span:
        base, span = low, max(high - low, 1e-12)

    def convert(part: Image.Image) -> Image.Image:
        values = _numbers(part)
        grey = np.round((np.clip(values, low, high) - base) * (255.0 / span)).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")

    return convert


def _finite_range(image: Image.Image) -> tuple[float, float]:
    """Least and greatest finite value; for 16 bits the range of the type, because it fixes their scale."""
    if image.mode.startswith("I;16"):
        return 0.0, 65535.0
    low, high = math.inf, -math.inf
    for box in _bands(image):
        values = _numbers(image.crop(box))
        finite = values[np.isfinite(values)]
        low, high = min(low, finite.min(initial=math.inf)), max(high, finite.max(initial=-math.inf))
    return (float(low), float(high)) if low <= high else (0.0, 0.0)


def _numbers(part: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(part).astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)


# The colour spaces of profiles, and the Pillow modes that they can convert.
_PROFILE_MODES = {"RGB": ("RGB", "RGBA"), "CMYK": ("CMYK",), "GRAY": ("L", "LA")}


def _srgb_conversion(image: Image.Image) -> tuple[Conversion | None, str]:
    """How any part of a decoded image becomes sRGB, and a note on it.

    None for images that stay as they are, bit for bit: those without a profile, with sRGB's own, and with one that is
    broken or of another kind than the image. Alpha is kept: images with alpha come out RGBA, the others RGB.
    """
    content = image.info.get("icc_profile")
    if not content:
        return None, ""
    # The mode without a palette, and with a channel for a colour that stands for transparency.
    mode = "RGB" if image.mode == "P" else image.mode
    if mode in ("L", "RGB") and "transparency" in image.info:
        mode += "A"
    try:
        profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(content))
        name = " ".join(ImageCms.getProfileDescription(profile).split())
        space = profile.profile.xcolor_space.strip()
        if "sRGB" in name:
            return None, ""
        if mode not in _PROFILE_MODES.get(space, ()):
            return None, "colour profile of another kind left out"
        opaque_mode = mode.removesuffix("A")
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), opaque_mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None, "broken colour profile left out"

    def convert(part: Image.Image) -> Image.Image:
        # Transparency becomes a channel first: a transparent colour would no longer match after the conversion.
        whole = part if part.mode == mode else part.convert(mode)
        converted = transform.apply(whole if mode == opaque_mode else whole.convert(opaque_mode))
        if mode != opaque_mode:
            converted.putalpha(whole.getchannel("A"))
        return converted

    return convert, f"colours converted from {name[:80]}"
