"""What a network expects of its pixels (`Preprocess`), and the one evaluation transform, in Pillow."""

import dataclasses
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from jaxcats.data.colour import deep_grey, see_through, to_srgb
from jaxcats.data.rgb import to_rgb
from jaxcats.errors import UserError

# Part of every key under which pixels or features made from them are cached: raise it when evaluation_pixels changes.
TRANSFORM_VERSION = 3

# A longer side beyond this many times the shorter one is not resized whole (a 1 x 65,535 strip would take gigabytes).
STRIP_RATIO = 32

# Pillow refuses pictures of twice this many pixels: 200 megapixels, so that the largest phone cameras still pass.
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


class PictureError(ValueError):
    """A picture that can't be decoded; the message is the reason alone, without the file's name."""


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the array that a backbone was trained on; it travels with the weights.

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
    except Exception:  # Pillow raises many kinds on corrupt EXIF, and a picture without its tag is still a picture
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
            raise PictureError('HEIC needs the extra "heic": pip install "jaxcats[heic]"') from None
        return Image.open(file)


@contextmanager
def open_picture(source: "str | os.PathLike[str] | bytes") -> Iterator[Image.Image]:
    """A file, or a file's content, opened by Pillow but not decoded yet; inside, every failure is a PictureError."""
    try:
        with _open(source) as image:
            if image.format not in FORMATS:
                raise PictureError(f"{image.format} is not a picture format that jaxcats reads")
            yield image
    except MemoryError:
        raise
    # What a corrupt file raises depends on its format: OSError, SyntaxError, struct.error, IndexError...
    except Exception as error:
        raise PictureError(bad_reason(error)) from error


def open_upright(source: "str | os.PathLike[str] | bytes | Image.Image") -> Image.Image:
    """A picture as Pillow RGB, upright, whatever its mode: the first frame, alpha laid on white, 16-bit greys scaled,
    colours of another profile than sRGB converted.

    Args:
        source: a path, a file's content, or a Pillow image (which is left as it was).

    Raises PictureError with the reason.
    """
    if isinstance(source, Image.Image):
        return upright(source, ours=False)
    with open_picture(source) as image:
        return upright(image)


def bad_reason(error: Exception) -> str:
    """Why a picture can't be used, in a few words, from whatever was raised while reading it."""
    if isinstance(error, PictureError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {str(error).split(',')[0]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    first_line = (str(error).splitlines() or [""])[0]
    if any(words in first_line for words in ("decoder error", "decoder object", "broken data stream", "broken PNG")):
        return f"damaged or cut off (Pillow: {first_line[:160]})"
    return first_line[:200] or type(error).__name__


def upright_with_remarks(image: Image.Image, content: bytes) -> tuple[Image.Image, list[str]]:
    """`upright`, and what is unusual about the picture and what becomes of it; [] for nothing.

    Args:
        image: as `open_picture(content)` gives it; it may be changed.
        content: the file's, which the frames are counted in.
    """
    picture, colours = _upright(image, ours=True)
    said = [_said_of_frames(image, content)]
    if deep_grey(image):
        said.append("more than 8 bits a pixel, scaled")
    elif image.mode == "CMYK":
        said.append("CMYK, made RGB")
    ranges: Any = image.getextrema() if image.mode in ("LA", "RGBA") else [(0, 0)]
    opaque = ranges[-1][0] == 255  # as in every screenshot
    if see_through(image) and not opaque:
        said.append("transparency laid on white")
    return picture, [remark for remark in (*said, colours) if remark]


def _said_of_frames(image: Image.Image, content: bytes) -> str:
    if image.format == "MPO":  # the others are previews
        return ""
    if image.format not in ("GIF", "TIFF"):
        frames = getattr(image, "n_frames", 1)
    else:
        # Counting moves from frame to frame, and would leave a picture at the damaged one: hence a second opening.
        with _open(content) as again:
            try:
                frames = getattr(again, "n_frames", 1)
            except MemoryError:
                raise
            except Exception:  # of as many kinds as in open_picture
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

    Raises PictureError with the reason.
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
