"""The folder that a classifier is shipped in: model.json, model.safetensors and model.stablehlo; verified before use.

The program in model.stablehlo is `(tensors, images uint8 [b, S, S, 3]) -> probabilities float32 [b, C]`, the tensors are
those of model.safetensors by name, and model.json says the rest, with the SHA-256 of the other two. No pickle anywhere.
"""

import ctypes
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import safetensors
import safetensors.numpy

from jaxcats.data.augment import PRESETS
from jaxcats.data.preprocess import TRANSFORM_VERSION, Preprocess
from jaxcats.errors import UserError, unwritable
from jaxcats.storage import program as programs
from jaxcats.storage.atomic import temporary, write_bytes, write_json

FORMAT = 1
JSON, TENSORS, PROGRAM = "model.json", "model.safetensors", "model.stablehlo"
LIMITS = {JSON: 4 << 20, TENSORS: 8 << 30, PROGRAM: 64 << 20}  # bytes
CLASSES = 100_000


@dataclass(frozen=True, eq=False)
class Artifact:
    """A verified artefact.

    Attributes:
        folder: where it was read.
        facts: model.json's content.
        preprocess: what its pictures go through.
        tensors: float32 arrays by name, the program's first argument.
        exported: jax.export.Exported.
    """

    folder: Path
    facts: dict[str, Any]
    preprocess: Preprocess
    tensors: dict[str, np.ndarray]
    exported: Any

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the probabilities."""
        return tuple(self.facts["classes"])

    @property
    def threshold(self) -> float | None:
        """Probability below which a picture gets no answer; None: every picture gets one."""
        return self.facts["abstain"].get("threshold")


def write(folder: Path, *, tensors: dict[str, np.ndarray], program: bytes, facts: dict[str, Any]) -> None:
    """Writes an artefact, or replaces one, as a whole; raises UserError where the folder holds anything else.

    Args:
        folder: whose last part is created.
        tensors: float32 arrays by name.
        program: jax.export's serialization.
        facts: model.json's content but for "format" and "files".
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - set(LIMITS)):
        raise UserError(f"{folder}: holds something other than an exported classifier; name another folder.")
    contents = {TENSORS: safetensors.numpy.save(tensors), PROGRAM: bytes(program)}
    files = {name: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for name, b in contents.items()}
    fresh = temporary(folder)
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        for name, content in contents.items():
            write_bytes(fresh / name, content)
        write_json(fresh / JSON, {"format": FORMAT, **facts, "files": files})
        _swap(fresh, folder)
    except OSError as e:
        raise unwritable(f"{folder}:", e) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, folder: Path) -> None:
    """Puts `fresh` in the folder's place, and what was there in the place of `fresh`."""
    if not folder.exists():
        os.rename(fresh, folder)
        return
    try:  # Linux exchanges two names in one step
        at_cwd, exchange = -100, 2
        if ctypes.CDLL(None).renameat2(at_cwd, os.fsencode(fresh), at_cwd, os.fsencode(folder), exchange) == 0:
            return
    except (AttributeError, OSError):
        pass
    aside = fresh.with_name(fresh.name + ".old")
    os.rename(folder, aside)
    os.rename(fresh, folder)
    shutil.rmtree(aside, ignore_errors=True)


def _refuse(path: Path, reason: str) -> NoReturn:
    raise UserError(f"{path}: {reason}. Export the classifier again: python -m jaxcats.export --run RUN.")


def _content(path: Path, size: int | None = None) -> bytes:
    """A file's bytes; refuses what is not an ordinary file of its own, or not of the size expected."""
    try:
        # Not through a link, which could name any file; and a pipe would make the opening wait for ever.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                _refuse(path, "not an ordinary file")
            if status.st_size > LIMITS[path.name]:
                _refuse(path, f"{status.st_size:,} bytes are more than such a file can have")
            if size is not None and status.st_size != size:
                _refuse(path, f"has {status.st_size:,} bytes, model.json says {size:,}")
            return file.read(status.st_size)
    except OSError as e:
        reason = "is a link, and must be a file" if path.is_symlink() else f"can't be read ({e.strerror})"
        _refuse(path, reason)


