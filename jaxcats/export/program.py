"""A classifier as a folder that can be shipped: its arrays, its description and a program that needs none of this package."""

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcats
from jaxcats.common.errors import UserError
from jaxcats.core.step import normalise
from jaxcats.data.images import TRANSFORM_VERSION, Preprocess
from jaxcats.export import artifact
from jaxcats.models import registry
from jaxcats.train.features import source_hash

PLATFORMS = ("cpu", "cuda")


def flat(params: Any, batch_stats: Any) -> dict[str, np.ndarray]:
    """Float32 arrays under names like "params/backbone/stem/conv/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path({"params": params, "batch_stats": batch_stats})
    return {"/".join(entry.key for entry in path): np.asarray(leaf, np.float32) for path, leaf in leaves}


def _nested(tensors: dict[str, Any]) -> dict[str, Any]:
    """The inverse; a part without arrays is an empty dictionary."""
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for part in tree.values():
        part |= {"backbone": {}, "head": {}}
    for name, leaf in tensors.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = leaf
    return tree


def make_program(model: Any, preprocess: Preprocess, tensors: dict[str, np.ndarray]) -> bytes:
    """Serialized StableHLO of `(tensors, images uint8 [b, S, S, 3]) -> probabilities float32 [b, C]`, for CPU and CUDA.

    Args:
        model: models.Model.
        preprocess: its size S, mean and std; normalisation is part of the program.
        tensors: as from `flat`, and "temperature"; only their shapes count.

    A network of this package's own is exported once: its program is then kept in the cache folder.

    Raises:
        UserError: the network holds an operation that storage/program.py doesn't allow.
    """
    key = _key(model, preprocess, tensors)
    kept = key and artifact.kept(key)
    if kept:
        return kept
    prepare = normalise(preprocess.mean, preprocess.std)

    def classify(tensors: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        tree = _nested({name: x for name, x in tensors.items() if name != "temperature"})
        logits, _ = model.apply(tree["params"], tree["batch_stats"], prepare(images), train=False)
        return jax.nn.softmax(logits / tensors["temperature"])

    (batch,) = jax.export.symbolic_shape("b")
    pictures = jax.ShapeDtypeStruct((batch, preprocess.size, preprocess.size, 3), jnp.uint8)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in tensors.items()}
    config: Any = jax.config
    frames = config.jax_traceback_in_locations_limit
    try:
        config.update("jax_traceback_in_locations_limit", 0)  # no paths of this machine in what is shipped
        made = bytes(jax.export.export(jax.jit(classify), platforms=PLATFORMS)(shapes, pictures).serialize())
    finally:
        config.update("jax_traceback_in_locations_limit", frames)
    try:
        artifact.check(made)
    except ValueError as error:
        raise UserError(f"{model.name}: this network can't be exported: {error}.") from None
    artifact.remember(made)
    if key:
        artifact.keep(key, made)
    return made


def _key(model: Any, preprocess: Preprocess, tensors: dict[str, np.ndarray]) -> str | None:
    """Hash of all that decides a program; None for a network from outside this package, whose code may change unseen."""
    code = source_hash(registry.get(model.name))
    if code is None:
        return None
    config: Any = jax.config
    own = inspect.getsource(make_program) + inspect.getsource(_nested)
    shapes = sorted((name, x.shape) for name, x in tensors.items())
    settings = (config.jax_enable_x64, config.jax_default_matmul_precision, PLATFORMS)
    facts = (code, own, model.name, model.head, model.dtype, model.num_classes, preprocess.to_dict(), shapes, settings)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def write(
    folder: Path,
    *,
    model: Any,
    params: Any,
    batch_stats: Any,
    preprocess: Preprocess,
    classes: Sequence[str],
    calibration: Any = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Writes the artefact of a classifier; the old one, or the new one, whatever happens.

    Args:
        folder: where to; replaced if it is an artefact, UserError if it holds anything else.
        model: models.Model.
        params: its weights.
        batch_stats: its averages.
        preprocess: what its images go through.
        classes: names in the order of the logits.
        calibration: has temperature, threshold and max_error; None: temperature 1, and every image gets an answer.
        facts: further entries of model.json: "accuracy" {n, errors, ...}, "tta" {augment}, "training", "versions", ...
    """
    temperature = np.float32(calibration.temperature if calibration else 1.0)
    tensors = flat(params, batch_stats) | {"temperature": np.asarray(temperature)}
    threshold, max_error = (calibration.threshold, calibration.max_error) if calibration else (None, None)
    artifact.write(
        Path(folder),
        tensors=tensors,
        program=make_program(model, preprocess, tensors),
        facts={
            "jaxcats": jaxcats.__version__,
            "jax": jax.__version__,
            "backbone": model.name,
            "head": model.head,
            "dtype": model.dtype,
            "classes": list(classes),
            "preprocess": preprocess.to_dict(),
            "transform": TRANSFORM_VERSION,
            "temperature": float(temperature),
            "abstain": {"threshold": threshold, "max_error": max_error},
            "accuracy": None,
            "tta": {"augment": "side_on"},
            **(facts or {}),
        },
    )


def write_run(run: Any, found: dict[str, Any] | None, calibration: Any, *, out: Path | None = None) -> Path:
    """Writes a run's artefact, by default into its own folder's model/; the folder written.

    Args:
        run: evaluate.run.Run.
        found: metrics.json's content, None or {} where nothing is known.
        calibration: as for `write`.
        out: another folder.
    """
    from jaxcats.common.config import to_tree
    from jaxcats.common.versions import versions
    from jaxcats.evaluate.predictions import USED
    from jaxcats.evaluate.tta import preset

    accuracy = None
    if found and "errors" in found:
        used = [*run.checkpoint["valid_used_for"], *(USED if calibration else [])]
        accuracy = {"n": found["n"], "errors": found["errors"], "interval": found["interval"], "used_for": used}
    folder = Path(out) if out else run.folder / "model"
    write(
        folder,
        model=run.model,
        params=run.state.params,
        batch_stats=run.state.batch_stats,
        preprocess=run.preprocess,
        classes=run.classes,
        calibration=calibration,
        facts={
            "accuracy": accuracy,
            "tta": {"augment": preset(run.augment)},
            "checkpoint": run.checkpoint,
            "training": to_tree(run.config),
            "versions": versions(),
        },
    )
    return folder
