"""figures/ and report.html of a judged run."""

import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats import run_figures
from jaxcats.config import to_yaml
from jaxcats.data.preprocess import PictureError
from jaxcats.errors import unwritable
from jaxcats.own import words
from jaxcats.results import plots, report
from jaxcats.results.table import overfitting
from jaxcats.run_figures import Judged

CAPTIONS = {
    "losses": (
        "Loss by step",
        "Overfitting shows as a validation loss that turns up while the training loss goes on falling.",
    ),
    "learning_rate": ("Learning rate by step", "What the schedule did."),
    "confusion": (
        "What is taken for what",
        "A row is what the pictures are, a column what they were taken for; everything off the diagonal is a mistake.",
    ),
    "per_class": (
        "Recall by class",
        "The share of each class that was found, with its 95 % interval; wide ones rest on few pictures.",
    ),
    "reliability": (
        "Can the probabilities be believed?",
        "Points on the diagonal are right as often as they say; below it the classifier is too sure of itself.",
    ),
    "risk_coverage": (
        "Errors by share of pictures answered",
        "How many of the answers are wrong when only the surest are given; the point is the threshold chosen.",
    ),
    "heat_maps": (
        "Where the network looked",
        "Grad-CAM on the last block, for the class named: it should light up on the thing, not on its surroundings.",
    ),
}
NARROW = 0.1  # width of the accuracy's interval beyond which it is said that the pictures are few


def present(folder: Path, run: Any, split: Any, logits: np.ndarray, found: Mapping[str, Any]) -> None:
    """Draws figures/*.png and writes report.html; a picture that has gone since is said and left out.

    Args:
        folder: where to.
        run: judging.Run.
        split: N labelled pictures.
        logits: [N, C].
        found: metrics.json's content.
    """
    judged = Judged(run, split, logits, found)
    curves = run_figures.of_training(run.folder) | run_figures.of_numbers(judged)
    drawn = dict(curves)
    try:
        drawn |= {"heat_maps": run_figures.heat_maps(judged)} | run_figures.galleries(judged)
    except (PictureError, OSError) as e:
        print(f"The galleries are not drawn: a picture can't be read any more ({e}).", file=sys.stderr)
    try:
        for name, figure in drawn.items():
            dpi = 120 if name in curves else 80  # galleries are photos: a megabyte each is enough
            plots.write(figure, folder / "figures" / f"{name}.png", dpi=dpi)
        report.write_report(folder / "report.html", page(folder, judged, curves))
    except OSError as e:
        raise unwritable(f"{folder}: figures and report", e) from None


def page(folder: Path, judged: Judged, curves: Mapping[str, plots.Figure]) -> report.Report:
    """What the report says."""
    run, found = judged.run, judged.found
    kept = _read(run.folder / "data.json", dict)
    figures = [_figure(name, plots.to_svg(figure), found) for name, figure in curves.items()]
    tested = [name for name, phase in run.config.phases.items() if phase.lr == "auto"]
    of_lr_find = (run.folder / "figures" / f"lr_find_{name}.png" for name in tested)
    for path in filter(Path.is_file, of_lr_find):
        text = "The loss while the learning rate grew; a good rate is where it falls fastest."
        figures.insert(0, report.Figure(path.stem, "Learning rate range test", text, text, path.read_bytes()))
    heat = folder / "figures" / "heat_maps.png"
    if heat.is_file():
        figures.append(_figure("heat_maps", heat.read_bytes(), found))
    own = folder == run.folder
    kind = "test " if found.get("split") == "test" else ""
    where = run.config.data.root if own else found.get("data", "")
    return report.Report(
        title=f"{run.folder.resolve().name}: {' / '.join(run.classes[:4])}{' / …' if len(run.classes) > 4 else ''}",
        classes=run.classes,
        trained=trained(run, kept) | {"judged on": f"{found['n']:,} {kind}pictures of {where}"},
        found=found,
        pictures=report.Pictures(
            root=judged.split.root,
            paths=judged.split.paths,
            labels=judged.split.labels,
            log_probs=judged.log_probs,
            threshold=found["abstain"]["threshold"],
        ),
        notes=worries(judged, kept),
        figures=figures,
        findings=kept.get("findings", []),
        suspects=_suspects(run.folder / "suspects.csv"),
        config=to_yaml(run.config),
        facts=_facts(run),
        commands=_commands(run),
    )


