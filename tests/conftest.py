"""Shared fixtures. Every test has its own cache folder, so that none depends on another or on the user's cache."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes into compiling small programs: half as much of it without LLVM's slowest passes. (At level 0
# some programs give NaN.)
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=1"
).strip()
# Otherwise the cache folder's path is part of every program's key, and tests with folders of their own share nothing.
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

import pytest
from folders import write_images

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


@pytest.fixture
def pictures(tmp_path) -> Path:
    """24 training and 10 validation images of two classes."""
    return write_images(tmp_path / "pictures")
