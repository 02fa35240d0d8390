"""The page: one self-contained HTML file about a run, which opens from disk and asks nobody for anything."""

import base64
import csv
import hashlib
import html
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from jaxcats import plots
from jaxcats.common import stats
from jaxcats.common.config import to_yaml
from jaxcats.common.errors import unwritable
from jaxcats.common.io import write_text
from jaxcats.common.stats import PERCENT, percent
from jaxcats.data.images import ImageError, open_image, open_upright, upright
from jaxcats.evaluate import figures as figures_module
from jaxcats.evaluate.figures import EvaluatedSplit
from jaxcats.train.epoch_table import overfitting
from jaxcats.train.user_functions import describe_functions

BUDGET = 5_000_000  # bytes of a page: what still goes through mail
SIDE, LARGE_SIDE = 110, 224  # shorter side of an image in the gallery, in pixels
QUALITY = 60  # of the gallery's WebP
LARGE = 48  # images kept in the larger size: the wrong ones, then the least sure
LEAST_SURE = 100  # right but least sure ones that are always shown, however many images there are
MARKUP = 450  # bytes around an image and its names
WIDEST = 3  # longer side of a gallery image, in shorter sides; what is beyond is cut off
SUSPECTS = 48  # shown with their image
LARGEST_FIGURE = (1800, 9000)  # in pixels; of figures that come as images


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images that were judged.

    Attributes:
        root: the folder that `paths` are relative to.
        paths: N of them.
        labels: int [N], all known.
        log_probs: float [N, C], as predict says them: after the temperature.
        threshold: of the probability below which the classifier abstains; None: it never does.
    """

    root: Path
    paths: Sequence[str]
    labels: np.ndarray
    log_probs: np.ndarray
    threshold: float | None = None


@dataclass(frozen=True)
class Figure:
    """One figure: `image` is an <svg> element from plots.to_svg (it goes into the page as it is) or an image file's content.

    `caption` is a sentence that says how to read it, `alt` what it shows to someone who can't see it; a `wide` one gets
    a row of its own.
    """

    id: str
    title: str
    caption: str
    alt: str
    image: str | bytes
    wide: bool = False


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page says.

    Attributes:
        title: its heading.
        classes: names, in the order of the labels.
        trained: what was trained on what, name to text.
        found: metrics.json's content (see metrics.judge); only "n" and "errors" must be there.
        images: for the gallery.
        notes: what to worry about, the gravest first: ("serious" | "caution" | "note", a sentence).
        figures: in order.
        findings: about the data, {"what", "count", "examples", "meaning", "grave"} each (see data.findings).
        suspects: likely label errors, {"path", "label", "suggested", "reason"} each, the likeliest first; reason "label"
            (another class fits better), "outlier" (unlike others) or "label, outlier".
        config: YAML.
        facts: versions and hashes, name to text.
        commands: what one may want to do next, to the command that does it.
    """

    title: str
    classes: Sequence[str]
    trained: Mapping[str, str]
    found: Mapping[str, Any]
    pictures: Pictures
    notes: Sequence[tuple[Literal["serious", "caution", "note"], str]] = ()
    figures: Sequence[Figure] = ()
    findings: Sequence[Mapping[str, Any]] = ()
    suspects: Sequence[Mapping[str, Any]] = ()
    config: str = ""
    facts: Mapping[str, str] | None = None
    commands: Mapping[str, str] | None = None


def write_report(path: Path, report: Report, *, budget: int = BUDGET) -> None:
    """Writes the page, of at most `budget` bytes: images that don't fit are left out, and it says which.

    Raises OSError where it can't be written. An image that can't be read any more is shown by its name and the reason.
    """
    write_text(path, render(report, budget=budget))


