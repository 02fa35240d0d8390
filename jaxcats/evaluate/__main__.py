"""`python -m jaxcats.evaluate --run runs/x [--data FOLDER | --split test | --split train]`: exact evaluation, and likely label errors."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcats.common import stats
from jaxcats.common.cli import Parser, run_command
from jaxcats.common.config import check_tta
from jaxcats.common.errors import UserError
from jaxcats.common.io import remove_stale_temporaries
from jaxcats.evaluate.predictions import (
    CHOSE,
    labelled,
    read_calibration,
    read_metrics,
    write_predictions,
    write_results,
)
from jaxcats.evaluate.run import Run, count_seen_images, evaluate_with_tta, load_run, other_images, own_images

DESCRIPTION = (
    "Judges a trained run: every image counts once. Writes predictions.csv, metrics.json, figures and report.html. "
    "With --split train it looks for wrong labels among the run's own images instead."
)
OPTIONS: dict[str, dict[str, Any]] = {
    "run": {"required": True, "help": "run folder that train wrote"},
    "data": {
        "help": "another folder: class folders, or images without labels (default: the run's validation images)",
    },
    "split": {
        "choices": ["valid", "test", "train"],
        "default": "valid",
        "help": "test: judge the run's test images, which nothing else looks at; train: rank likely label errors of the "
        "run's images, in suspects.csv and a gallery",
    },
    "checkpoint": {"help": "last, best or a step (default: what the run's config says)"},
    "unlabelled": {"action": "store_true", "help": "the folders in --data are no classes: predictions only"},
    "max_error": {
        "type": float,
        "help": "error wanted among the answers given, which decides when to abstain (default: the run's, 0.005)",
    },
    "tta": {
        "type": int,
        "default": 0,
        "help": "also judge so many randomly changed versions of each image, and average (test-time augmentation)",
    },
    "tta_weight": {"type": float, "help": "share of the plain image's answer in that (default: 1 / (tta + 1))"},
    "out": {"help": "where the results go (default: the run folder, or a folder in its evaluations/ with --data)"},
    "report": {
        "choices": ["yes", "no"],
        "help": "figures/ and report.html (default: what the run's config says)",
    },
}


def read_options(argv: Sequence[str]) -> Any:
    """The command's flags, checked against each other."""
    parser = Parser(prog="python -m jaxcats.evaluate", description=DESCRIPTION)
    for name, kwargs in OPTIONS.items():
        parser.add_argument(f"--{name}", **kwargs)
    options = parser.parse_args(argv)
    check_tta(options.tta, options.tta_weight)
    if options.max_error is not None and not 0 < options.max_error < 1:
        raise UserError(f"--max_error {options.max_error}: can't be used; expected 0 < x < 1.")
    if options.split == "train" and (options.data or options.unlabelled or options.tta):
        raise UserError("--split train: looks at the run's own images; leave --data, --unlabelled and --tta out.")
    if options.split == "test" and (options.data or options.unlabelled):
        raise UserError("--split test: judges the run's own test images; leave --data and --unlabelled out.")
    return options


def results_folder(run: Path, data: str | None, split: str, out: str | None) -> Path:
    """Where an evaluation goes: `out`; else the run folder, or a folder in it named after the other data or the test split."""
    if out:
        return Path(out)
    name = "_".join(Path(os.path.expanduser(data)).absolute().parts[-2:]) if data else "test" if split == "test" else ""
    return run / "evaluations" / name if name else run


def images_of(run: Run, options: Any) -> tuple[Any, Sequence[Any]]:
    """The split to judge, and the files left out."""
    if options.data:
        return other_images(run, options.data, unlabelled=options.unlabelled)
    index = own_images(run)
    if options.split == "test" and index.test is None:
        raise UserError(
            f"--split test: {run.config.data.root} has no test images; they come from test/ with the class folders of "
            f"train/, from data.test_fraction, or from a table's split column."
        )
    if options.split == "test":
        print("Test images: neither training nor a choice has seen them. The more often you look, the less that holds.")
    name = "test" if options.split == "test" else "valid"
    images = index.test if name == "test" else index.splits["valid"]
    return images, [b for b in index.bad if b.split in (name, "")]


