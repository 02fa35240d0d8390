import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCATS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photo():
    """photo(seed, width, height): an RGB image with smooth parts and edges, different for every seed."""

    def make(seed: int, width: int = 60, height: int = 44) -> Image.Image:
        small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        image.paste((250, 10, 10), (0, 0, width // 3, height // 4))
        return image

    return make


@pytest.fixture
def encoded(photo):
    """encoded(image or seed, format, orientation=..., **options): a file's content."""

    def make(image, kind: str = "JPEG", *, orientation: int | None = None, **options) -> bytes:
        image = photo(image) if isinstance(image, int) else image
        if orientation is not None:
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            options["exif"] = exif
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return make


@pytest.fixture
def folder(tmp_path, encoded):
    """folder({"train/cats/a.jpg": seed or content, ...}, under="photos"): written files, and their root."""

    def make(files: dict[str, int | bytes], under: str = "photos") -> Path:
        root = tmp_path / under
        root.mkdir(exist_ok=True)
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(content) if isinstance(content, int) else content)
        return root

    return make


@pytest.fixture
def two_classes(folder):
    """A sound folder: 3 + 3 images to train on, 1 + 1 for validation."""
    names = [f"train/{kind}s/{kind}{i}.jpg" for kind in ("cat", "dog") for i in range(3)]
    return folder({name: seed for seed, name in enumerate([*names, "valid/cats/x.jpg", "valid/dogs/y.jpg"])})


@pytest.fixture
def real_photos() -> Path:
    place = os.environ.get("JAXCATS_PHOTOS")
    if not place:
        pytest.skip("JAXCATS_PHOTOS is not set: no real photos to try")
    return Path(place).resolve()
