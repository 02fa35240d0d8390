"""Small artefacts for tests: written like real ones, of the tiny backbone with random weights."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import tiny  # noqa: F401  registers the tiny backbone

from jaxcats import models
from jaxcats.common.config import Config
from jaxcats.data.images import Preprocess
from jaxcats.evaluate.calibration import Calibration
from jaxcats.evaluate.run import Run
from jaxcats.export import artifact
from jaxcats.export.program import write_run

CLASSES = ("cats", "dogs", "é\u200b")
PREPROCESS = Preprocess(size=24)


def weights(model: models.Model, seed: int):
    """Random params and batch_stats, such that images get different predictions, some of them unsure."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        values = rng.uniform(0.5, 1.5, x.shape) if path[-1].key in ("var", "scale") else rng.normal(0, 0.5, x.shape)
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, models.shapes(model))


def export(folder: Path, seed: int = 0) -> Path:
    model, config = models.create("tiny", len(CLASSES), head="linear"), Config()
    params, stats = weights(model, seed)
    run = Run(
        folder=folder.parent,
        config=config,
        model=model,
        preprocess=PREPROCESS,
        classes=CLASSES,
        params=params,
        batch_stats=stats,
        phase=config.phases["head"],
        fingerprint="",
        use="last",
        step=1,
    )
    metrics = {"n": 10, "errors": 1, "interval": [0.5, 1]}
    return write_run(run, metrics, Calibration(temperature=1.7, threshold=0.6, max_error=0.01), out=folder)


def change(folder: Path, **facts) -> None:
    """Entries of model.json set, dotted keys with __ for the dot."""
    tree = json.loads((folder / artifact.JSON).read_text())
    for key, value in facts.items():
        *path, last = key.split("__")
        place = tree
        for part in path:
            place = place[part]
        place[last] = value
    (folder / artifact.JSON).write_text(json.dumps(tree))


def replace(folder: Path, name: str, content: bytes) -> None:
    """A file's content, and its size and hash in model.json as if it had been exported so."""
    (folder / name).write_bytes(content)
    tree = json.loads((folder / artifact.JSON).read_text())
    tree["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / artifact.JSON).write_text(json.dumps(tree))