def look_for_suspects(run: Run, folder: Path) -> None:
    """`--split train`: suspects.csv and its gallery, and a word on them."""
    from jaxcats.evaluate.label_errors import find_suspects, write_suspects

    splits = own_images(run).splits
    suspects = find_suspects(run, splits)
    files = write_suspects(folder, suspects, splits["train"].root)
    n = sum(len(split) for split in splits.values())
    print(f"{len(suspects):,} of {n:,} images are worth a look, the likeliest mistakes first.")
    print(f"Written: {', '.join(map(str, files))}")


def earlier(folder: Path, run: Run, tta: bool) -> dict[str, Any]:
    """What an earlier evaluation in the folder measured and this one keeps; its TTA answers go when they are not made again."""
    before = read_metrics(folder)
    if "tta" in before and not tta:
        (folder / "predictions_tta.csv").unlink(missing_ok=True)  # perhaps of other weights
    return {k: before[k] for k in ("seconds", "features") if k in before} if folder == run.folder else {}


def main(argv: Sequence[str]) -> None:
    """The command."""
    started = time.perf_counter()
    options = read_options(argv)
    run = load_run(Path(options.run), options.checkpoint)
    loaded = time.perf_counter()
    folder = results_folder(run.folder, options.data, options.split, options.out)
    for place in () if options.out else (folder, folder / "figures"):
        remove_stale_temporaries(place)
    if options.split == "train":
        look_for_suspects(run, folder)
        return
    split, bad = images_of(run, options)
    other = bool(options.data) or options.split == "test"  # than those that training was judged on
    from jaxcats.data.index import skipped

    for line in skipped(bad):
        print(line)
    seen = count_seen_images(run, split) if other else {}
    for name, count in seen.items():
        print(f"Among these images {count:,} of the run's own {name} images were found: the result flatters.")
    indexed = time.perf_counter()
    logits = run.logits(split)
    n = options.tta
    averaged, how = evaluate_with_tta(run, split, logits, n=n, weight=options.tta_weight) if n else (None, {})
    done = time.perf_counter()
    seconds = {"load": loaded - started, "index": indexed - loaded, "evaluate": done - indexed, "total": done - started}
    seconds = {name: round(value, 3) for name, value in seconds.items()}
    before = earlier(folder, run, bool(n))
    facts = before | {
        "data": options.data or run.config.data.root,
        **({"split": "test"} if options.split == "test" else {}),
        "checkpoint": run.checkpoint,
        "bad_files": len(bad),
        "seen_before": seen,
        # What training measured stays; this evaluation's seconds go beside it.
        "seconds": before.get("seconds", {}) | {"evaluation": seconds} if before else seconds,
    }
    if averaged is not None:
        write_predictions(
            folder / "predictions_tta.csv", split.paths, labels=split.labels, classes=run.classes, logits=averaged
        )
        if labelled(split):
            facts["tta"] = how | stats.summary(averaged, split.labels)
    found, _ = write_results(
        folder,
        split,
        classes=run.classes,
        logits=logits,
        facts=facts,
        max_error=options.max_error or run.config.max_error,
        calibration=calibration_of(run) if other else None,
        chose=CHOSE if run.checkpoint["valid_used_for"] and not other else "",
    )
    if "tta" in facts:
        print(
            f"with TTA ({how['versions']} x {how['augment']}, plain weight {how['weight']:.3g}): "
            + stats.sentence(facts["tta"]["errors"], facts["tta"]["n"])
        )
    written = ["predictions.csv"] + ["predictions_tta.csv"] * bool(n) + ["metrics.json"] * bool(found)
    if found and (options.report == "yes" if options.report else run.config.report):
        from jaxcats.evaluate.report import write_evaluation

        write_evaluation(folder, run, split, logits, found)
        written += ["figures/", "report.html"]
    print(f"Written: {folder}/{', '.join(written)}")


def calibration_of(run: Run) -> Any:
    """The calibration that the run's own validation images gave this checkpoint; none, said so, where that is unknown."""
    from jaxcats.evaluate.calibration import Calibration

    kept = read_calibration(run.folder, run.checkpoint)
    if kept is None:
        print("No temperature is known for this checkpoint: evaluate it without --data to have one.")
    return kept or Calibration()


if __name__ == "__main__":
    sys.exit(run_command(main))
