"""Shared fixtures. Every test has its own cache folder, so that none depends on another or on the user's cache."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
import pytest
from PIL import Image

PHOTOS = os.environ.get("JAXCATS_PHOTOS")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Compiled programs, shared: they are keyed by their content, and compiling them anew for each test takes minutes."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, compiled):
    """JAXCATS_CACHE in a fresh folder."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "xla").symlink_to(compiled)
    monkeypatch.setenv("JAXCATS_CACHE", str(folder))
    return folder


@pytest.fixture
def photos() -> Path:
    """The real photos' folder, or a skip."""
    if not PHOTOS:
        pytest.skip("set JAXCATS_PHOTOS to a folder with train/ and valid/ of real photos to run this test")
    return Path(PHOTOS)


def write_pictures(
    root: Path, *, train: int = 24, valid: int = 10, classes=("cats", "dogs"), size=(48, 40), seed=0
) -> Path:
    """A folder of noisy pictures whose mean colour leans by class: learnable, not trivial."""
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("valid", valid)):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count // len(classes)):
                pixels = rng.normal(128, 50, (size[1], size[0], 3)) + np.eye(3)[label % 3] * 25
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.{i}.jpg", quality=90)
    return root


@pytest.fixture
def pictures(tmp_path) -> Path:
    """24 training and 10 validation pictures of two classes."""
    return write_pictures(tmp_path / "pictures")
