"""doctor's findings as one HTML file with the pictures in question."""

import base64
import io
from pathlib import Path
from typing import Any

from jaxcats.data.preprocess import PictureError, open_upright
from jaxcats.results.report import page_environment
from jaxcats.storage.atomic import write_text

SIDE = 140  # of a thumbnail, in pixels
MOST = 60  # items of a finding that are shown; --json has all


def write_diagnosis(path: Path, report: dict[str, Any]) -> None:
    """Writes the page about what `doctor.diagnose` returned. Raises OSError where it can't be written."""
    template = page_environment().get_template("diagnosis.html.j2")
    root = Path(report["folder"])
    write_text(path, template.render(report=report, most=MOST, thumbnail=lambda name: _thumbnail(root / name)))


def _thumbnail(path: Path) -> str:
    """A data: address, "" for what can't be shown."""
    try:
        picture = open_upright(path)
    except (PictureError, MemoryError):
        return ""
    picture.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=60)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