def page_environment() -> Any:
    """jinja2's environment for pages, which escapes whatever a template says."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"line": shown_name, "percent": percent, "sha256": _sha256, "breadth": _breadth}
    return environment


def render(report: Report, *, budget: int = BUDGET) -> str:
    """The page as text without lone surrogates; see `write_report`."""
    template = page_environment().get_template("report.html.j2")
    d = stats.percent_digits(report.found["n"])
    figures = [replace(f, image=f.image if isinstance(f.image, str) else _embed(f.image)) for f in report.figures]
    facts = {
        "r": report,
        "figures": sorted(
            figures, key=lambda figure: "wide" in _breadth(figure)
        ),  # so that none leaves a gap beside it
        "result": stats.sentence(report.found["errors"], report.found["n"]).replace(" %", PERCENT),
        "share": lambda value: "–" if value is None else f"{100 * value:.{d}f}{PERCENT}",
        "number": lambda value: "–" if value is None else f"{value:.4g}",
    }
    suspects = _suspects(report)
    bare = template.render(**facts, suspects=suspects, items=[], shown="")
    items, shown = _gallery(report, room=budget - len(bare.encode("utf-8", "replace")))
    page = template.render(**facts, suspects=suspects, items=items, shown=shown)
    # File names that are not UTF-8 hold surrogates, which no page may hold.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def thumbnail(source: "str | os.PathLike[str] | bytes", *, side: int = SIDE, quality: int = QUALITY) -> bytes:
    """An image as a small WebP file, upright and whole (but of a strip only the middle): `side` pixels on its shorter side.

    Smaller images keep their size. Raises ImageError with the reason.
    """
    with open_image(source) as image:
        image.draft(None, (2 * side, 2 * side))  # JPEG decodes straight to half, a quarter or an eighth
        picture = upright(image)
    width, height = picture.size
    short = min(width, height)
    wide, high = min(width, WIDEST * short), min(height, WIDEST * short)
    left, top = (width - wide) / 2, (height - high) / 2
    scale = min(1.0, side / short)
    size = max(1, round(wide * scale)), max(1, round(high * scale))
    box = (left, top, left + wide, top + high)
    return _webp(picture.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0), quality=quality)


def shown_name(name: Any) -> str:
    """A file's or class's name on one line: what can't be printed (newlines, odd bytes, reversed writing) is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def _gallery(report: Report, *, room: int) -> tuple[list[dict[str, Any]], str]:
    """The images for the page, top losses first, and a sentence on those left out."""
    pictures = report.pictures
    n, labels = len(pictures.labels), np.asarray(pictures.labels)
    log_probs: np.ndarray = np.maximum(np.asarray(pictures.log_probs, np.float64), -1e6)
    predicted, losses = log_probs.argmax(1), -log_probs[np.arange(n), labels]
    highest = np.sort(np.exp(log_probs), axis=1)
    sure, margin = highest[:, -1], highest[:, -1] - highest[:, -2]
    by_loss, by_margin = np.argsort(-losses, kind="stable"), np.argsort(margin, kind="stable")
    wrong = by_loss[predicted[by_loss] != labels[by_loss]]
    right = by_margin[predicted[by_margin] == labels[by_margin]]
    rest = np.random.default_rng(0).permutation(right[LEAST_SURE:])
    order = [int(i) for i in np.concatenate([wrong, right[:LEAST_SURE], rest])]

    shown = _fit(report, order, room=room, quality=QUALITY)
    if len(shown) < n <= 1.5 * len(shown):
        shown = _fit(report, order, room=room, quality=QUALITY // 2)  # two thirds of the bytes: all of them may fit
    items = [
        {
            "path": shown_name(pictures.paths[i]),
            "src": shown[i][0],
            "reason": shown[i][1],
            "actual": int(labels[i]),
            "predicted": int(predicted[i]),
            "sure": float(sure[i]),
            "margin": float(margin[i]),
            "loss": float(losses[i]),
            "wrong": bool(labels[i] != predicted[i]),
            "unsure": pictures.threshold is not None and bool(sure[i] < pictures.threshold),
        }
        for i in by_loss.tolist()
        if i in shown
    ]
    return items, _left_out(len(shown), n, len(wrong))


def _fit(report: Report, order: Sequence[int], *, room: int, quality: int) -> dict[int, tuple[str, str]]:
    """(data URI, reason) of the images that `room` bytes hold, in that order; the first ones in the larger size."""
    root, paths = report.pictures.root, [report.pictures.paths[i] for i in order]
    sides = [LARGE_SIDE if k < LARGE else SIDE for k in range(len(order))]
    names = 2 * max(_length(name) for name in report.classes)
    shown: dict[int, tuple[str, str]] = {}
    for i, path, (src, reason) in zip(order, paths, _thumbnails(root, paths, sides, quality=quality), strict=True):
        room -= len(src) + 2 * _length(path) + _length(reason) + names + MARKUP
        if room < 0:
            break
        shown[i] = src, reason
    return shown


def _length(text: str) -> int:
    """Bytes of a name or a reason in the page."""
    return len(html.escape(shown_name(text)).encode())


def _left_out(kept: int, n: int, wrong: int) -> str:
    if kept == n:
        return ""
    least = min(LEAST_SURE, max(0, kept - wrong))
    drawn = kept - wrong - least
    parts = [f"all {wrong:,} wrong ones" if kept >= wrong else f"of the {wrong:,} wrong ones those of the highest loss"]
    parts += [f"the {least:,} least sure of the right ones"] if least else ["none of the right ones"]
    parts += [f"{drawn:,} of the others drawn at random"] if drawn > 0 else []
    return f"{kept:,} of {n:,} images are on this page, to keep it small: {', '.join(parts)}."


def _thumbnails(
    root: Path, paths: Sequence[str], sides: Sequence[int], *, quality: int = QUALITY
) -> Iterator[tuple[str, str]]:
    """(data URI, "") of each image in turn, or ("", the reason) where it can't be read; a few ahead, in threads."""

    def one(path: str, side: int) -> tuple[str, str]:
        try:
            return _embed(thumbnail(root / path, side=side, quality=quality)), ""
        except ImageError as e:
            return "", str(e)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), 64):
            yield from pool.map(one, paths[start : start + 64], sides[start : start + 64])