def read(folder: str | os.PathLike) -> Artifact:
    """Reads and verifies an artefact.

    Nothing is used before it is checked: model.json's fields, types and ranges; each file's kind, size and SHA-256; names,
    types and shapes of the tensors against the program's arguments; the program itself as storage/program.py says.
    Hashes tell damage, not who wrote the folder: use artefacts of people you trust.

    Raises:
        UserError: naming the file and the reason.
    """
    folder = Path(folder)
    if not (folder / JSON).exists() and (folder / "model" / JSON).exists():
        folder = folder / "model"  # a run folder
    if not folder.is_dir() or not os.path.lexists(folder / JSON):
        raise UserError(
            f"{folder}: not an exported classifier (no model.json in it). Make one: jaxcats.export --run RUN."
        )
    facts, preprocess = _read_json(folder / JSON)
    contents = {}
    for name in (TENSORS, PROGRAM):
        contents[name] = _content(folder / name, facts["files"][name]["bytes"])
        if hashlib.sha256(contents[name]).hexdigest() != facts["files"][name]["sha256"]:
            _refuse(folder / name, "its SHA-256 is not the one in model.json: damaged, or of another export")
    if importlib.util.find_spec("flatbuffers") is None:  # JAX has it as an optional dependency
        raise UserError(
            "The Python package flatbuffers is missing, which JAX needs to read programs: pip install flatbuffers."
        )
    tensors = _read_tensors(folder / TENSORS, contents[TENSORS], facts["temperature"])
    try:
        programs.first_run(contents[PROGRAM])
        exported = jax.export.deserialize(bytearray(contents[PROGRAM]))
    except Exception as error:
        other = "" if facts["jax"] == jax.__version__ else f"; written by jax {facts['jax']}, this is {jax.__version__}"
        _refuse(folder / PROGRAM, f"can't be used: {(str(error).splitlines() or ['?'])[0]}{other}")
    _check_fit(folder / PROGRAM, exported, tensors, size=preprocess.size, classes=len(facts["classes"]))
    return Artifact(folder, facts, preprocess, tensors, exported)


def _read_json(path: Path) -> tuple[dict[str, Any], Preprocess]:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number")

    try:
        facts = json.loads(_content(path).decode("utf-8"), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"not JSON that can be read ({(str(error).splitlines() or ['?'])[0][:100]})")
    if not isinstance(facts, dict) or "format" not in facts:
        _refuse(path, "not the description of a classifier")
    if facts["format"] != FORMAT:
        wrong = str(facts["format"])[:20]
        raise UserError(f"{path}: has format {wrong}; this jaxcats reads {FORMAT}. Use the jaxcats that wrote it.")

    def need(key: str, ok: Any, expected: str) -> None:
        if not ok:
            _refuse(path, f"{key}: expected {expected}")

    def get(*keys: str) -> Any:
        found: Any = facts
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    for key in ("jaxcats", "jax", "backbone", "head", "dtype"):
        need(key, isinstance(get(key), str) and len(get(key)) < 200, "a name")
    names = get("classes")
    need("classes", isinstance(names, list) and 0 < len(names) <= CLASSES, f"a list of 1 to {CLASSES:,} names")
    need("classes", all(isinstance(n, str) and 0 < len(n) < 1000 for n in names), "names")
    need("classes", len(set(names)) == len(names), "every name once")
    need("temperature", _number(get("temperature"), 1e-3, 1e3), "a number from 0.001 to 1000")
    need("abstain", isinstance(get("abstain"), dict), "threshold and max_error")
    for key in ("threshold", "max_error"):
        value = get("abstain", key)
        need(f"abstain.{key}", value is None or _number(value, 0, 1), "null or a number from 0 to 1")
    need(
        "tta.augment", isinstance(get("tta", "augment"), str) and PRESETS.get(get("tta", "augment")), "a preset's name"
    )
    for name in (TENSORS, PROGRAM):
        need(f"files.{name}.bytes", type(get("files", name, "bytes")) is int, "a whole number")
        digest = get("files", name, "sha256")
        need(
            f"files.{name}.sha256", isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest), "a SHA-256 in hex"
        )
    accuracy = get("accuracy")
    counted = all(type(get("accuracy", key)) is int and get("accuracy", key) >= 0 for key in ("n", "errors"))
    need("accuracy", accuracy is None or counted, "null, or the counts n and errors")
    if get("transform") != TRANSFORM_VERSION:
        shown = str(get("transform"))[:20]
        raise UserError(
            f"{path}: its pictures went through transform {shown}, this jaxcats has {TRANSFORM_VERSION}. "
            f"Use the jaxcats that wrote it."
        )
    return facts, _preprocess(path, get("preprocess"))


