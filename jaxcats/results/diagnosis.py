"""doctor's findings as one HTML file with the pictures in question."""

import base64
import io
import os
from pathlib import Path
from typing import Any

from jaxcats.data.preprocess import PictureError, open_picture, upright
from jaxcats.results.report import page_environment
from jaxcats.storage.atomic import write_text

SIDE = 140  # of a thumbnail, in pixels
MOST, MOST_ALIKE = 60, 6  # items of a finding that are shown, and pictures of an item; --json has all


def write_diagnosis(path: Path, report: dict[str, Any]) -> None:
    """Writes the page about what `doctor.diagnose` returned. Raises OSError where it can't be written."""
    template = page_environment().get_template("diagnosis.html.j2")
    root = Path(report["folder"])
    bounds = {"most": MOST, "most_alike": MOST_ALIKE}
    write_text(path, template.render(report=report, thumbnail=lambda name: _thumbnail(root / name), **bounds))


def _thumbnail(path: Path) -> str:
    """A data: address, "" for what can't be shown."""
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        return ""
    out = io.BytesIO()
    try:
        with open_picture(path) as image:  # inside, whatever an odd file raises is a PictureError
            picture = upright(image)
            picture.thumbnail((SIDE, SIDE))
            picture.save(out, "WEBP", quality=60)
    except (PictureError, MemoryError):
        return ""
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
