"""The installed versions that decide a run's numbers together with its configuration."""

import contextlib
import importlib.metadata
import platform

COMPUTING = ["jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "tensorflow", "numpy"]
READING = ["pillow", "safetensors"]


def versions() -> dict[str, str]:
    """Name -> version of Python, the platform, jaxcats and the installed libraries."""
    installed = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ["jaxcats", *COMPUTING, *READING]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed
