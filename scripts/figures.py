"""Draws every schedule in one picture and every augmentation in another: python scripts/figures.py --photo FILE [--out runs/figures]."""

import argparse
from pathlib import Path

import jax
import numpy as np

from jaxcats.core import schedules
from jaxcats.data import augment
from jaxcats.data.preprocess import Preprocess, evaluation_pixels
from jaxcats.results import plots

STEPS, PEAK, DRAWS = 700, 0.01, 6


def all_schedules() -> plots.Figure:
    """Learning rate by step of every schedule; those of fine_tune one after the other."""
    kinds = {
        "constant": schedules.constant(PEAK),
        "warmup_cosine": schedules.warmup_cosine(PEAK, STEPS),
        "cosine": schedules.cosine(PEAK, STEPS),
        "sgdr: fit(0.01, 3, cycle_len=1, cycle_mult=2)": schedules.sgdr(PEAK, [100, 200, 400]),
        "one_cycle": schedules.one_cycle(PEAK, STEPS),
        "one_cycle's momentum": schedules.one_cycle_momentum((0.95, 0.85, 0.95), STEPS),
        "exponential": schedules.exponential(PEAK, PEAK / 100, STEPS),
    }
    curves = {name: np.asarray(jax.vmap(s)(np.arange(STEPS))) for name, s in kinds.items()}
    frozen = schedules.one_cycle(PEAK, 100, warmup=0.99)
    every = schedules.one_cycle(PEAK / 2, 600, warmup=0.3, div=5.0)
    parts = [np.asarray(jax.vmap(s)(np.arange(n))) for s, n in ((frozen, 100), (every, 600))]
    return plots.schedules({**curves, "fine_tune: head, then all layers": np.concatenate(parts)})


def all_augmentations(photo: Path, size: int = 224) -> plots.Figure:
    """Every preset, and rotation, zoom and light alone, with some draws of each."""
    single = {
        "rotate": augment.Augmentation(rotate=10.0, p=1.0),
        "zoom": augment.Augmentation(zoom=8 / 7),
        "lighting": augment.Augmentation(lighting=0.2, p=1.0),
    }
    pictures, titles = [], []
    for name, how in {**augment.PRESETS, **single}.items():
        pixels = evaluation_pixels(photo, augment.source_preprocess(Preprocess(size=size), how))
        rows = np.arange(DRAWS, dtype=np.int32)
        images = np.repeat(pixels[None], DRAWS, 0)
        if how is not None:
            images = augment.make_augment(how, key=jax.random.key(0), size=size)(images, 0, rows)
        pictures += list(np.clip(np.round(np.asarray(images, np.float32)), 0, 255).astype(np.uint8))
        titles += [name] * DRAWS
    return plots.gallery(pictures, titles, columns=DRAWS)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--photo", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("runs/figures"))
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in (("schedules", all_schedules()), ("augmentations", all_augmentations(args.photo))):
        figure.savefig(args.out / f"{name}.png", dpi=60)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
