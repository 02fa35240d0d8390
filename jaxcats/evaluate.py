"""`python -m jaxcats.evaluate --run runs/x [--data FOLDER]`: exact evaluation, predictions.csv and metrics.json."""

import csv
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.cli import from_file, make_parser, one_line, parse_own, run_command
from jaxcats.config import Config
from jaxcats.errors import RunError, UserError
from jaxcats.results import metrics
from jaxcats.storage.atomic import write_json, write_text
from jaxcats.validation import check_tta

BEST_EPOCH = ["choosing the best epoch"]
CHOSE = "also chose the best epoch, so the number flatters"
OPTIONS = {
    "run": {"type": str, "required": True, "help": "run folder that train wrote"},
    "data": {
        "type": str,
        "help": "another folder: class folders, or pictures without labels (default: the run's validation pictures)",
    },
    "checkpoint": {"type": str, "help": "last, best or a step (default: what the run's config says)"},
    "unlabelled": {"action": "store_true", "help": "the folders in --data are no classes: predictions only"},
    "tta": {
        "type": int,
        "default": 0,
        "help": "also judge so many randomly changed versions of each picture, and average (test-time augmentation)",
    },
    "tta_weight": {"type": float, "help": "share of the plain picture's answer in that (default: 1 / (tta + 1))"},
    "out": {
        "type": str,
        "help": "where the results go (default: the run folder, or a folder in its evaluations/ with --data)",
    },
}
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


def skipped(bad: Sequence[Any], most: int = 5) -> list[str]:
    """Lines that name the pictures left out, the first few of them."""
    lines = [f"skipped {one_line(b.path)}: {b.reason}" for b in bad[:most]]
    return lines + ([f"... and {len(bad) - most:,} more pictures skipped"] if len(bad) > most else [])


def write_results(
    folder: Path, split: Any, *, classes: Sequence[str], logits: np.ndarray, facts: dict[str, Any], chose: str = ""
) -> None:
    """Writes predictions.csv and metrics.json and prints the result.

    Args:
        folder: where to.
        split: the pictures, with labels or without (-1).
        classes: names in the order of the logits.
        logits: [N, C].
        facts: further entries of metrics.json ("seconds", "checkpoint", ...).
        chose: what these very pictures were used to choose, said beside the result; empty for nothing.
    """
    try:
        write_predictions(folder / "predictions.csv", split.paths, labels=split.labels, classes=classes, logits=logits)
        if (split.labels >= 0).all():
            found = metrics.summary(logits, split.labels)
            write_json(folder / "metrics.json", facts | found | {"classes": list(classes)})
            print(metrics.sentence(found["errors"], found["n"]) + (f"; these pictures {chose}" if chose else ""))
        else:
            print(f"{len(split):,} pictures without labels: predictions only.")
    except OSError as e:
        raise UserError(f"{folder}: can't be written ({e.strerror}).") from None


@dataclass(frozen=True)
class Run:
    """A trained run, ready to judge pictures."""

    folder: Path
    config: Config
    model: Any
    preprocess: Any
    classes: tuple[str, ...]
    state: Any
    precomputed: bool
    augment: str
    checkpoint: dict[str, Any]
    fingerprint: str

    def logits(self, split: Any) -> np.ndarray:
        """Logits [N, C] of a split; through the feature cache where the run's last phase used it."""
        from jaxcats import job
        from jaxcats.inputs import Evaluator, backbone_features

        config, params, stats = self.config, self.state.params, self.state.batch_stats
        how = {"preprocess": self.preprocess, "batch_size": config.feature_batch, "workers": config.data.workers}
        feats = None
        if self.precomputed:
            cache = job.cache_of(config)
            feats = backbone_features(
                self.model, split, params=params, batch_stats=stats, cache_dir=cache, **how
            ).features
        found = Evaluator(self.model, split, feats=feats, **how)(params, stats)
        if not np.isfinite(found).all():
            raise RunError(
                f"{self.folder}: the network's answers are not numbers; train again with a lower learning rate."
            )
        return found


def judge_with_tta(run: Run, split: Any, logits: np.ndarray, *, n: int, weight: float | None) -> Any:
    """(log-probabilities [N, C] averaged over n changed versions and the plain picture, facts about how)."""
    from jaxcats import tta

    config = run.config
    how = tta.preset(run.augment)
    changed = tta.augmented_probabilities(
        run.model,
        split,
        run.state.params,
        run.state.batch_stats,
        preprocess=run.preprocess,
        how=how,
        n=n,
        seed=config.seed,
        batch_size=config.feature_batch,
        workers=config.data.workers,
    )
    share = 1 / (n + 1) if weight is None else weight
    return tta.combine(logits, changed, n=n, weight=share), {"versions": n, "weight": share, "augment": how}


