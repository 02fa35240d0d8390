"""Features of the frozen backbone, computed once and kept in a cache that is keyed by content."""

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import jax
import numpy as np
import PIL
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
from jaxcats.models import registry
from jaxcats.train.drivers import _unmask, decoding, image_batches
from jaxcats.train.experiment import Experiment

SHARD_ROWS = 4096
SAVE_SECONDS = 60.0  # what a killed process can lose
XLA_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Cached:
    """Features and where they came from.

    Attributes:
        features: float32 [N, F], read-only.
        reused: rows answered from the cache.
        computed: images that went through the backbone.
        damaged: cache files that were unreadable and are computed again.
    """

    features: np.ndarray
    reused: int
    computed: int
    damaged: tuple[str, ...]


def _write(folder: Path, hashes: Sequence[str], features: np.ndarray) -> Path:
    rows = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, 32)
    data = save({"hashes": np.ascontiguousarray(rows), "features": np.ascontiguousarray(features)})
    # The name is the content's hash: a file cut short or altered later no longer matches it.
    path = folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
    write_bytes(path, data)
    return path


class _Shards:
    """Writes rows of features as they come: whole shards, and every minute the one begun, which replaces itself.

    So every process that computes these rows leaves the same files, however long it took.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], hashes: Sequence[str], features: np.ndarray):
        self.folder, self.facts, self.hashes, self.features = folder, facts, hashes, features
        self._rows: list[int] = []  # of the shard begun
        self._begun: Path | None = None  # where it is
        self._due = monotonic() + SAVE_SECONDS
        self._warned = False

    def add(self, rows: np.ndarray) -> None:
        """These rows of `features` are there."""
        self._rows += rows.tolist()
        if len(self._rows) >= SHARD_ROWS:
            self.save()  # interrupted from here on, it is saved once more, under the same name
            self._rows, self._begun = [], None
        elif monotonic() > self._due:
            self.save()

    def save(self) -> None:
        """Writes the shard begun; where that fails, one warning in all."""
        if not self._rows:
            return
        self._due = monotonic() + SAVE_SECONDS
        try:
            path = _write(self.folder, [self.hashes[r] for r in self._rows], self.features[self._rows])
            before, self._begun = self._begun, path
            if before not in (None, path):
                before.unlink(missing_ok=True)
            write_json(self.folder / "facts.json", dict(self.facts))
        except OSError as e:
            if not self._warned:
                warn(f"features are not kept: {self.folder} can't be written ({e.strerror})")
            self._warned = True


def _tensors(path: Path, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint8 [M, 32], features float32 [M, width]) of a file; ValueError where it is damaged."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != path.stem:
        raise ValueError("content does not match its name")
    try:
        tensors = load(data)
        names, values = tensors["hashes"], tensors["features"]
    except MemoryError:
        raise
    except Exception as e:  # what the library raises where the content was never a shard
        raise ValueError("not a shard") from e
    if (names.dtype, values.dtype) != (np.uint8, np.float32) or names.ndim != 2:
        raise ValueError("unexpected types")
    if names.shape[1] != 32 or values.shape != (len(names), width):
        raise ValueError("unexpected shapes")
    return names, values


def _read(folder: Path, rows: Mapping[str, int], features: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Fills the rows of `features` that the cache has; returns which these are, bool [N], and the files that are damaged.

    Those are removed. A file that can't be read (no permission, a disk's error) may be whole, and is only passed over.
    """
    known, damaged, unread = np.zeros(len(features), bool), [], dict[str, str]()
    for path in sorted(folder.glob("*.safetensors")) if os.path.isdir(folder) else []:
        try:
            names, values = _tensors(path, features.shape[1])
        except FileNotFoundError:  # another process has replaced it meanwhile
            continue
        except OSError as e:
            unread[str(path)] = str(e.strerror)
            continue
        except ValueError:
            damaged.append(str(path))
            with contextlib.suppress(OSError):  # a shared cache may be read-only
                path.unlink()
            continue
        for name, value in zip(names, values, strict=True):
            row = rows.get(bytes(name).hex())
            if row is not None:
                features[row], known[row] = value, True
    if unread:
        path, reason = next(iter(unread.items()))
        more = f", and {len(unread) - 1:,} more files" if len(unread) > 1 else ""
        warn(f"{path}: can't be read ({reason}){more}: these features are computed again")
    return known, damaged


