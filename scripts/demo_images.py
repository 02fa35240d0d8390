"""Draws images of cats and dogs, so that the quick start and the tests need no download:

python scripts/demo_images.py FOLDER [--n_train 300] [--n_valid 120] [--seed 0]
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from drawing import animal_image

from jaxcats.common.errors import UserError
from jaxcats.common.io import write_json

MARKER = "jaxcats-demo.json"
DRAWING_VERSION = 1
CLASSES = ("cats", "dogs")


def draw(folder: str | os.PathLike[str], *, n_train: int = 300, n_valid: int = 120, seed: int = 0) -> Path:
    """Draws cats and dogs into `folder`/train/{cats,dogs} and `folder`/valid/{cats,dogs}.

    The same arguments give the same images with the same version of Pillow. A folder that has them all stays as it is.

    Args:
        folder: a new or empty folder, or one that this function has filled before.
        n_train: number of training images; half of them are cats.
        n_valid: number of validation images; half of them are cats.
        seed: seed of the drawing.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds other files. They are never touched.
    """
    root = Path(os.path.expanduser(folder))
    if min(n_train, n_valid) < 2:
        raise UserError(f"n_train, n_valid: {n_train} and {n_valid}; a demo needs at least two images in each")
    wanted = {
        "made_by": "jaxcats.data.demo",
        "version": DRAWING_VERSION,
        "train": n_train,
        "valid": n_valid,
        "seed": seed,
    }
    jobs = {
        root / part / name / f"{name[:-1]}.{number:04d}.jpg": (seed, place, label, number)
        for place, (part, total) in enumerate((("train", n_train), ("valid", n_valid)))
        for label, name in enumerate(CLASSES)
        for number in range((total + 1 - label) // 2)
    }
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        marker = _read_marker(root)
        if marker is None:
            raise UserError(f"{root}: holds something other than demo images; give a new or an empty folder")
        if marker == wanted | {"complete": True} and all(path.is_file() for path in jobs):
            return root
        for path in root.glob("*/*/*.jpg"):
            if re.fullmatch(
                r"(train/cats/cat|train/dogs/dog|valid/cats/cat|valid/dogs/dog)\.\d{4,}\.jpg",
                path.relative_to(root).as_posix(),
            ):
                path.unlink()
    for path in jobs:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(root / MARKER, wanted | {"complete": False})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_save, jobs.keys(), jobs.values()))
    write_json(root / MARKER, wanted | {"complete": True})
    return root


def _save(path: Path, key: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(key)
    animal_image(rng, cat=key[2] == 0).save(path, quality=int(rng.integers(35, 96)))


def _read_marker(root: Path) -> dict | None:
    try:
        marker = json.loads((root / MARKER).read_text(encoding="utf-8"))
        return marker if marker["made_by"] == "jaxcats.data.demo" else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python scripts/demo_images.py FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="python scripts/demo_images.py", description="Draws demo images of cats and dogs."
    )
    parser.add_argument("folder", help="a new or empty folder")
    parser.add_argument("--n_train", type=int, default=300, help="images for training (default 300)")
    parser.add_argument("--n_valid", type=int, default=120, help="images for validation (default 120)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        folder = draw(args.folder, n_train=args.n_train, n_valid=args.n_valid, seed=args.seed)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.n_train} training and {args.n_valid} validation images in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
