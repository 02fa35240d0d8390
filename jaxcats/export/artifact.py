"""Reads, checks and writes artefacts: the folders in which a classifier is shipped.

    model.safetensors   float32 arrays by name
    model.stablehlo     a program `(arrays, images uint8 [b, S, S, 3]) -> probabilities float32 [b, C]`
    model.json          classes, preprocessing and more, and the size and SHA-256 of the other two files

`program.py` makes the files, `classifier.py` uses them. The checks find damage and mistakes. They do not
isolate the program, so an artefact is only as trusted as whoever gave it.
"""

import ctypes
import hashlib
import json
import math
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.interpreters.mlir import make_ir_context
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from jaxcats.common.errors import UserError, first_line, unwritable
from jaxcats.common.io import temporary, write_bytes, write_json
from jaxcats.data.augment import PRESETS
from jaxcats.data.images import TRANSFORM_VERSION, Preprocess

FORMAT = 1
JSON, TENSORS, PROGRAM = "model.json", "model.safetensors", "model.stablehlo"
MAX_BYTES = {JSON: 4 << 20, TENSORS: 8 << 30, PROGRAM: 64 << 20}
ALLOWED_CALLS = {"shape_assertion"}  # jax.export puts it in to check the batch size


@dataclass(frozen=True, eq=False)
class Artifact:
    """A verified artefact.

    Attributes:
        folder: where it was read.
        facts: the content of model.json.
        preprocess: the preprocessing of its images.
        tensors: float32 arrays by name, the program's first argument.
        exported: the program.
    """

    folder: Path
    facts: dict[str, Any]
    preprocess: Preprocess
    tensors: dict[str, np.ndarray]
    exported: jax.export.Exported

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the probabilities."""
        return tuple(self.facts["classes"])


def write(folder: Path, *, tensors: dict[str, np.ndarray], program: bytes, facts: dict[str, Any]) -> None:
    """Writes an artefact. If it is interrupted, the folder holds the old artefact as it was.

    Args:
        folder: a new folder, or one that holds an artefact, which is replaced.
        tensors: float32 arrays by name.
        program: a serialized jax.export.Exported.
        facts: the content of model.json except "format" and "files".

    Raises:
        UserError: the folder holds anything else, or can't be written.
        RunError: the disk is full.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - set(MAX_BYTES)):
        raise UserError(f"{folder}: holds something other than an exported classifier; name another folder.")
    fresh, files = temporary(folder), {}
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        for name, content in ((TENSORS, safetensors.numpy.save(tensors)), (PROGRAM, program)):
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            write_bytes(fresh / name, content)
        write_json(fresh / JSON, {"format": FORMAT, **facts, "files": files})
        _replace_folder(folder, fresh)
    except OSError as error:
        raise unwritable(f"{folder}:", error) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _replace_folder(folder: Path, fresh: Path) -> None:
    """Renames `fresh` to `folder`. On Linux an existing folder takes the name `fresh`; elsewhere it is deleted."""
    if not folder.exists():
        os.rename(fresh, folder)
        return
    try:  # Linux can exchange two names in one step, so that a killed process leaves one of the two in place
        at_cwd, exchange = -100, 2
        if ctypes.CDLL(None).renameat2(at_cwd, os.fsencode(fresh), at_cwd, os.fsencode(folder), exchange) == 0:
            return
    except (AttributeError, OSError):
        pass
    old = fresh.with_name(fresh.name + ".old")
    os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def read(folder: str | os.PathLike) -> Artifact:
    """Reads an artefact and verifies it before anything in it is used.

    It checks the fields of model.json, the size and SHA-256 of the other files, the names, types and shapes of the
    arrays against the program's arguments, and that the program calls no outside code (`check_program`). Links to
    ordinary files are followed, since the caches of model hubs consist of them.

    Args:
        folder: an artefact, or a run folder with an artefact in model/.

    Raises:
        UserError: the artefact can't be used; the message names the file and the reason.
    """
    folder = Path(folder)
    if not (folder / JSON).exists() and (folder / "model" / JSON).exists():
        folder = folder / "model"
    if not os.path.lexists(folder / JSON):
        _refuse(folder, "not an exported classifier (it has no model.json)")
    facts = _read_json(folder / JSON)
    try:
        preprocess = Preprocess.from_dict(facts["preprocess"])
        if type(preprocess.size) is not int or not _is_number(preprocess.crop_fraction, 0.05, 1):
            raise ValueError("expected a whole size and a crop_fraction from 0.05 to 1")
    except (UserError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        _refuse(folder / JSON, f"preprocess: {first_line(error)[:100]}")
    contents = {name: _read_file(folder / name, facts["files"][name]) for name in (TENSORS, PROGRAM)}
    tensors = _read_tensors(folder / TENSORS, contents[TENSORS], facts["temperature"])
    try:
        exported = jax.export.deserialize(bytearray(contents[PROGRAM]))
        check_program(exported)
    except Exception as error:
        reason = first_line(error)
        if facts["jax"] != jax.__version__:
            reason += f"; it was written by jax {facts['jax']}, and this is jax {jax.__version__}"
        _refuse(folder / PROGRAM, f"can't be used: {reason}")
    artifact = Artifact(folder, facts, preprocess, tensors, exported)
    _check_signature(folder / PROGRAM, artifact)
    return artifact


def check_program(exported: jax.export.Exported) -> None:
    """Raises ValueError for a program with side effects, for several devices, or that calls code outside itself."""
    if exported.ordered_effects or exported.unordered_effects or exported.nr_devices != 1:
        raise ValueError("the program has side effects or needs several devices")
    targets: set[str] = set()

    def collect(operation: Any) -> Any:
        if operation.name.endswith("custom_call"):
            targets.add(str(operation.attributes["call_target_name"]).strip('"'))
        return ir.WalkResult.ADVANCE

    with make_ir_context() as context:
        # `exported.mlir_module()` would print the program, which takes four times as long.
        module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        module.operation.walk(collect)
    if outside := ", ".join(sorted(targets - ALLOWED_CALLS)):
        raise ValueError(f"the program makes the custom call {outside[:100]!r}, which is code outside the artefact")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise UserError(f"{path}: {reason}. Export the classifier again: python -m jaxcats.export --run RUN.")


def _read_file(path: Path, expected: dict[str, Any] | None = None) -> bytes:
    """Reads a file of an artefact, and compares it with its entry in model.json."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            _refuse(path, "not an ordinary file")
        if status.st_size > MAX_BYTES[path.name]:
            _refuse(path, f"has {status.st_size:,} bytes, more than such a file can have")
        if expected and status.st_size != expected["bytes"]:
            _refuse(path, f"has {status.st_size:,} bytes, but model.json says {expected['bytes']:,}")
        content = path.read_bytes()
    except OSError as error:
        _refuse(path, f"can't be read ({error.strerror})")
    if expected and hashlib.sha256(content).hexdigest() != expected["sha256"]:
        _refuse(path, "its SHA-256 is not the one in model.json: it is damaged, or belongs to another export")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    """Reads model.json and checks the type and range of every entry that is used."""
    try:
        facts = json.loads(_read_file(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        _refuse(path, f"not readable JSON ({str(error)[:100]})")

    def look_up(*keys: str) -> Any:
        value = facts
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    for key, version in (("format", FORMAT), ("transform", TRANSFORM_VERSION)):
        if look_up(key) != version:
            value = repr(look_up(key))[:20]
            raise UserError(f"{path}: has {key} {value}; this jaxcats reads {version}. Use the jaxcats that wrote it.")
    classes, threshold = look_up("classes"), look_up("abstain", "threshold")
    are_names = isinstance(classes, list) and len(classes) > 0 and all(map(_is_text, classes))
    is_threshold = isinstance(look_up("abstain"), dict) and (threshold is None or _is_number(threshold, 0, 1))
    presets = [name for name, preset in PRESETS.items() if preset]
    counts = [look_up("accuracy", key) for key in ("n", "errors")]
    are_counts = all(type(count) is int and count >= 0 for count in counts)
    checks = {
        "jax, backbone and dtype: expected names": all(_is_text(look_up(key)) for key in ("jax", "backbone", "dtype")),
        "classes: expected a list of different names": are_names and len(set(classes)) == len(classes),
        "temperature: expected a number from 0.001 to 1000": _is_number(look_up("temperature"), 1e-3, 1e3),
        "abstain.threshold: expected null or a number from 0 to 1": is_threshold,
        f"tta.augment: expected one of {', '.join(presets)}": look_up("tta", "augment") in presets,
        "accuracy: expected null, or the counts n and errors": look_up("accuracy") is None or are_counts,
    }
    for name in (TENSORS, PROGRAM):
        size, sha256 = look_up("files", name, "bytes"), look_up("files", name, "sha256")
        checks[f"files.{name}: expected its bytes and sha256"] = type(size) is int and _is_text(sha256)
    for expectation, is_met in checks.items():
        if not is_met:
            _refuse(path, expectation)
    return facts


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) < 1000


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _read_tensors(path: Path, content: bytes, temperature: float) -> dict[str, np.ndarray]:
    try:
        entries = safetensors.deserialize(content)  # compares the header with the bytes that follow it
    except (safetensors.SafetensorError, ValueError, MemoryError) as error:
        _refuse(path, f"not a safetensors file ({str(error)[:100]})")
    if any(entry["dtype"] != "F32" for _, entry in entries):
        _refuse(path, "holds arrays that are not float32")
    tensors = {name: np.frombuffer(entry["data"], np.float32).reshape(entry["shape"]) for name, entry in entries}
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        _refuse(path, "holds weights that are not numbers")
    scalar = tensors.get("temperature")
    if scalar is None or scalar.shape != () or scalar != np.float32(temperature):
        _refuse(path, "its temperature is not the one in model.json")
    return tensors


def _check_signature(path: Path, artifact: Artifact) -> None:
    """Refuses a program that is not a function of the arrays and of images to probabilities."""
    exported, tensors, size = artifact.exported, artifact.tensors, artifact.preprocess.size
    is_tree = exported.in_tree == jax.tree.structure(((dict.fromkeys(tensors, 0), 0), {}))
    batch = exported.in_avals[-1].shape[:1] if is_tree else (0,)
    expected = [(tensors[name].shape, np.float32) for name in sorted(tensors)]
    expected += [((*batch, size, size, 3), np.uint8), ((*batch, len(artifact.classes)), np.float32)]
    shapes = [(value.shape, value.dtype) for value in (*exported.in_avals, *exported.out_avals)]
    if not is_tree or shapes != expected or not jax.export.is_symbolic_dim(batch[0]):
        images = f"images of {size} pixels to probabilities of {len(artifact.classes)} classes"
        _refuse(path, f"not a function of the arrays in {TENSORS} and of {images}")
