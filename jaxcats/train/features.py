"""Features of the frozen backbone, computed once and kept in a cache that is keyed by content.

`precompute` gives the features of a run's splits, `backbone_features` those of any split; `cached_features` is the cache.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL
from safetensors import SafetensorError
from safetensors.numpy import load, save

from jaxcats import models
from jaxcats.common import distributed
from jaxcats.common.compile_cache import compiler_options, jit
from jaxcats.common.io import progress_bar, remove_stale_temporaries, warn, write_bytes, write_json
from jaxcats.core import mesh
from jaxcats.core.state import tree_hash
from jaxcats.core.step import normalise
from jaxcats.data.images import TRANSFORM_VERSION, Preprocess
from jaxcats.data.index import Split
from jaxcats.train.drivers import decoding, image_batches, one_batch_late
from jaxcats.train.experiment import Experiment

SHARD_ROWS = 256  # A killed process loses the last rows: at most a minute of work at five images a second or more.
XLA_ALIGNMENT = 64  # bytes


# --- computing them ---


def precompute(experiment: Experiment, params: Any, batch_stats: Any) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Features of each split by name, and how many were {"reused", "computed"}."""
    splits = experiment.index.splits
    whole = Split(
        root=experiment.index.root,
        paths=sum((s.paths for s in splits.values()), ()),
        labels=np.concatenate([s.labels for s in splits.values()]),
        hashes=sum((s.hashes for s in splits.values()), ()),
    )
    cached = backbone_features(
        experiment.model,
        whole,
        params=params,
        batch_stats=batch_stats,
        cache_dir=experiment.cache,
        **decoding(experiment),
    )
    parts = np.split(cached.features, np.cumsum([len(s) for s in splits.values()])[:-1])
    return dict(zip(splits, parts, strict=True)), {"reused": cached.reused, "computed": cached.computed}