def _number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _preprocess(path: Path, values: Any) -> Preprocess:
    """The record, of values that a network can have."""
    try:
        found = Preprocess.from_dict(values)
        triples = len(found.mean) == len(found.std) == 3
        ok = type(found.size) is int and 1 <= found.size <= 2048 and _number(found.crop_fraction, 0.05, 1)
        ok = (
            ok
            and triples
            and all(_number(m, -10, 10) for m in found.mean)
            and all(_number(s, 1e-3, 100) for s in found.std)
        )
    except (UserError, TypeError, ValueError, AttributeError, OverflowError) as error:
        _refuse(path, f"preprocess: {(str(error).splitlines() or ['?'])[0][:100]}")
    if not ok:
        _refuse(path, "preprocess: values that no network can have")
    return found


def _read_tensors(path: Path, content: bytes, temperature: float) -> dict[str, np.ndarray]:
    try:
        entries = safetensors.deserialize(content)  # checks the header against the bytes that are there
    except (safetensors.SafetensorError, ValueError, MemoryError) as error:
        _refuse(path, f"not a safetensors file ({str(error)[:100]})")
    if any(entry["dtype"] != "F32" for _, entry in entries):
        _refuse(path, "holds something other than float32 arrays")
    tensors = {name: np.frombuffer(entry["data"], np.float32).reshape(entry["shape"]) for name, entry in entries}
    if not all(np.isfinite(t).all() for t in tensors.values()):
        _refuse(path, "holds weights that are not numbers")
    scalar = tensors.get("temperature")
    if scalar is None or scalar.shape != () or scalar != np.float32(temperature):
        _refuse(path, "its temperature is not the one in model.json")
    return tensors


def _check_fit(path: Path, exported: Any, tensors: dict[str, np.ndarray], *, size: int, classes: int) -> None:
    """Refuses a program whose arguments are not these tensors and pictures, or whose result is not probabilities."""
    if exported.in_tree != jax.tree.structure(((dict.fromkeys(tensors, 0), 0), {})):
        _refuse(path, "its arguments are not the tensors of model.safetensors")
    *wanted, images = exported.in_avals
    for name, aval in zip(sorted(tensors), wanted, strict=True):
        if (aval.shape, aval.dtype) != (tensors[name].shape, np.float32):
            _refuse(
                path,
                f"{name[:100]} has shape {tensors[name].shape} in model.safetensors, the program takes {aval.shape}",
            )
    batch = images.shape[0] if images.ndim == 4 else 0
    pictures = jax.export.is_symbolic_dim(batch) and (images.shape[1:], images.dtype) == ((size, size, 3), np.uint8)
    out = exported.out_avals
    answers = len(out) == 1 and (out[0].shape, out[0].dtype) == ((batch, classes), np.float32)
    if not pictures or not answers:
        _refuse(path, f"not a function of pictures of {size} pixels to probabilities of {classes} classes")
