"""Writes the artefact of a trained classifier: exports the network as a StableHLO program that needs none of this package.

`python -m jaxcats.export`, the end of a training and `Learner.export` call `write_run`.
"""

import contextlib
import hashlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcats
from jaxcats import models
from jaxcats.common.config import to_tree
from jaxcats.common.errors import UserError, first_line
from jaxcats.common.io import cache_folder, write_bytes
from jaxcats.common.versions import versions
from jaxcats.core.step import normalise
from jaxcats.data.images import TRANSFORM_VERSION, Preprocess
from jaxcats.evaluate.predictions import CHOSEN_ON_VALIDATION
from jaxcats.evaluate.run import Run
from jaxcats.evaluate.tta import tta_preset
from jaxcats.export import artifact
from jaxcats.train.features import source_hash

if TYPE_CHECKING:
    from jaxcats.evaluate.calibration import Calibration

PLATFORMS = ("cpu", "cuda")


def write_run(
    run: Run, metrics: dict[str, Any] | None, calibration: "Calibration | None", *, out: Path | None = None
) -> Path:
    """Writes the artefact of a run and returns its folder.

    Args:
        run: the trained run.
        metrics: the content of metrics.json; None or {} if the run has not been evaluated.
        calibration: temperature and threshold; None: temperature 1, and the classifier never abstains.
        out: a new folder, or one that holds an artefact, which is replaced; by default model/ in the run folder.

    Raises:
        UserError: the folder holds something else, or the network can't be exported.
    """
    model, folder = run.model, out or run.folder / "model"
    temperature, abstain, accuracy = np.float32(1), {"threshold": None, "max_error": None}, None
    if calibration:
        temperature = np.float32(calibration.temperature)
        abstain = {"threshold": calibration.threshold, "max_error": calibration.max_error}
    if metrics and "errors" in metrics:
        used_for = [*run.checkpoint["valid_used_for"], *(CHOSEN_ON_VALIDATION if calibration else [])]
        accuracy = {key: metrics[key] for key in ("n", "errors", "interval")} | {"used_for": used_for}
    leaves = _named_leaves(run.params, run.batch_stats) | {"temperature": temperature}
    facts = {
        "jaxcats": jaxcats.__version__,
        "jax": jax.__version__,
        "backbone": model.name,
        "head": model.head,
        "dtype": model.dtype,
        "classes": list(run.classes),
        "preprocess": run.preprocess.to_dict(),
        "transform": TRANSFORM_VERSION,
        "temperature": float(temperature),
        "abstain": abstain,
        "accuracy": accuracy,
        "tta": {"augment": tta_preset(run.phase.augment)},
        "checkpoint": run.checkpoint,
        "training": to_tree(run.config),
        "versions": versions(),
    }
    tensors = {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}
    artifact.write(folder, tensors=tensors, program=make_program(model, run.preprocess), facts=facts)
    return folder


def _named_leaves(params: Any, batch_stats: Any) -> dict[str, Any]:
    """The leaves under names like "params/backbone/stem/conv/kernel", in the order of jax.tree.leaves."""
    leaves = jax.tree_util.tree_leaves_with_path({"params": params, "batch_stats": batch_stats})
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def make_program(model: models.Model, preprocess: Preprocess) -> bytes:
    """Exports a network, from uint8 pixels to calibrated probabilities, for CPU and CUDA.

    Exporting takes seconds, so the program of a network of this package is kept in the cache folder.

    Args:
        model: the network.
        preprocess: its size S, mean and std; the program normalises the pixels.

    Returns:
        A serialized jax.export.Exported: `(arrays by name, images uint8 [b, S, S, 3]) -> float32 [b, C]`. The arrays
        are those of the network and "temperature".

    Raises:
        UserError: the network does something that an artefact can't hold, such as calling back into Python.
    """
    key = _cache_key(model, preprocess)
    cached = cache_folder() / "programs" / f"{key}.stablehlo"
    if key:
        with contextlib.suppress(OSError):
            content = cached.read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                return content[32:]
    try:
        exported = _export(model, preprocess)
        artifact.check_program(exported)
        program = bytes(exported.serialize())
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{model.name}: this network can't be exported: {first_line(error)}.") from None
    if key:
        with contextlib.suppress(OSError):
            write_bytes(cached, hashlib.sha256(program).digest() + program)
    return program


def _cache_key(model: models.Model, preprocess: Preprocess) -> str | None:
    """Hashes everything that decides the program; None for a network from outside this package: its code is not hashed."""
    code = source_hash(model.backbone)
    if code is None:
        return None
    config: Any = jax.config
    settings = (config.jax_enable_x64, config.jax_default_matmul_precision, PLATFORMS)
    network = (model.name, model.head, model.dtype, model.num_classes, model.channels, preprocess.to_dict())
    own_code = inspect.getsource(_export) + inspect.getsource(_named_leaves)
    return hashlib.sha256(repr((code, own_code, network, settings)).encode()).hexdigest()


def _export(model: models.Model, preprocess: Preprocess) -> jax.export.Exported:
    params, batch_stats = models.shapes(model)
    shapes = _named_leaves(params, batch_stats)
    structure = jax.tree.structure({"params": params, "batch_stats": batch_stats})
    prepare = normalise(preprocess.mean, preprocess.std)

    def classify(tensors: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        variables = jax.tree.unflatten(structure, [tensors[name] for name in shapes])
        logits, _ = model.apply(variables["params"], variables["batch_stats"], prepare(images), train=False)
        return jax.nn.softmax(logits / tensors["temperature"])

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, preprocess.size, preprocess.size, 3), jnp.uint8)
    tensors = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for name, leaf in shapes.items()}
    tensors["temperature"] = jax.ShapeDtypeStruct((), jnp.float32)
    config: Any = jax.config
    frames = config.jax_traceback_in_locations_limit
    try:
        config.update("jax_traceback_in_locations_limit", 0)  # no paths of this machine in the program
        return jax.export.export(jax.jit(classify), platforms=PLATFORMS)(tensors, images)
    finally:
        config.update("jax_traceback_in_locations_limit", frames)
