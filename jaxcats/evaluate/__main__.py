"""`python -m jaxcats.evaluate --run runs/x [--data FOLDER | --split test | --split train]`: exact evaluation, and likely label errors."""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcats.common import stats
from jaxcats.common.cli import Parser, run_command
from jaxcats.common.config import check_tta
from jaxcats.common.errors import UserError
from jaxcats.common.io import remove_stale_temporaries
from jaxcats.evaluate import predictions
from jaxcats.evaluate.calibration import Calibration

if TYPE_CHECKING:
    from jaxcats.data.index import BadFile, Split
    from jaxcats.evaluate.run import Run

DESCRIPTION = "Evaluates a trained run, every image once: predictions.csv, metrics.json, figures, report.html."
SPLIT = "test: the run's test images, which nothing else uses; train: rank likely label errors of the run's own images"


def main(argv: Sequence[str]) -> None:
    """The command."""
    started = time.perf_counter()
    options = read_options(argv)
    from jaxcats.evaluate.run import count_seen_images, load_run  # JAX takes seconds to import; --help needs none of it

    run = load_run(Path(options.run), options.checkpoint)
    loaded = time.perf_counter()
    folder = results_folder(run.folder, options)
    if options.split == "train":
        return list_label_errors(run, folder)
    split, bad_files = images_to_evaluate(run, options)
    is_validation = not options.data and options.split == "valid"
    seen = {} if is_validation else count_seen_images(run, split)
    for name, count in seen.items():
        print(f"These images contain {count:,} of the run's own {name} images: the result is too good.")
    indexed = time.perf_counter()
    logits = run.logits(split)
    earlier = predictions.read_json(folder / "metrics.json") if folder == run.folder else {}
    facts = {name: earlier[name] for name in ("seconds", "features") if name in earlier}
    tta = write_tta(folder, run, split, logits, options)
    done = time.perf_counter()
    seconds = {"load": loaded - started, "index": indexed - loaded, "evaluate": done - indexed, "total": done - started}
    seconds = {name: round(value, 3) for name, value in seconds.items()}
    # Keep the times that training measured, and add those of this evaluation as "evaluation".
    seconds = facts.get("seconds", {}) | {"evaluation": seconds} if facts else seconds
    facts |= {"data": options.data or run.config.data.root} | ({"split": "test"} if options.split == "test" else {})
    facts |= {"checkpoint": run.checkpoint, "bad_files": len(bad_files), "seen_before": seen, "seconds": seconds} | tta
    settings = {"max_error": options.max_error, "calibration": None if is_validation else calibration_of(run)}
    metrics, _ = predictions.write_results(folder, run, split, logits, facts=facts, **settings)
    if metrics and (run.config.report if options.report is None else options.report == "yes"):
        from jaxcats.evaluate.figures import EvaluatedSplit
        from jaxcats.evaluate.report import write_evaluation

        write_evaluation(folder, EvaluatedSplit(run, split, logits, metrics))
    print(f"The results are in {folder}.")


def read_options(argv: Sequence[str]) -> Namespace:
    """The command's flags, checked against each other."""
    parser = Parser(prog="python -m jaxcats.evaluate", description=DESCRIPTION)
    add = parser.add_argument
    add("--run", required=True, help="run folder that train wrote")
    add("--data", help="another folder: class folders, or images without labels (default: the run's validation images)")
    add("--split", choices=["valid", "test", "train"], default="valid", help=SPLIT)
    add("--checkpoint", help="last, best or a step (default: the run's checkpoint.use)")
    add("--unlabelled", action="store_true", help="the folders in --data are not classes: write predictions only")
    add(
        "--max_error",
        type=float,
        help="share of wrong predictions to allow; it sets the threshold to abstain (default: the run's)",
    )
    add(
        "--tta",
        type=int,
        default=0,
        help="also predict this number of augmented versions of each image, and average the probabilities",
    )
    add("--tta_weight", type=float, help="weight of the plain image in that average (default: 1 / (tta + 1))")
    add("--out", help="folder for the results (default: the run folder, or a folder in its evaluations/ with --data)")
    add(
        "--report",
        choices=["yes", "no"],
        help="whether to write figures/ and report.html (default: the run's report setting)",
    )
    options = parser.parse_args(argv)
    check_tta(options.tta, options.tta_weight)
    if options.max_error is not None and not 0 < options.max_error < 1:
        raise UserError(f"--max_error {options.max_error}: can't be used; expected 0 < x < 1.")
    if options.split == "train" and (options.data or options.unlabelled or options.tta):
        raise UserError("--split train: uses the run's own images; leave out --data, --unlabelled and --tta.")
    if options.split == "test" and (options.data or options.unlabelled):
        raise UserError("--split test: uses the run's own test images; leave out --data and --unlabelled.")
    return options


