"""`python -m jaxcats.evaluate --run runs/x [--data FOLDER]`: exact evaluation, predictions.csv and metrics.json."""

import csv
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.cli import from_file, make_parser, parse_own, run_command
from jaxcats.errors import UserError
from jaxcats.results import metrics
from jaxcats.storage.atomic import write_json, write_text

DESCRIPTION = "Judges a trained run: every picture counts once. Writes predictions.csv and metrics.json."


def write_predictions(
    path: Path, paths: Sequence[str], *, labels: np.ndarray, classes: Sequence[str], logits: np.ndarray
) -> None:
    """predictions.csv: path, label (empty where unknown), predicted, and a column of probabilities per class."""
    probabilities = np.exp(metrics.log_softmax(logits))
    text = io.StringIO(newline="")
    out = csv.writer(text)
    out.writerow(["path", "label", "predicted", *(f"p_{c}" for c in classes)])
    for name, label, row in zip(paths, labels.tolist(), probabilities, strict=True):
        known = classes[label] if label >= 0 else ""
        out.writerow([name, known, classes[int(row.argmax())], *(f"{p:.9g}" for p in row)])
    write_text(path, text.getvalue())


def write_results(
    folder: Path, split: Any, *, classes: Sequence[str], logits: np.ndarray, facts: dict[str, Any]
) -> None:
    """Writes predictions.csv and metrics.json and prints the result.

    Args:
        folder: where to.
        split: the pictures, with labels or without (-1).
        classes: names in the order of the logits.
        logits: [N, C].
        facts: further entries of metrics.json ("seconds", "checkpoint", ...).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(folder / "predictions.csv", split.paths, labels=split.labels, classes=classes, logits=logits)
        if (split.labels >= 0).all():
            found = metrics.summary(logits, split.labels)
            write_json(folder / "metrics.json", found | {"classes": list(classes)} | facts)
            print(metrics.sentence(found["errors"], found["n"]))
        else:
            print(f"{len(split):,} pictures without labels: predictions only.")
    except OSError as e:
        raise UserError(f"{folder}: can't be written ({e.strerror}).") from None


def load_run(run: Path, which: str | None):
    """(Setup-like parts of a trained run): config, model, preprocess, classes, params, batch_stats, checkpoint facts."""
    from jaxcats import job
    from jaxcats.storage.checkpoint import Checkpoints

    if not (run / "config.yaml").is_file():
        raise UserError(
            f"--run {run}: not a run folder (no readable config.yaml in it). Give a folder that train wrote."
        )
    config = from_file(run / "config.yaml")
    if not (run / "checkpoints").is_dir():
        raise UserError(f"--run {run}: holds no checkpoints; train it first (--resume goes on).")
    job.start_jax(config)
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    step = checkpoints.pick(which or config.checkpoint.use)
    meta = checkpoints.meta(step)
    model, preprocess = job.create_model(config, len(meta["classes"]))
    plan = job.Plan(0, meta["phase"], config.phases[meta["phase"]], 0, 0, 1)
    state = checkpoints.restore(step, job.abstract_state(model, plan))
    checkpoints.close()
    facts = {"use": which or config.checkpoint.use, "step": step, "epochs": meta["progress"]["epoch"]}
    return config, model, preprocess, tuple(meta["classes"]), state, facts | {"phase": meta["phase"]}


def find_pictures(config: Any, folder: str | None, classes: Sequence[str]):
    """The split to judge: the run's own validation pictures, or a labelled or unlabelled folder."""
    from jaxcats.data import index

    d, cache = config.data, Path(config.cache_dir) if config.cache_dir else index.cache_folder()
    options = {"on_bad_file": d.on_bad_file, "cache_dir": cache, "workers": d.workers, "rehash": d.rehash}
    if folder is None:
        found = index.scan(d.root, valid_fraction=d.valid_fraction, seed=config.seed, manifest=d.manifest, **options)
        if found.classes != tuple(classes):
            raise UserError(
                f"{d.root}: has the classes {', '.join(found.classes)}, the run was trained on {', '.join(classes)}."
            )
        return found.splits["valid"]
    if any(p.is_dir() and not p.name.startswith(".") for p in Path(folder).glob("*")):
        return index.scan_labelled(folder, classes=classes, **options)[0]
    return index.scan_unlabelled(folder, **options)[0]


def main(argv: Sequence[str]) -> None:
    """The command."""
    started = time.perf_counter()
    parser = make_parser("python -m jaxcats.evaluate", DESCRIPTION)
    parser.add_argument("--run", type=str, required=True, help="run folder that train wrote")
    parser.add_argument(
        "--data",
        type=str,
        help="another folder: class folders, or pictures without labels (default: the run's validation pictures)",
    )
    parser.add_argument("--checkpoint", type=str, help="last, best or a step (default: what the run's config says)")
    parser.add_argument(
        "--out", type=str, help="where the results go (default: the run folder, or its evaluations/NAME with --data)"
    )
    options = parse_own(parser, argv)
    run = Path(options.run)
    config, model, preprocess, classes, state, facts = load_run(run, options.checkpoint)
    loaded = time.perf_counter()
    split = find_pictures(config, options.data, classes)
    indexed = time.perf_counter()

    from jaxcats.data import index
    from jaxcats.inputs import Evaluator, backbone_features

    how = {"preprocess": preprocess, "batch_size": config.feature_batch, "workers": config.data.workers}
    feats = None
    if config.phases[facts["phase"]].precompute:  # the features of the run's own pictures are in the cache
        cache = Path(config.cache_dir) if config.cache_dir else index.cache_folder()
        feats = backbone_features(
            model, split, params=state.params, batch_stats=state.batch_stats, cache_dir=cache, **how
        ).features
    logits = Evaluator(model, split, feats=feats, **how)(state.params, state.batch_stats)
    done = time.perf_counter()
    seconds = {"load": loaded - started, "index": indexed - loaded, "evaluate": done - indexed}
    folder = options.out or (run / "evaluations" / Path(options.data).absolute().name if options.data else run)
    write_results(
        Path(folder),
        split,
        classes=classes,
        logits=logits,
        facts={"data": options.data or config.data.root, "checkpoint": facts, "seconds": seconds},
    )
    print(f"Written: {folder}/predictions.csv, metrics.json")


if __name__ == "__main__":
    sys.exit(run_command(main))
