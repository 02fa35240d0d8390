"""Folders of small images for the tests of whole runs."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(
    root: Path, *, train: int = 24, valid: int = 10, classes=("cats", "dogs"), size=(48, 40), seed=0
) -> Path:
    """A folder of noisy images whose mean colour leans by class: learnable, not trivial."""
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("valid", valid)):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count // len(classes)):
                pixels = rng.normal(128, 50, (size[1], size[0], 3)) + np.eye(3)[label % 3] * 25
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.{i}.jpg", quality=90)
    return root
