"""Colours by a picture's own ICC profile, as sRGB."""

import io
from functools import cache
from typing import Any

from PIL import Image, ImageCms

# What a profile's colour space is called in Pillow, and the modes that can be converted by it.
_MODES = {"RGB": ("RGB", "RGBA"), "CMYK": ("CMYK",), "GRAY": ("L",)}


@cache
def _srgb() -> Any:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def in_srgb(image: Image.Image) -> tuple[Image.Image, str]:
    """A decoded picture with its colours converted to sRGB, and what was done, "" for nothing.

    Pictures without a profile, with sRGB's own, and with one that is broken or of another kind than the picture stay as
    they are, bit for bit. Alpha is kept.
    """
    content = image.info.get("icc_profile")
    if not content:
        return image, ""
    try:
        profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(content))
        name = " ".join(ImageCms.getProfileDescription(profile).split())
        modes = _MODES.get(profile.profile.xcolor_space.strip(), ())
        if "sRGB" in name:
            return image, ""
        plain = image.convert("RGBA" if "transparency" in image.info else "RGB") if image.mode == "P" else image
        if plain.mode not in modes:
            return image, "colour profile of another kind left out"
        colours = plain.convert("RGB") if plain.mode == "RGBA" else plain
        converted = ImageCms.profileToProfile(colours, profile, _srgb(), outputMode="RGB")
        assert converted is not None  # None is for conversions in place
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image, "broken colour profile left out"
    if plain.mode == "RGBA":
        converted.putalpha(plain.getchannel("A"))
    elif "transparency" in plain.info:
        converted.info["transparency"] = plain.info["transparency"]
    return converted, f"colours converted from {name}"
