"""One look at one file: what its pixels say of it, which format it begins as, and the files that are none by name."""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.data.colour import deep_grey
from jaxcats.data.duplicates import SIDE
from jaxcats.data.files import IMAGE_EXTENSIONS, belied, look_at, walk
from jaxcats.data.preprocess import bad_reason, exif_orientation, open_picture, upright_with_remarks

EVEN = 2.0  # greatest standard deviation of a channel of 64 x 64 pixels, 0 to 255
# Greatest difference of two pixels of a blank picture: noise of a standard deviation of 2 stays under it, a letter doesn't.
BLANK = 24
DARK = 1 / 8  # of the range of deep greys: 13 of 16 bits
TINY, EXTREME = 32, 5.0  # shorter side in pixels; longer over shorter side
LITTER = ("thumbs.db", "desktop.ini", ".ds_store")
RAW = (".dng", ".nef", ".nrw", ".arw", ".sr2", ".pef", ".srw", ".cr2")  # cameras' own files, TIFF by their first bytes
NAMELESS = "picture without a picture's ending"
# How the formats begin. Of BMP and PNM the letters alone may begin a text.
_STARTS = [
    (re.compile(start, re.DOTALL), ending)
    for start, ending in (
        (rb"\xff\xd8\xff", ".jpg"),
        (rb"\x89PNG\r\n\x1a\n", ".png"),
        (rb"GIF8[79]a", ".gif"),
        (rb"RIFF.{4}WEBP", ".webp"),
        (rb"II\*\0|MM\0\*", ".tif"),
        (rb"BM.{4}\0{4}", ".bmp"),
        (rb".{4}ftyp(avi[fs]|m[is]f1.*avi[fs])", ".avif"),
        (rb".{4}ftyp(hei[cxms]|hev[cxms]|m[is]f1)", ".heic"),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", ".jp2"),
        (rb"P[1-6]\s+(#|\d+\s+\d)", ".pnm"),
    )
]


@dataclass
class Look:
    """What one decode of a file said; `notes` are (kind, detail), an `even` picture is not to be compared with others."""

    bad: str = ""
    sha256: str = ""
    hash: int = 0
    thumb: np.ndarray = field(default_factory=lambda: np.zeros((SIDE, SIDE), np.uint8))
    notes: list[tuple[str, str]] = field(default_factory=list)
    even: bool = False


def look(path: Path) -> Look:
    """Read and decode one file, once."""
    import imagehash
    from PIL import Image

    try:
        if not path.is_file() or not path.stat().st_size:
            return Look(bad=look_at(path).bad or "")
        content = path.read_bytes()
        # Pixels are worked on inside: a file of several frames takes its picture with it as it is closed.
        with open_picture(content) as image:
            early = exif_orientation(image) if image.format == "TIFF" else 1  # Pillow turns them as it decodes them
            picture, unusual = upright_with_remarks(image, content)
            turned = max(early, exif_orientation(image))
            even = bool(np.asarray(picture.resize((64, 64))).astype(float).std(axis=(0, 1)).max() < EVEN)
            checks = (
                ("wrong extension", belied(str(image.format), path.suffix)),
                ("unusual picture", "; ".join(unusual)),
                ("turned by EXIF", f"orientation {turned}" if turned > 1 else ""),
                *_checks_of_pixels(picture, image, even),
            )
            grey = picture.convert("L")
            thumb = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
            bits = int(str(imagehash.phash(grey)), 16)
    except MemoryError:
        return Look(bad="too large for the memory that is free")
    except Exception as error:  # whatever a damaged file raises is its finding
        return Look(bad=bad_reason(error))
    notes = [(kind, detail) for kind, detail in checks if detail]
    return Look(sha256=hashlib.sha256(content).hexdigest(), hash=bits, thumb=thumb, notes=notes, even=even)


def _checks_of_pixels(picture: Any, image: Any, even: bool) -> tuple[tuple[str, str], ...]:
    """Of the picture as it is read, and of the image that it was made of, whose greys may be deeper."""
    short, long = sorted(picture.size)
    size = f"{picture.width} x {picture.height}"
    # Seen small, a title page and a night sky are as even as a blank sheet.
    flat = even and max(high - low for low, high in picture.getextrema()) < BLANK
    unused = _unused_range(image, flat) if deep_grey(image) else ""
    return (
        ("tiny", size if short < TINY else ""),
        ("long and narrow", size if long > EXTREME * short else ""),
        ("little of the range used", unused),
        ("blank", "one even colour" if flat and not unused else ""),
    )


def _unused_range(image: Any, flat: bool) -> str:
    """What to say of deep greys of which 8 bits keep next to nothing; "" for others, and for blank ones."""
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    full, words = (1.0, "of 0 to 1") if image.mode == "F" else (65535.0, "of what 16 bits hold")
    low, high = (float(values.min()) / full, float(values.max()) / full) if values.size else (0.0, 0.0)
    if low < 0 or high > 1 or (high - low) * 65535 < BLANK:  # beyond the range a picture is scaled by its own
        return ""
    if high <= DARK:
        return f"its values fill only the lowest {100 * high:.2g} % {words}: nearly black as it is read"
    return f"its values fill only {100 * (high - low):.2g} % {words}: nearly even as it is read" if flat else ""


def other_files(root: Path) -> Iterator[tuple[str, str, str]]:
    """(kind of finding, path, detail) of every file that is not listed as a picture."""
    for here, names in walk(root, root, hidden=True):
        for name in sorted(names):
            path = Path(here, name)
            short, ending, detail = path.relative_to(root), path.suffix.lower(), ""
            if name.lower() in LITTER:
                kind = "left by an operating system"
            elif any(part.startswith(".") for part in short.parts):
                kind = "hidden"
            elif ending not in IMAGE_EXTENSIONS:
                right = "" if ending in RAW else starts_like_a_picture(path)
                kind, detail = (NAMELESS, f"{right} by its content") if right else ("no picture", ending)
            else:
                continue
            yield kind, short.as_posix(), detail


def starts_like_a_picture(path: str | Path) -> str:
    """The ending that an ordinary file should have by its first bytes, whatever its name; "" if it begins as no picture."""
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            return ""
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError:
        return ""
    return next((ending for pattern, ending in _STARTS if pattern.match(start)), "")