def trained(run: Any, kept: Mapping[str, Any]) -> dict[str, str]:
    """What was trained on what, name to text."""
    config = run.config
    pictures = {name: sum(by_class.values()) for name, by_class in kept.get("pictures", {}).items()}
    phases = [
        f"{name}: {p.epochs} epoch{'s' * (p.epochs > 1)}, {p.optimizer}, {p.schedule}, "
        + ("features computed once" if p.precompute else f"{p.freeze} frozen, augmentation {p.augment}")
        for name, p in config.phases.items()
    ]
    start = "pretrained" if config.model.pretrained else "from random weights"
    rows = {
        "network": f"{config.model.backbone} ({start}), {config.model.head} head, {run.preprocess.size} px",
        "classes": f"{len(run.classes)}: {', '.join(run.classes[:12])}{', …' if len(run.classes) > 12 else ''}",
        "pictures": ", ".join(f"{n:,} {name}" for name, n in pictures.items()),
        "phases": "; ".join(phases),
        "own functions": words(run.checkpoint["own"]) if "own" in run.checkpoint else "",
        "checkpoint": f"{run.checkpoint['use']}, step {run.checkpoint['step']:,}",
    }
    return {name: text for name, text in rows.items() if text}


def worries(judged: Judged, kept: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """What to bear in mind before trusting the result, the gravest first."""
    run, found = judged.run, judged.found
    notes: list[tuple[Any, str]] = []
    own = found["calibration"]["fitted_on_these_pictures"]
    for finding in kept.get("findings", []):
        kind = "serious" if finding["grave"] else "caution"
        notes.append((kind, f"{finding['what'].capitalize()}: {finding['count']:,}. {finding['meaning']}"))
    if own and run.checkpoint["valid_used_for"]:
        notes.append(
            ("serious", "These pictures chose the best epoch, so the result flatters; judge on others with --data.")
        )
    for name, count in found.get("seen_before", {}).items():
        text = f"Among these pictures {count:,} of the run's own {name} pictures were found: the result flatters."
        notes.append(("serious", text))
    low, high = found["interval"]
    if high - low > NARROW:
        few = f"With {found['n']:,} pictures the accuracy is only known to lie between {100 * low:.1f} and {100 * high:.1f} %."
        notes.append(("caution", few))
    epochs = [row for row in run_figures.training_rows(run.folder) if "valid_loss" in row]
    of_last_phase = [row for row in epochs if row.get("phase") == epochs[-1].get("phase")]
    if grown := overfitting(of_last_phase):
        notes.append(("caution", grown))
    for row in found["per_class"]:
        if row["recall_interval"] and row["recall_interval"][1] < low:
            text = f"{row['class']}: only {row['right']:,} of {row['n']:,} were found, fewer than in the other classes."
            notes.append(("caution", text))
    if "own" in run.checkpoint:
        text = "Training used functions that the configuration doesn't hold: {}. Only the script that has them does the same again."
        notes.append(("note", text.format(words(run.checkpoint["own"]))))
    if own:
        used = "The temperature and the abstain threshold were chosen on these pictures; what is said of them is out of fold."
        notes.append(("note", used))
    return sorted(notes, key=lambda note: ("serious", "caution", "note").index(note[0]))


def _figure(name: str, image: str | bytes, found: Mapping[str, Any]) -> report.Figure:
    title, caption = CAPTIONS[name]
    alt = f"{title}. {found['errors']:,} errors of {found['n']:,}."
    return report.Figure(name, title, caption, alt, image, wide=name == "heat_maps")


def _read(path: Path, kind: type) -> Any:
    """A JSON file of the run folder; empty where it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return value if isinstance(value, kind) else kind()


def _suspects(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, csv.Error):
        return []


def _facts(run: Any) -> dict[str, str]:
    """Versions and hashes, name to text."""
    kept = _read(run.folder / "versions.json", dict)
    weights = {f"weights {k}": v for k, v in kept.get("weights", {}).items() if v is not None}
    model = _read(run.folder / "model" / "model.json", dict)
    hashes = {f"model/{name}": facts.get("sha256", "") for name, facts in model.get("files", {}).items()}
    rest = {
        "pictures (hash of contents and labels)": run.fingerprint.partition("-")[0],
        "backend": kept.get("backend", ""),
    }
    return {k: str(v) for k, v in (kept.get("versions", {}) | weights | rest | hashes).items() if v}


def _commands(run: Any) -> dict[str, str]:
    rows = {
        "predict": f"python -m jaxcats.predict --model {run.folder}/model PICTURES...",
        "judge another folder": f"python -m jaxcats.evaluate --run {run.folder} --data FOLDER",
        "look for wrong labels": f"python -m jaxcats.evaluate --run {run.folder} --split train",
        "train again": f"python -m jaxcats.train --config {run.folder}/config.yaml",
    }
    hidden = ["predict"] * (not (run.folder / "model").is_dir()) + ["train again"] * ("own" in run.checkpoint)
    return {k: v for k, v in rows.items() if k not in hidden}