def _suspects(report: Report) -> list[dict[str, Any]]:
    rows = list(report.suspects)[:SUSPECTS]
    found = _thumbnails(report.pictures.root, [row["path"] for row in rows], [SIDE] * len(rows))
    return [{**row, "src": src, "bad": reason} for row, (src, reason) in zip(rows, found, strict=True)]


def _embed(image: bytes) -> str:
    """An image file as a data URI."""
    if image[8:12] != b"WEBP":
        picture = open_upright(image).copy()
        picture.thumbnail(LARGEST_FIGURE)
        image = _webp(picture, quality=85)
    return "data:image/webp;base64," + base64.b64encode(image).decode()


def _breadth(figure: Figure) -> str:
    """Classes of a figure: "wide" has a row of its own, "broad" is scrolled on a narrow screen, not shrunk to nothing."""
    box = re.search(r'^<svg[^>]* viewBox="\S+ \S+ ([\d.]+)', str(figure.image)[:1000])
    width = float(box[1]) if box else 0.0  # points of what is mostly text of ten points
    return " ".join(["wide"] * (figure.wide or width > 600) + ["broad"] * (width > 450))


def _webp(image: Image.Image, *, quality: int) -> bytes:
    data = io.BytesIO()
    image.save(data, "WEBP", quality=quality, method=2)
    return data.getvalue()


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


CAPTIONS = {
    "losses": (
        "Loss by step",
        "Overfitting shows as a validation loss that turns up while the training loss goes on falling.",
    ),
    "learning_rate": ("Learning rate by step", "What the schedule did."),
    "confusion": (
        "What is taken for what",
        "A row is what the images are, a column what they were taken for; everything off the diagonal is a mistake.",
    ),
    "per_class": (
        "Recall by class",
        "The share of each class that was found, with its 95 % interval; wide ones rest on few images.",
    ),
    "reliability": (
        "Can the probabilities be believed?",
        "Points on the diagonal are right as often as they say; below it the classifier is too sure of itself.",
    ),
    "risk_coverage": (
        "Errors by share of images answered",
        "How many of the answers are wrong when only the surest are given; the point is the threshold chosen.",
    ),
    "heat_maps": (
        "Where the network looked",
        "Grad-CAM on the last block, for the class named: it should light up on the thing, not on its surroundings.",
    ),
}
NARROW = 0.1  # width of the accuracy's interval beyond which it is said that the images are few


def write_evaluation(folder: Path, run: Any, split: Any, logits: np.ndarray, found: Mapping[str, Any]) -> None:
    """Draws figures/*.png and writes report.html; an image that has gone since is said and left out.

    Args:
        folder: where to.
        run: evaluate.run.Run.
        split: N labelled images.
        logits: [N, C].
        found: metrics.json's content.
    """
    judged = EvaluatedSplit(run, split, logits, found)
    curves = figures_module.of_training(run.folder) | figures_module.of_numbers(judged)
    drawn = dict(curves)
    try:
        drawn |= {"heat_maps": figures_module.heat_maps(judged)} | figures_module.galleries(judged)
    except (ImageError, OSError) as e:
        print(f"The galleries are not drawn: an image can't be read any more ({e}).", file=sys.stderr)
    try:
        for name, figure in drawn.items():
            dpi = 120 if name in curves else 80  # galleries are photos: a megabyte each is enough
            plots.write(figure, folder / "figures" / f"{name}.png", dpi=dpi)
        write_report(folder / "report.html", page(folder, judged, curves))
    except OSError as e:
        raise unwritable(f"{folder}: figures and report", e) from None


def page(folder: Path, judged: EvaluatedSplit, curves: Mapping[str, plots.Figure]) -> Report:
    """What the report says."""
    run, found = judged.run, judged.found
    kept = _read(run.folder / "data.json", dict)
    figures = [_figure(name, plots.to_svg(figure), found) for name, figure in curves.items()]
    tested = [name for name, phase in run.config.phases.items() if phase.lr == "auto"]
    of_lr_find = (run.folder / "figures" / f"lr_find_{name}.png" for name in tested)
    for path in filter(Path.is_file, of_lr_find):
        text = "The loss while the learning rate grew; a good rate is where it falls fastest."
        figures.insert(0, Figure(path.stem, "Learning rate range test", text, text, path.read_bytes()))
    heat = folder / "figures" / "heat_maps.png"
    if heat.is_file():
        figures.append(_figure("heat_maps", heat.read_bytes(), found))
    own = folder == run.folder
    kind = "test " if found.get("split") == "test" else ""
    where = run.config.data.root if own else found.get("data", "")
    return Report(
        title=f"{run.folder.resolve().name}: {' / '.join(run.classes[:4])}{' / …' if len(run.classes) > 4 else ''}",
        classes=run.classes,
        trained=trained(run, kept) | {"judged on": f"{found['n']:,} {kind}images of {where}"},
        found=found,
        pictures=Pictures(
            root=judged.split.root,
            paths=judged.split.paths,
            labels=judged.split.labels,
            log_probs=judged.log_probs,
            threshold=found["abstain"]["threshold"],
        ),
        notes=caveats(judged, kept),
        figures=figures,
        findings=kept.get("findings", []),
        suspects=_read_suspects(run.folder / "suspects.csv"),
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
        "own functions": describe_functions(run.checkpoint["own"]) if "own" in run.checkpoint else "",
        "checkpoint": f"{run.checkpoint['use']}, step {run.checkpoint['step']:,}",
    }
    return {name: text for name, text in rows.items() if text}


def caveats(judged: EvaluatedSplit, kept: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """What to bear in mind before trusting the result, the gravest first."""
    run, found = judged.run, judged.found
    notes: list[tuple[Any, str]] = []
    own = found["calibration"]["fitted_on_these_pictures"]
    for finding in kept.get("findings", []):
        kind = "serious" if finding["grave"] else "caution"
        notes.append((kind, f"{finding['what'].capitalize()}: {finding['count']:,}. {finding['meaning']}"))
    if own and run.checkpoint["valid_used_for"]:
        notes.append(
            ("serious", "These images chose the best epoch, so the result flatters; judge on others with --data.")
        )
    for name, count in found.get("seen_before", {}).items():
        text = f"Among these images {count:,} of the run's own {name} images were found: the result flatters."
        notes.append(("serious", text))
    low, high = found["interval"]
    if high - low > NARROW:
        few = f"With {found['n']:,} images the accuracy is only known to lie between {100 * low:.1f} and {100 * high:.1f} %."
        notes.append(("caution", few))
    epochs = [row for row in figures_module.training_rows(run.folder) if "valid_loss" in row]
    of_last_phase = [row for row in epochs if row.get("phase") == epochs[-1].get("phase")]
    if grown := overfitting(of_last_phase):
        notes.append(("caution", grown))
    for row in found["per_class"]:
        if row["recall_interval"] and row["recall_interval"][1] < low:
            text = f"{row['class']}: only {row['right']:,} of {row['n']:,} were found, fewer than in the other classes."
            notes.append(("caution", text))
    if "own" in run.checkpoint:
        text = "Training used functions that the configuration doesn't hold: {}. Only the script that has them does the same again."
        notes.append(("note", text.format(describe_functions(run.checkpoint["own"]))))
    if own:
        used = "The temperature and the abstain threshold were chosen on these images; what is said of them is out of fold."
        notes.append(("note", used))
    return sorted(notes, key=lambda note: ("serious", "caution", "note").index(note[0]))


def _figure(name: str, image: str | bytes, found: Mapping[str, Any]) -> Figure:
    title, caption = CAPTIONS[name]
    alt = f"{title}. {found['errors']:,} errors of {found['n']:,}."
    return Figure(name, title, caption, alt, image, wide=name == "heat_maps")


def _read(path: Path, kind: type) -> Any:
    """A JSON file of the run folder; empty where it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return value if isinstance(value, kind) else kind()


def _read_suspects(path: Path) -> list[dict[str, str]]:
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
        "images (hash of contents and labels)": run.fingerprint.partition("-")[0],
        "backend": kept.get("backend", ""),
    }
    return {k: str(v) for k, v in (kept.get("versions", {}) | weights | rest | hashes).items() if v}


def _commands(run: Any) -> dict[str, str]:
    rows = {
        "predict": f"python -m jaxcats.predict --model {run.folder}/model IMAGES...",
        "judge another folder": f"python -m jaxcats.evaluate --run {run.folder} --data FOLDER",
        "look for wrong labels": f"python -m jaxcats.evaluate --run {run.folder} --split train",
        "train again": f"python -m jaxcats.train --config {run.folder}/config.yaml",
    }
    hidden = ["predict"] * (not (run.folder / "model").is_dir()) + ["train again"] * ("own" in run.checkpoint)
    return {k: v for k, v in rows.items() if k not in hidden}


SIDE = 140  # of a thumbnail, in pixels
MOST, MOST_ALIKE = 60, 6  # items of a finding that are shown, and images of an item; --json has all


def write_diagnosis(path: Path, report: dict[str, Any]) -> None:
    """Writes the page about what `doctor.diagnose` returned. Raises OSError where it can't be written."""
    template = page_environment().get_template("diagnosis.html.j2")
    root = Path(report["folder"])
    bounds = {"most": MOST, "most_alike": MOST_ALIKE}
    write_text(path, template.render(report=report, thumbnail=lambda name: _thumbnail(root / name), **bounds))


def _thumbnail(path: Path) -> str:
    """A data: address, "" for what can't be shown."""
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        return ""
    out = io.BytesIO()
    try:
        with open_image(path) as image:  # inside, whatever an odd file raises is an ImageError
            picture = upright(image)
            picture.thumbnail((SIDE, SIDE))
            picture.save(out, "WEBP", quality=60)
    except (ImageError, MemoryError):
        return ""
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