def backbone_features(
    model: models.Model,
    split: Split,
    *,
    params: Any,
    batch_stats: Any,
    preprocess: Preprocess,
    batch_size: int,
    workers: int | None,
    cache_dir: Path,
) -> "Cached":
    """Pooled features [n, F] of the images of a split, from the cache where their content and the backbone are known."""
    run = feature_program(model, preprocess)
    weights = {"backbone": params["backbone"], "head": {}}, {"backbone": batch_stats["backbone"], "head": {}}

    def compute(rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        batches = image_batches(split, preprocess=preprocess, batch_size=batch_size, workers=workers, rows=rows)
        with progress_bar(total=len(rows), desc="features") as bar:
            for indices, values in one_batch_late(
                batches, lambda batch: run(*weights, mesh.place_rows(batch["image"], len(batch["mask"])))
            ):
                yield indices, values
                bar.update(len(indices))

    image_shape = (mesh.round_up_to_devices(batch_size), preprocess.size, preprocess.size, 3)
    # Shapes alone: arrays restored from a checkpoint would add their placement to the text of the program.
    shapes = (*jax.eval_shape(lambda: weights), jax.ShapeDtypeStruct(image_shape, np.uint8))
    facts = {
        "backbone": model.name,
        "head": model.head,
        "dtype": model.dtype,
        "weights": tree_hash({"params": weights[0], "batch_stats": weights[1]}),
        "preprocess": preprocess.to_dict(),
        "transform": TRANSFORM_VERSION,
        "pillow": PIL.__version__,
        "batch_size": batch_size,  # changes the last bits
        "program": source_hash(model.backbone) or _sha256(run.lower(*shapes).as_text()),
        "compiler": compiler_options(jax.default_backend()),
        "platform": jax.default_backend(),
    }
    if mesh.has_many_devices():
        facts["devices"] = jax.device_count()
    agree, width = distributed.any_process, model.feature_size
    return cached_features(split.hashes, facts=facts, width=width, compute=compute, cache_dir=cache_dir, agree=agree)


def feature_program(model: models.Model, preprocess: Preprocess) -> Callable:
    """Jitted `(params, batch_stats, images uint8 [N,H,W,3]) -> features float32 [N,F]` of the frozen backbone.

    On CPU the batch goes through the network a few images at a time, inside one program: their activations stay in the
    processor's cache and reuse its memory. Activations of a whole batch would be allocated again at every call.
    """
    prepare = normalise(preprocess.mean, preprocess.std)

    def features_of(params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        n = len(images)
        part = next(k for k in (4, 2, 1) if n % k == 0) if jax.default_backend() == "cpu" else n
        if part == n:
            return model.features(params, batch_stats, prepare(images))
        parts = images.reshape(n // part, part, *images.shape[1:])
        return jax.lax.map(lambda x: model.features(params, batch_stats, prepare(x)), parts).reshape(n, -1)

    return jit(mesh.per_device(features_of), **mesh.replicated_outputs())


@functools.cache
def source_hash(backbone: models.Backbone) -> str | None:
    """Hash of the code that computes the features of a backbone; None for one from outside this package, or without its code.

    The cache's key holds it instead of the program's hash: lowering the network for that takes a second in every run.
    """
    build = backbone.build
    if not getattr(build, "func", build).__module__.startswith(f"{models.__name__}."):
        return None
    try:
        code = [inspect.getsource(feature_program), inspect.getsource(normalise)]
        code += [path.read_text(encoding="utf-8") for path in sorted(Path(models.__file__).parent.glob("*.py"))]
    except OSError:
        return None
    code += [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    return _sha256("\0".join(code))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- the cache: a folder per key, files of rows under the hashes of their images ---


@dataclass(frozen=True)
class Cached:
    """Features and where they came from.

    Attributes:
        features: float32 [N, F], read-only.
        reused: rows read from the cache.
        computed: images that went through the backbone.
    """

    features: np.ndarray
    reused: int
    computed: int


def cached_features(
    hashes: Sequence[str],
    *,
    facts: Mapping[str, Any],
    width: int,
    compute: Callable[[np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]],
    cache_dir: Path,
    agree: Callable[[np.ndarray], np.ndarray] = lambda missing: missing,
) -> Cached:
    """Features of images, from the cache where their content is known.

    Args:
        hashes: SHA-256 (hex) of the content of each image, N of them.
        facts: everything else that the features depend on; their JSON names the cache folder.
        width: F.
        compute: rows to compute, int [M] -> iterator of (rows [m], features float32 [m, F]).
        cache_dir: parent of the cache folders. When it is not writable, the features are used and not kept.
        agree: from the rows that are missing here (bool [N]) to those that all processes compute together.
    """
    folder = cache_dir / "features" / _sha256(json.dumps(facts, sort_keys=True))[:32]
    remove_stale_temporaries(folder)
    features = _aligned_zeros(len(hashes), width)
    row_of: dict[str, int] = {}
    first = np.array([row_of.setdefault(h, row) for row, h in enumerate(hashes)], int)  # equal images are computed once
    known = _read_shards(folder, row_of, features)
    missing = agree(~known[first])
    rows = np.flatnonzero(missing & (first == np.arange(len(hashes))))
    if len(rows):
        _compute_and_keep(compute(rows), folder, facts, hashes, features)
    copies = np.flatnonzero(first != np.arange(len(hashes)))
    features[copies] = features[first[copies]]
    features.flags.writeable = False  # From here on a device may share the memory.
    return Cached(features, len(hashes) - int(missing.sum()), len(rows))


def _compute_and_keep(
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    folder: Path,
    facts: Mapping[str, Any],
    hashes: Sequence[str],
    features: np.ndarray,
) -> None:
    """Fills rows of `features` as they come, and writes a file once there are SHARD_ROWS; warns where that fails.

    The files depend on the rows alone, so every process that computes these rows leaves the same files.
    """
    rows: list[int] = []  # computed and not yet written
    writable = True
    try:
        for computed, values in batches:
            features[computed] = values
            rows += computed.tolist()
            if len(rows) >= SHARD_ROWS:
                writable = writable and _write_shard(folder, facts, hashes, features, rows)
                rows = []  # If an interrupt strikes before this, they are written once more under the same name.
    finally:  # An interrupted process (Ctrl-C, SIGTERM) keeps what it has computed.
        if rows and writable:
            _write_shard(folder, facts, hashes, features, rows)


def _write_shard(
    folder: Path, facts: Mapping[str, Any], hashes: Sequence[str], features: np.ndarray, rows: list[int]
) -> bool:
    """Writes some rows of features with the hashes of their images; warns where the folder can't be written, and returns False."""
    names = np.frombuffer(bytes.fromhex("".join(hashes[row] for row in rows)), np.uint8).reshape(-1, 32)
    data = save({"hashes": names, "features": features[rows]})
    try:
        # The name is the hash of the content: a file that is cut short or altered later no longer matches it.
        write_bytes(folder / f"{hashlib.sha256(data).hexdigest()}.safetensors", data)
        write_json(folder / "facts.json", dict(facts))
    except OSError as e:
        warn(f"features are not kept: {folder} can't be written ({e.strerror})")
        return False
    return True


def _read_shards(folder: Path, row_of: Mapping[str, int], features: np.ndarray) -> np.ndarray:
    """Fills the rows of `features` that the cache has; returns which these are, bool [N].

    Damaged files are removed. A file that can't be read (no permission, a disk error) may be intact and is skipped.
    """
    known, unread = np.zeros(len(features), bool), []
    for path in sorted(folder.glob("*.safetensors")) if os.path.isdir(folder) else []:
        try:
            names, values = _parse_shard(path.read_bytes(), path.stem, features.shape[1])
        except OSError as e:
            unread.append(f"{path}: can't be read ({e.strerror})")
            continue
        except (ValueError, TypeError, KeyError, AttributeError, SafetensorError):
            warn(f"{path}: damaged; removed and computed again.")
            with contextlib.suppress(OSError):  # a shared cache may be read-only
                path.unlink()
            continue
        for name, value in zip(names, values, strict=True):
            row = row_of.get(bytes(name).hex())
            if row is not None:
                features[row], known[row] = value, True
    if unread:
        warn(f"{unread[0]}; the features in {len(unread):,} such files are computed again")
    return known


def _parse_shard(data: bytes, sha256: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint8 [M, 32], features float32 [M, width]) of a file's content; raises some error where it is damaged."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("the content does not match its name")
    tensors = load(data)
    names, values = tensors["hashes"], tensors["features"]
    if (names.dtype, names.shape[1:]) != (np.uint8, (32,)):
        raise ValueError("unexpected hashes")
    if (values.dtype, values.shape) != (np.float32, (len(names), width)):
        raise ValueError("unexpected features")
    return names, values


def _aligned_zeros(rows: int, width: int) -> np.ndarray:
    """float32 [rows, width] at an address that XLA on CPU accepts without copying the array.

    NumPy starts a large array 16 bytes after such an address, and every feature would be in memory twice.
    """
    room = np.zeros(rows * width + XLA_ALIGNMENT // 4, np.float32)
    start = -room.ctypes.data % XLA_ALIGNMENT // 4
    return room[start : start + rows * width].reshape(rows, width)
