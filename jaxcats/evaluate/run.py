"""A trained run that is open, and the images that it is evaluated on; `evaluate`, `export`, training and the Learner use it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.common.cli import from_file
from jaxcats.common.config import Config, Phase, label_kind
from jaxcats.common.errors import RunError, UserError
from jaxcats.data import index
from jaxcats.data.images import Preprocess
from jaxcats.data.index import BadFile, FolderIndex, Split
from jaxcats.models import Model
from jaxcats.train import experiment
from jaxcats.train.checkpoint import Checkpoints
from jaxcats.train.evaluator import evaluate_split
from jaxcats.train.features import backbone_features
from jaxcats.train.run_folder import check_config


@dataclass(frozen=True, eq=False)
class Run:
    """A trained run that is open.

    Attributes:
        folder: the run folder.
        config: what it was trained with.
        model: the network.
        preprocess: how an image becomes the network's input.
        classes: names in the order of the logits.
        params: the trained weights.
        batch_stats: the averages of the BatchNorm layers.
        phase: the phase that the weights come from.
        fingerprint: of the images, see `experiment.fingerprint`.
        use: how the checkpoint was chosen: "last", "best" or a step.
        step: the step of the weights.
        weights_hash: of the checkpoint's arrays; None where there is no checkpoint.
        best_epoch: whether validation images chose the epoch of the weights.
        user_functions: the names of the user functions that it was trained with, see `UserFunctions.names`.
    """

    folder: Path
    config: Config
    model: Model
    preprocess: Preprocess
    classes: tuple[str, ...]
    params: Any
    batch_stats: Any
    phase: Phase
    fingerprint: str
    use: str
    step: int
    weights_hash: str | None = None
    best_epoch: bool = False
    user_functions: Mapping[str, Mapping[str, str]] | None = None

    @property
    def checkpoint(self) -> dict[str, Any]:
        """The entries about the weights in metrics.json and model.json."""
        used_for = ["choosing the best epoch"] if self.best_epoch else []
        facts = {"use": self.use, "step": self.step, "state": self.weights_hash, "valid_used_for": used_for}
        return {name: value for name, value in (facts | {"own": self.user_functions}).items() if value is not None}

    @property
    def decoding(self) -> dict[str, Any]:
        """How batches of images are read."""
        config = self.config
        return {"preprocess": self.preprocess, "batch_size": config.feature_batch, "workers": config.data.workers}

    def logits(self, split: Split) -> np.ndarray:
        """Logits float32 [N, C] of a split, through the feature cache where the phase trained on features."""
        features, weights = None, {"params": self.params, "batch_stats": self.batch_stats}
        if self.phase.precompute:
            cache = experiment.cache_folder_of(self.config)
            features = backbone_features(self.model, split, cache_dir=cache, **weights, **self.decoding).features
        logits = evaluate_split(self.model, split, features=features, **weights, **self.decoding)
        if not np.isfinite(logits).all():
            raise RunError(f"{self.folder}: the network's logits are not numbers; train with a lower learning rate.")
        return logits


def load_run(folder: Path, use: str | None = None) -> Run:
    """Opens a run folder that train wrote.

    Args:
        folder: the run folder.
        use: last, best or a step; None for what the run's configuration says.

    Raises:
        UserError: the folder is no run, or the checkpoint is missing or damaged.
    """
    if not ((folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()):
        raise UserError(f"--run {folder}: has no config.yaml or no checkpoints; expected a folder that train wrote.")
    config = from_file(folder / "config.yaml")
    experiment.enable_compile_cache(config)
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    use = use or config.checkpoint.use
    step = checkpoints.pick(use)
    meta = checkpoints.meta(step)
    check_config(config, meta)
    phase = config.phases[meta["phase"]]
    model, preprocess = experiment.create_model(config, len(meta["classes"]), dtype=meta["dtype"])
    plan = experiment.PhasePlan(0, meta["phase"], phase)
    state = checkpoints.restore(step, experiment.abstract_state(model, plan))
    run = Run(
        folder=folder,
        config=config,
        model=model,
        preprocess=preprocess,
        classes=tuple(meta["classes"]),
        params=state.params,
        batch_stats=state.batch_stats,
        phase=phase,
        fingerprint=meta["fingerprint"],
        use=use,
        step=step,
        weights_hash=checkpoints.identity(step),
        best_epoch=use == "best" or meta.get("kept_best", False),  # kept_best is of Learner.fit(keep="best")
        user_functions=meta.get("own"),
    )
    checkpoints.close()
    return run


def training_index(run: Run) -> FolderIndex:
    """The index of the images that the run was trained on; UserError where they have changed since."""
    root = run.config.data.root
    images = experiment.index_images(run.config, experiment.cache_folder_of(run.config), run.folder)
    same = experiment.same_images(experiment.fingerprint(images), run.fingerprint)
    if images.classes != run.classes or not same:
        raise UserError(f"{root}: the images have changed since this run was trained; evaluate a folder with --data.")
    return images


def count_seen_images(run: Run, split: Split) -> dict[str, int]:
    """By split, how many of the run's own images are in another split by content; empty where its images have changed."""
    try:
        own_splits = training_index(run).splits
    except UserError:
        return {}
    counts = {name: len(set(split.hashes) & set(own.hashes)) for name, own in own_splits.items()}
    return {name: n for name, n in counts.items() if n}


def other_dataset(run: Run, folder: str, *, unlabelled: bool = False) -> tuple[Split, tuple[BadFile, ...]]:
    """The images of another folder, and its files that can't be used.

    Args:
        run: gives the classes, and how labels are found.
        folder: class folders, or images without labels.
        unlabelled: the folders in it are not classes.
    """
    data = run.config.data
    cache = experiment.cache_folder_of(run.config)
    options = {"on_bad_file": data.on_bad_file, "workers": data.workers, "rehash": data.rehash, "cache_dir": cache}
    root = Path(os.path.expanduser(folder))
    # A table names the images of one folder only.
    labels = "folders" if label_kind(data.labels) == "table" else data.labels
    has_folders = any(p.is_dir() and not p.name.startswith(".") for p in root.glob("*"))
    if unlabelled or (labels == "folders" and not has_folders):
        return index.scan_unlabelled(root, **options)
    try:
        return index.scan_labelled(root, classes=run.classes, labels=labels, **options)
    except UserError as e:
        raise UserError(f"{e}. If its images have no labels, add --unlabelled.") from None
