"""Draws every figure of the package, so that a person can look at them:

    python scripts/figures.py [--out runs/figures] [--photo FILE] [--run RUN] [--few]

The predictions are invented, for 2, 10, 30 and 100 classes and some awkward cases. --run adds the figures of a run's
predictions.csv, --photo adds every augmentation of that image, and --few draws two classes only.
"""

import argparse
import csv
import textwrap
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from drawing import animal_image

from jaxcats import plots
from jaxcats.common import stats
from jaxcats.core import schedules
from jaxcats.data import augment
from jaxcats.data.images import Preprocess, evaluation_pixels
from jaxcats.evaluate import calibration, ranking
from jaxcats.plots.base import style_axes

STEPS, PEAK = 700, 0.01
DRAWS = 6  # of each augmentation: a row of a large gallery


def all_schedules() -> plots.Figure:
    """Learning rate by step of every schedule, each in a panel of its own; those of fine_tune one after the other."""
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
    curves["fine_tune: head, then all layers"] = np.concatenate(parts)
    figure = plots.Figure(figsize=(10, 7), layout="constrained")
    axes = list(figure.subplots(3, 3).flat)
    for ax, (name, values) in zip(axes, curves.items(), strict=False):
        style_axes(ax, "iteration", "learning rate").plot(values)
        ax.set_title("\n".join(textwrap.wrap(name, 34)), fontsize=10, loc="left")
    for ax in axes[len(curves) :]:
        ax.axis("off")
    return figure


def all_augmentations(photo: Path, size: int = 224) -> plots.Figure:
    """Every preset, and rotation, zoom and light alone, with some draws of each."""
    single = {
        "rotate": augment.Augmentation(rotate=10.0, p=1.0),
        "zoom": augment.Augmentation(zoom=8 / 7),
        "lighting": augment.Augmentation(lighting=0.2, p=1.0),
    }
    images, titles = [], []
    for name, augmentation in {**augment.PRESETS, **single}.items():
        pixels = evaluation_pixels(photo, augment.source_preprocess(Preprocess(size=size), augmentation))
        rows = np.arange(DRAWS, dtype=np.int32)
        batch = np.repeat(pixels[None], DRAWS, 0)
        if augmentation is not None:
            batch = augment.make_augment(augmentation, key=jax.random.key(0), size=size)(batch, 0, rows)
        images += list(np.clip(np.round(np.asarray(batch, np.float32)), 0, 255).astype(np.uint8))
        titles += [name] * DRAWS
    return plots.gallery(images, titles)


BREEDS = (
    "Abyssinian", "Bengal", "Staffordshire bull terrier with a long name", "сибирская кошка", "Sphynx", "a$b_c^2",
    "柴犬 (しばいぬ)", "Maine Coon", "n02099712_Labrador_retriever_with_a_long_id", "Čeština – ελληνικά",
)  # fmt: skip


def invent_predictions(
    n: int, classes: int, *, accuracy: float, sharpness: float = 2.0, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Returns (logits [n, C], labels [n]) of a network with this accuracy that is overconfident by `sharpness`."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=rng.dirichlet(np.full(classes, 20.0)))
    noise = rng.gumbel(size=(n, classes))
    noise[:, :] += 1.5 * (rng.random((classes, classes)) < 3 / classes)[labels]  # classes that look alike
    of_label = noise[np.arange(n), labels]
    noise[np.arange(n), labels] = -np.inf
    noise[np.arange(n), labels] = of_label + np.quantile(noise.max(1) - of_label, accuracy)
    return sharpness * noise, labels


def evaluation_figures(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, max_error: float
) -> dict[str, plots.Figure]:
    """The figures that follow from logits and labels, by name."""
    n, c = logits.shape
    correct = logits.argmax(1) == labels
    counts = np.bincount(c * labels + logits.argmax(1), minlength=c * c).reshape(c, c)
    before = np.exp(stats.log_softmax(logits).max(1))
    after = np.exp(calibration.cross_fit(logits, labels)[0].max(1))
    threshold = calibration.choose_threshold(after, correct, max_error=max_error)
    answered = calibration.Calibration(threshold=threshold).is_answered(after)
    chosen = calibration.abstain_metrics(answered, correct)
    rows = [
        {"class": name, "n": int(row.sum()), "recall": row[i] / row.sum() if row.sum() else None}
        | {"recall_interval": stats.wilson_interval(int(row[i]), int(row.sum()))}
        for i, (name, row) in enumerate(zip(classes, counts, strict=True))
    ]
    return {
        "confusion": plots.confusion(counts, classes),
        "reliability": plots.reliability(
            {
                title: (
                    calibration.reliability(confidence, correct),
                    calibration.expected_calibration_error(confidence, correct),
                    confidence,
                )
                for title, confidence in (("as trained", before), ("with the temperature", after))
            }
        ),
        "risk_coverage": plots.risk_coverage(
            *calibration.risk_coverage(after, correct),
            n=n,
            point=None if threshold is None else (chosen["coverage"], chosen["error"]),
            max_error=max_error,
        ),
        "per_class": plots.per_class(rows),
    }


def galleries(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], images: Sequence
) -> dict[str, plots.Figure]:
    """Top losses, and the same images with invented heat maps."""
    log_probs = stats.log_softmax(logits)
    rows = ranking.top_losses(log_probs, labels, n=9)
    titles = plots.top_loss_titles(log_probs, labels, classes, rows)
    wrong = [bool(log_probs[i].argmax() != labels[i]) for i in rows]
    heading = "Top losses: prediction / actual / loss / probability"
    shown = [images[i % len(images)] for i in rows]
    squares = [evaluation_pixels(p, Preprocess(size=224)) for p in shown[:6]]
    y, x = np.mgrid[:7, :7]
    heats = [np.exp(-((y - 2 - i % 3) ** 2 + (x - 3) ** 2) / 4) for i in range(len(squares))]
    return {
        "top_losses": plots.gallery(shown, titles, wrong=wrong, heading=heading),
        "heat_maps": plots.heat_maps(squares, heats, titles[:6], wrong=wrong[:6], heading="Where it looked (invented)"),
    }


