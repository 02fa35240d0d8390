"""What the pages of report.py and doctor share: escaping templates, thumbnails as data URIs; and doctor's page."""

import base64
import hashlib
import io
import os
from pathlib import Path
from typing import Any

from jaxcats.common.errors import one_line
from jaxcats.common.io import write_text
from jaxcats.data.images import ImageError, decode, open_image

PERCENT = "\N{NO-BREAK SPACE}%"
SIDE = 140  # longer side of a thumbnail, in pixels


def render(template: str, **context: Any) -> str:
    """A template of templates/ as text without lone surrogates, which file names that are not UTF-8 would bring in."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"line": one_line, "percent": percent, "sha256": _sha256}
    return environment.get_template(template).render(**context).encode("utf-8", "backslashreplace").decode("utf-8")


def percent(p: float) -> str:
    """'97.1 %'; a probability below 1 is never shown as 100."""
    if 0.9995 <= p < 1:
        return f">\N{NO-BREAK SPACE}99.9{PERCENT}"
    return f"<\N{NO-BREAK SPACE}0.1{PERCENT}" if 0 < p < 0.0005 else f"{100 * p:.1f}{PERCENT}"


def write_diagnosis(path: Path, report: dict[str, Any]) -> None:
    """Writes the page about what `doctor.diagnose` returned. Raises OSError where it can't be written."""
    root = Path(report["folder"])
    write_text(path, render("diagnosis.html.j2", report=report, root=root, thumbnail=embedded_thumbnail))


def embedded_thumbnail(path: Path, side: int = SIDE) -> tuple[str, str]:
    """(data URI, "") of an image file's thumbnail, or ("", the reason) where it can't be read."""
    if path.exists() and not path.is_file():
        return "", "not a file"  # opening a pipe would wait for ever
    try:
        return "data:image/webp;base64," + base64.b64encode(thumbnail(path, side=side)).decode(), ""
    except (ImageError, MemoryError) as e:
        return "", str(e)


def embedded_image(path: Path) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def thumbnail(source: "str | os.PathLike[str] | bytes", *, side: int = SIDE) -> bytes:
    """An image as a small WebP file, upright and whole, with at most `side` pixels on its longer side.

    Raises ImageError with the reason.
    """
    with open_image(source) as file:
        file.draft(None, (2 * side, 2 * side))  # JPEG decodes straight to half, a quarter or an eighth
        image = decode(file).image
        image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, "WEBP", quality=55, method=2)
    return data.getvalue()


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
