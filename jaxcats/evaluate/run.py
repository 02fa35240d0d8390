"""A trained run, ready to judge images: loaded from its folder, with the images it is to judge."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.common.cli import from_file
from jaxcats.common.config import Config
from jaxcats.common.errors import RunError, UserError

BEST_EPOCH = ["choosing the best epoch"]


@dataclass(frozen=True)
class Run:
    """A trained run, ready to judge images."""

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
        from jaxcats.train import experiment
        from jaxcats.train.evaluator import Evaluator
        from jaxcats.train.features import backbone_features

        config, params, stats = self.config, self.state.params, self.state.batch_stats
        how = {"preprocess": self.preprocess, "batch_size": config.feature_batch, "workers": config.data.workers}
        feats = None
        if self.precomputed:
            cache = experiment.cache_folder_of(config)
            feats = backbone_features(
                self.model, split, params=params, batch_stats=stats, cache_dir=cache, **how
            ).features
        found = Evaluator(self.model, split, features=feats, **how)(params, stats)
        if not np.isfinite(found).all():
            raise RunError(
                f"{self.folder}: the network's answers are not numbers; train again with a lower learning rate."
            )
        return found


def evaluate_with_tta(run: Run, split: Any, logits: np.ndarray, *, n: int, weight: float | None) -> Any:
    """(log-probabilities [N, C] averaged over n changed versions and the plain image, facts about how)."""
    from jaxcats.evaluate import tta

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
    from jaxcats.train import experiment
    from jaxcats.train.checkpoint import Checkpoints
    from jaxcats.train.run_folder import check_config

    if not (run / "config.yaml").is_file():
        raise UserError(
            f"--run {run}: not a run folder (no readable config.yaml in it). Give a folder that train wrote."
        )
    config = from_file(run / "config.yaml")
    if not (run / "checkpoints").is_dir():
        raise UserError(f"--run {run}: holds no checkpoints; train it first (--resume goes on).")
    experiment.enable_compile_cache(config)
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    use = which or config.checkpoint.use
    step = checkpoints.pick(use)
    meta = checkpoints.meta(step)
    if meta["phase"] not in config.phases:
        raise UserError(
            f"{run}/config.yaml: has no phase '{meta['phase']}', which the checkpoint at step {step} is of."
        )
    check_config(config, meta)
    phase = config.phases[meta["phase"]]
    model, preprocess = experiment.create_model(config, len(meta["classes"]), dtype=meta["dtype"])
    plan = experiment.PhasePlan(0, meta["phase"], phase, 0, 0, 1)
    state = checkpoints.restore(step, experiment.abstract_state(model, plan))
    chosen = use == "best" or meta.get("kept_best", False)  # kept_best: by Learner.fit(keep="best")
    facts = {
        "use": use,
        "step": step,
        "state": checkpoints.identity(step),
        "valid_used_for": BEST_EPOCH if chosen else [],
    }
    checkpoints.close()
    facts |= {"own": meta["own"]} if "own" in meta else {}  # see UserFunctions
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


def own_images(run: Run) -> Any:
    """The FolderIndex that the run was trained on; UserError where its images have changed since."""
    from jaxcats.train import experiment

    root = run.config.data.root
    found = experiment.index_images(run.config, experiment.cache_folder_of(run.config), run.folder)
    if found.classes != run.classes:
        theirs, ours = ", ".join(found.classes), ", ".join(run.classes)
        raise UserError(f"{root}: has the classes {theirs}; the run was trained on {ours}.")
    if not experiment.same_images(experiment.fingerprint(found), run.fingerprint):
        raise UserError(
            f"{root}: the images have changed since this run was trained, so these are not its validation images. "
            f"Give the folder to judge with --data."
        )
    return found


def count_seen_images(run: Run, split: Any) -> dict[str, int]:
    """How many images of another folder, by content, are among the run's own, by split; empty where those have gone."""
    try:
        own = own_images(run).splits
    except UserError:
        return {}
    counts = {name: len(set(split.hashes) & set(images.hashes)) for name, images in own.items()}
    return {name: n for name, n in counts.items() if n}


def other_images(run: Run, folder: str, *, unlabelled: bool = False) -> tuple[Any, Any]:
    """(split, bad files) of a labelled or unlabelled folder."""
    from jaxcats.common.config import label_kind
    from jaxcats.data import index
    from jaxcats.train import experiment

    d = run.config.data
    options = {
        "on_bad_file": d.on_bad_file,
        "cache_dir": experiment.cache_folder_of(run.config),
        "workers": d.workers,
        "rehash": d.rehash,
    }
    top = Path(os.path.expanduser(folder))
    # A table names the images of one folder only.
    labels = "folders" if label_kind(d.labels) == "table" else d.labels
    if not unlabelled and (
        labels != "folders" or any(p.is_dir() and not p.name.startswith(".") for p in top.glob("*"))
    ):
        try:
            return index.scan_labelled(top, classes=run.classes, labels=labels, **options)
        except UserError as e:
            raise UserError(f"{e}. If its images have no labels, add --unlabelled.") from None
    return index.scan_unlabelled(top, **options)