def curves() -> dict[str, plots.Figure]:
    """Losses and learning rates of an invented run."""
    rng, steps = np.random.default_rng(0), np.arange(96)
    train = 0.6 * np.exp(-steps / 12) + 0.04 * rng.gamma(1.0, 1.0, len(steps))
    rate = np.asarray(jax.vmap(schedules.one_cycle(PEAK, 96))(steps))
    momentum = np.asarray(jax.vmap(schedules.one_cycle_momentum((0.95, 0.85, 0.95), 96))(steps))
    groups = {"early layers": rate / 100, "late layers": rate / 10, "head layers": rate}
    return {
        "losses": plots.losses(steps, train, [31, 63, 95], [0.071, 0.058, 0.061], best=1),
        "learning_rates": plots.learning_rates(groups, momentum=momentum),
    }


def read_predictions(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns (logits [n, C], labels [n], classes) of a predictions.csv."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = [row for row in csv.DictReader(file) if row["label"]]
    classes = [name.removeprefix("p_") for name in rows[0] if name.startswith("p_")]
    probabilities = np.array([[float(row["p_" + name]) for name in classes] for row in rows])
    labels = np.array([classes.index(row["label"]) for row in rows])
    return np.log(np.maximum(probabilities, 1e-30)), labels, classes


def every_figure(args: argparse.Namespace) -> dict[str, plots.Figure]:
    """Every figure by the name of its file."""
    figures = {"schedules": all_schedules(), **curves()}
    if args.photo:
        figures["augmentations"] = all_augmentations(args.photo)
    animals = [animal_image(np.random.default_rng(i), cat=i % 2 == 0) for i in range(12)]
    many = [
        f"{a}{b}" for a in ("Abra", "Bole", "Cali", "Dora", "Elm") for b in [f" terrier {k:02d}" for k in range(20)]
    ]
    cases = {
        "2": (("cats", "dogs"), 1000, 0.99),
        "10": (BREEDS, 1500, 0.95),
        "100": (many, 5000, 0.99),
        "100_weak": (many, 5000, 0.75),
        "2_long": ((BREEDS[2], BREEDS[6]), 100_000, 0.999),
        "30": (many[:30], 900, 0.9),
        "one_image": (("cats", "dogs"), 1, 1.0),
    }
    for name, (classes, n, accuracy) in list(cases.items())[: 1 if args.few else None]:
        logits, labels = invent_predictions(n, len(classes), accuracy=accuracy)
        drawn = evaluation_figures(logits, labels, classes, max_error=0.005)
        drawn |= galleries(logits, labels, classes, animals)
        figures |= {f"{name}_{kind}": figure for kind, figure in drawn.items()}
    if args.run:
        logits, labels, classes = read_predictions(args.run / "predictions.csv")
        drawn = evaluation_figures(logits, labels, classes, max_error=0.005)
        figures |= {f"run_{kind}": figure for kind, figure in drawn.items()}
    return figures


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/figures"), help="folder for the PNG and SVG files")
    p.add_argument("--photo", type=Path, help="an image for the figure of all augmentations")
    p.add_argument("--run", type=Path, help="a run folder with a predictions.csv")
    p.add_argument("--few", action="store_true", help="draw two classes only")
    args = p.parse_args()
    for name, figure in every_figure(args).items():
        plots.write(figure, args.out / f"{name}.png", dpi=80)
        if not name.endswith(("top_losses", "heat_maps", "augmentations")):
            (args.out / f"{name}.svg").write_text(plots.to_svg(figure), encoding="utf-8")
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