def _zeros(rows: int, width: int) -> np.ndarray:
    """float32 [rows, width] that starts where XLA wants its arrays to: the CPU then trains on it where it lies.

    NumPy starts a large array 16 bytes after such a place, and XLA would copy it: every feature twice in memory.
    """
    room = np.zeros(rows * width + XLA_ALIGNMENT // 4, np.float32)
    start = -room.ctypes.data % XLA_ALIGNMENT // 4
    return room[start : start + rows * width].reshape(rows, width)


def cached_features(
    hashes: Sequence[str],
    *,
    facts: Mapping[str, Any],
    width: int,
    compute: Callable[[np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]],
    cache_dir: Path,
    agree: Callable[[np.ndarray], np.ndarray] = lambda lacking: lacking,
) -> Cached:
    """Features of images, from the cache where their content is known.

    Args:
        hashes: SHA-256 (hex) of each image's content, N of them.
        facts: everything else the features depend on; their JSON names the cache folder.
        width: F.
        compute: rows to compute, int [M] -> iterator of (rows [m], features float32 [m, F]).
        agree: from which rows are not cached here (bool [N]) to which are to be computed, the same in every process
            that computes with this one.
        cache_dir: parent of the cache folders. When it can't be written, the features are used and not kept.
    """
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir / "features" / key
    remove_stale_temporaries(folder)
    features = _zeros(len(hashes), width)
    rows: dict[str, int] = {}
    first = np.array([rows.setdefault(h, row) for row, h in enumerate(hashes)], int)  # equal images are computed once
    known, damaged = _read(folder, rows, features)
    lacking = agree(~known[first])
    missing = np.flatnonzero(lacking & (first == np.arange(len(hashes))))
    if len(missing):
        shards = _Shards(folder, facts, hashes, features)
        try:
            for computed, values in compute(missing):
                features[computed] = values
                shards.add(computed)
        finally:  # being asked to end (Ctrl-C, SIGTERM) loses nothing that is computed
            shards.save()
    copies = np.flatnonzero(first != np.arange(len(hashes)))
    features[copies] = features[first[copies]]
    features.flags.writeable = False  # a device may share it from here on
    return Cached(features, len(hashes) - int(lacking.sum()), len(missing), tuple(damaged))


def feature_program(model: models.Model, preprocess: Preprocess) -> Callable:
    """Jitted `(params, batch_stats, images uint8 [N,H,W,3]) -> features float32 [N,F]`, the backbone frozen.

    On CPU the batch goes through the network a few images at a time, inside one program: their activations stay in the
    cache and reuse the same memory, where those of a whole batch are mapped and faulted in anew at every call.
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
) -> Cached:
    """Pooled features [n, F] of a split's images, from the cache where their content and the backbone are known."""
    run = feature_program(model, preprocess)
    only = {"backbone": params["backbone"], "head": {}}, {"backbone": batch_stats["backbone"], "head": {}}

    def compute(rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        pending = None  # read one batch late, so that the device and the decoder overlap
        with progress_bar(total=len(rows), desc="features") as bar:
            for batch in image_batches(split, preprocess=preprocess, batch_size=batch_size, workers=workers, rows=rows):
                out = run(*only, mesh.place_images(batch["image"], len(batch["mask"])))
                if pending:
                    yield _unmask(*pending)
                pending = batch, out
                bar.update(int(batch["mask"].sum()))
            if pending:
                yield _unmask(*pending)

    weights = tree_hash({"params": only[0], "batch_stats": only[1]})
    shape = jax.ShapeDtypeStruct((mesh.round_up_to_devices(batch_size), preprocess.size, preprocess.size, 3), np.uint8)
    facts = {
        "backbone": model.name,
        "head": model.head,
        "dtype": model.dtype,
        "weights": weights,
        "preprocess": preprocess.to_dict(),
        "transform": TRANSFORM_VERSION,
        "pillow": PIL.__version__,
        "batch_size": batch_size,  # changes the last bits
        "program": source_hash(registry.get(model.name)) or _lowered(run, *jax.eval_shape(lambda: only), shape),
        "compiler": compiler_options(jax.default_backend()),
        "platform": jax.default_backend(),
    }
    if mesh.has_many_devices():
        facts["devices"] = jax.device_count()
    got = cached_features(
        split.hashes,
        facts=facts,
        width=model.feature_size,
        compute=compute,
        cache_dir=cache_dir,
        agree=distributed.any_process,
    )
    for path in got.damaged:
        print(f"{path}: damaged, removed and computed again.", file=sys.stderr)
    return got


@functools.cache
def source_hash(backbone: models.Backbone) -> str | None:
    """Hash of the code that makes a backbone's features; None for one from outside this package, or without the code.

    It stands for the program in the cache's key: lowering the network to hash that takes a second of every run.
    """
    build = backbone.build
    if not getattr(build, "func", build).__module__.startswith(f"{models.__name__}."):
        return None
    try:
        own = inspect.getsource(feature_program) + inspect.getsource(normalise)
        files = sorted(Path(models.__file__).parent.glob("*.py"))
        code = [own, *(path.read_text(encoding="utf-8") for path in files)]
    except OSError:
        return None
    code += [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def _lowered(run: Callable, *shapes: Any) -> str:
    """Hash of a program's text. Of shapes alone: arrays that a checkpoint gave back say where they lie."""
    return hashlib.sha256(run.lower(*shapes).as_text().encode()).hexdigest()


def _join(parts: list[Split]) -> Split:
    return Split(
        root=parts[0].root,
        paths=sum((s.paths for s in parts), ()),
        labels=np.concatenate([s.labels for s in parts]),
        hashes=sum((s.hashes for s in parts), ()),
    )


def precompute(setup: Experiment, params: Any, batch_stats: Any) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Features of train and valid by split name, and how many were {"reused", "computed"}."""
    parts = list(setup.index.splits.values())
    ends = np.cumsum([len(s) for s in parts])
    got = backbone_features(
        setup.model, _join(parts), params=params, batch_stats=batch_stats, cache_dir=setup.cache, **decoding(setup)
    )
    by_split = dict(zip(setup.index.splits, np.split(got.features, ends[:-1]), strict=True))
    return by_split, {"reused": got.reused, "computed": got.computed}