def load_run(run: Path, which: str | None = None) -> Run:
    """Loads a run folder that train wrote.

    Args:
        run: the folder.
        which: last, best, a step, or None for what the run's configuration says.

    Raises:
        UserError: not a run, no such checkpoint, or a damaged one.
    """
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
    use = which or config.checkpoint.use
    step = checkpoints.pick(use)
    meta = checkpoints.meta(step)
    if meta["phase"] not in config.phases:
        raise UserError(
            f"{run}/config.yaml: has no phase '{meta['phase']}', which the checkpoint at step {step} is of."
        )
    job.check_config(config, meta)
    phase = config.phases[meta["phase"]]
    model, preprocess = job.create_model(config, len(meta["classes"]), dtype=meta["dtype"])
    plan = job.Plan(0, meta["phase"], phase, 0, 0, 1)
    state = checkpoints.restore(step, job.abstract_state(model, plan))
    checkpoints.close()
    chosen = use == "best" or meta.get("kept_best", False)  # kept_best: by Learner.fit(keep="best")
    facts = {"use": use, "step": step, "valid_used_for": BEST_EPOCH if chosen else []}
    return Run(
        folder=run,
        config=config,
        model=model,
        preprocess=preprocess,
        classes=tuple(meta["classes"]),
        state=state,
        precomputed=phase.precompute,
        augment=phase.augment,
        checkpoint=facts,
        fingerprint=meta["fingerprint"],
    )


def find_pictures(run: Run, folder: str | None, *, unlabelled: bool = False) -> tuple[Any, Any]:
    """(split, bad files): the run's own validation pictures, or a labelled or unlabelled folder."""
    from jaxcats import job
    from jaxcats.data import index

    d, seed = run.config.data, run.config.seed
    options = {
        "on_bad_file": d.on_bad_file,
        "cache_dir": job.cache_of(run.config),
        "workers": d.workers,
        "rehash": d.rehash,
    }
    if folder is None:
        found = index.scan(d.root, valid_fraction=d.valid_fraction, seed=seed, manifest=d.manifest, **options)
        if found.classes != run.classes:
            theirs, ours = ", ".join(found.classes), ", ".join(run.classes)
            raise UserError(f"{d.root}: has the classes {theirs}; the run was trained on {ours}.")
        if job.fingerprint(found) != run.fingerprint:
            raise UserError(
                f"{d.root}: the pictures have changed since this run was trained, so these are not its validation pictures. "
                f"Give the folder to judge with --data."
            )
        return found.splits["valid"], [b for b in found.bad if not b.path.startswith("train/")]
    top = Path(folder).expanduser()
    if not unlabelled and any(p.is_dir() and not p.name.startswith(".") for p in top.glob("*")):
        try:
            return index.scan_labelled(top, classes=run.classes, **options)
        except UserError as e:
            raise UserError(f"{e}. If the folders in it are no classes, add --unlabelled.") from None
    return index.scan_unlabelled(top, **options)


def results_folder(run: Path, data: str | None, out: str | None) -> Path:
    """Where an evaluation goes: `out`; else the run folder, or a folder in it named after the other data."""
    if out:
        return Path(out)
    return run / "evaluations" / "_".join(Path(data).expanduser().absolute().parts[-2:]) if data else run


def kept_metrics(folder: Path) -> dict[str, Any]:
    """What an earlier metrics.json in the folder says; nothing when there is none or it can't be read."""
    try:
        return dict(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def main(argv: Sequence[str]) -> None:
    """The command."""
    started = time.perf_counter()
    parser = make_parser("python -m jaxcats.evaluate", DESCRIPTION)
    for name, kwargs in OPTIONS.items():
        parser.add_argument(f"--{name}", **kwargs)
    options = parse_own(parser, argv)
    check_tta(options.tta, options.tta_weight)
    run = load_run(Path(options.run), options.checkpoint)
    loaded = time.perf_counter()
    split, bad = find_pictures(run, options.data, unlabelled=options.unlabelled)
    for line in skipped(bad):
        print(line)
    indexed = time.perf_counter()
    logits = run.logits(split)
    n = options.tta
    averaged, how = judge_with_tta(run, split, logits, n=n, weight=options.tta_weight) if n else (None, {})
    done = time.perf_counter()
    seconds = {"load": loaded - started, "index": indexed - loaded, "evaluate": done - indexed, "total": done - started}
    seconds = {name: round(value, 3) for name, value in seconds.items()}
    folder = results_folder(run.folder, options.data, options.out)
    facts = {"data": options.data or run.config.data.root, "checkpoint": run.checkpoint, "bad_files": len(bad)}
    # What training measured stays; this evaluation's seconds go beside it.
    before = kept_metrics(folder)
    if "tta" in before and averaged is None:
        (folder / "predictions_tta.csv").unlink(missing_ok=True)  # of an earlier evaluation, perhaps of other weights
    before = {k: before[k] for k in ("seconds", "features") if k in before} if folder == run.folder else {}
    facts |= {"seconds": before.get("seconds", {}) | {"evaluation": seconds} if before else seconds}
    chose = CHOSE if run.checkpoint["valid_used_for"] and not options.data else ""
    if averaged is not None:
        write_predictions(
            folder / "predictions_tta.csv", split.paths, labels=split.labels, classes=run.classes, logits=averaged
        )
        if (split.labels >= 0).all():
            facts["tta"] = how | metrics.summary(averaged, split.labels)
    write_results(folder, split, classes=run.classes, logits=logits, facts={**before, **facts}, chose=chose)
    if "tta" in facts:
        found = facts["tta"]
        print(
            f"with TTA ({how['versions']} x {how['augment']}, plain weight {how['weight']:.3g}): "
            + metrics.sentence(found["errors"], found["n"])
        )
    more = ", predictions_tta.csv" if averaged is not None else ""
    print(f"Written: {folder}/predictions.csv{more}" + (", metrics.json" if (split.labels >= 0).all() else ""))


if __name__ == "__main__":
    sys.exit(run_command(main))
