"""Colours by a picture's own ICC profile, as sRGB."""

import io
from collections.abc import Callable
from functools import cache
from typing import Any

from PIL import Image, ImageCms

# What a profile's colour space is called in Pillow, and the modes that can be converted by it.
_MODES = {"RGB": ("RGB", "RGBA"), "CMYK": ("CMYK",), "GRAY": ("L", "LA")}


@cache
def _srgb() -> Any:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def see_through(image: Image.Image) -> bool:
    """Whether a picture has transparency, as a channel or as one colour that stands for it."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def deep_grey(image: Image.Image) -> bool:
    """Whether a picture has greys of more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def to_srgb(image: Image.Image) -> tuple[Callable[[Image.Image], Image.Image] | None, str]:
    """How the colours of a decoded picture, or of any part of it, become sRGB, and what to say of it, "" for nothing.

    None for pictures that stay as they are, bit for bit: those without a profile, with sRGB's own, and with one that is
    broken or of another kind than the picture. Alpha is kept: what has any comes out RGBA, the rest RGB.
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
        if deep_grey(image) and space == "GRAY":
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
    """The mode that says the same as the picture's own without a palette or a colour that stands for transparency."""
    mode = "RGB" if image.mode == "P" else image.mode
    return mode + "A" * (mode in ("L", "RGB") and "transparency" in image.info)