def results_folder(run: Path, options: Namespace) -> Path:
    """--out; else the run folder, or a folder in it named after the other data or the test split; cleaned of old temporaries."""
    if options.out:
        return Path(options.out)
    name = "test" if options.split == "test" else ""
    if options.data:
        name = "_".join(Path(os.path.expanduser(options.data)).absolute().parts[-2:])
    folder = run / "evaluations" / name if name else run
    for place in (folder, folder / "figures"):
        remove_stale_temporaries(place)
    return folder


def list_label_errors(run: "Run", folder: Path) -> None:
    """`--split train`: writes suspects.csv and its gallery."""
    from jaxcats.evaluate.label_errors import find_suspects, write_suspects
    from jaxcats.evaluate.run import training_index

    splits = training_index(run).splits
    suspects = find_suspects(run, splits)
    write_suspects(folder, suspects, splits["train"].root)
    n = sum(map(len, splits.values()))
    print(
        f"{len(suspects):,} of {n:,} images should be checked; {folder}/suspects.csv has the likeliest mistakes first."
    )


def images_to_evaluate(run: "Run", options: Namespace) -> "tuple[Split, Sequence[BadFile]]":
    """The split to evaluate, and its files that can't be used, which are printed."""
    from jaxcats.data.index import skipped
    from jaxcats.evaluate.run import other_dataset, training_index

    if options.data:
        split, bad_files = other_dataset(run, options.data, unlabelled=options.unlabelled)
    else:
        index = training_index(run)
        split = index.test if options.split == "test" else index.splits["valid"]
        bad_files = [file for file in index.bad if file.split in (options.split, "")]
    if split is None:
        raise UserError(
            f"--split test: {run.config.data.root} has no test images; add test/, or train with data.test_fraction."
        )
    if options.split == "test":
        print("Test images: neither training nor a choice has used them. Each further evaluation makes this less true.")
    for line in skipped(bad_files):
        print(line)
    return split, bad_files


def write_tta(folder: Path, run: "Run", split: "Split", logits: np.ndarray, options: Namespace) -> dict[str, Any]:
    """Writes predictions_tta.csv; with labels prints the result, and returns it for metrics.json. {} without --tta."""
    if not options.tta:
        stale = folder / "predictions_tta.csv"  # of an earlier evaluation, maybe of other weights
        if stale.exists() and not options.out:  # A folder that the user names is theirs.
            stale.unlink()
        return {}
    from jaxcats.evaluate.tta import evaluate_with_tta, tta_preset

    preset = tta_preset(run.phase.augment)
    log_probs, facts = evaluate_with_tta(run, split, logits, n=options.tta, weight=options.tta_weight, preset=preset)
    predictions.write_predictions(folder / "predictions_tta.csv", split, run.classes, log_probs)
    if not predictions.is_labelled(split):
        return {}
    facts |= stats.summary(log_probs, split.labels)
    print(f"with TTA ({options.tta} x {preset}): {stats.sentence(facts['errors'], facts['n'])}")
    return {"tta": facts}


def calibration_of(run: "Run") -> Calibration:
    """The calibration that the run's own validation images gave this checkpoint; none where it is unknown."""
    calibration = predictions.read_calibration(run.folder, run.checkpoint)
    if calibration is None:
        print("No temperature is known for this checkpoint: evaluate it without --data to fit one.")
    return calibration or Calibration()


if __name__ == "__main__":
    sys.exit(run_command(main))
