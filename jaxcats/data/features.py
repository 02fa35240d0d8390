"""Features of the frozen backbone, computed once and kept in a cache that is keyed by content."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from jaxcats.data.files import warn
from jaxcats.storage.atomic import sweep, write_bytes, write_json

SHARD_ROWS = 4096  # what a killed process can lose


@dataclass(frozen=True)
class Cached:
    """Features and where they came from.

    Attributes:
        features: float32 [N, F].
        reused: rows answered from the cache.
        computed: pictures that went through the backbone.
        damaged: cache files that were unreadable and are computed again.
    """

    features: np.ndarray
    reused: int
    computed: int
    damaged: tuple[str, ...]


def _write(folder: Path, hashes: Sequence[str], features: np.ndarray) -> None:
    rows = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, 32)
    data = save({"hashes": np.ascontiguousarray(rows), "features": np.ascontiguousarray(features)})
    # The name is the content's hash: a file cut short or altered later no longer matches it.
    write_bytes(folder / f"{hashlib.sha256(data).hexdigest()}.safetensors", data)


def _read(folder: Path, wanted: set[str], width: int) -> tuple[dict[str, np.ndarray], list[str]]:
    found: dict[str, np.ndarray] = {}
    damaged = []
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != path.stem:
                raise ValueError("content does not match its name")
            tensors = load(data)
            rows, features = tensors["hashes"], tensors["features"]
            if features.shape != (len(rows), width) or rows.shape[1:] != (32,):
                raise ValueError("unexpected shapes")
        except Exception:  # whatever is wrong with a cache file, the answer is to compute it again
            damaged.append(str(path))
            with contextlib.suppress(OSError):  # a shared cache may be read-only
                path.unlink()
            continue
        names = (bytes(r).hex() for r in rows)
        found |= {h: f for h, f in zip(names, features, strict=True) if h in wanted}
    return found, damaged


def cached_features(
    hashes: Sequence[str],
    *,
    facts: Mapping[str, Any],
    width: int,
    compute: Callable[[np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]],
    cache_dir: Path,
    agree: Callable[[np.ndarray], np.ndarray] = lambda lacking: lacking,
) -> Cached:
    """Features of pictures, from the cache where their content is known.

    Args:
        hashes: SHA-256 (hex) of each picture's content, N of them.
        facts: everything else the features depend on; their JSON names the cache folder.
        width: F.
        compute: rows to compute, int [M] -> iterator of (rows [m], features float32 [m, F]).
        agree: from which rows are not cached here (bool [N]) to which are to be computed, the same in every process
            that computes with this one.
        cache_dir: parent of the cache folders. When it can't be written, the features are used and not kept.
    """
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir / "features" / key
    sweep(folder)
    known, damaged = _read(folder, set(hashes), width)
    features = np.zeros((len(hashes), width), np.float32)
    for row, h in enumerate(hashes):
        if h in known:
            features[row] = known[h]
    lacking = agree(np.array([h not in known for h in hashes], bool))
    # Equal pictures are computed once.
    first = {h: row for row, h in reversed(list(enumerate(hashes))) if lacking[row]}
    missing = np.asarray(sorted(first.values()), np.int64)
    if len(missing):
        unsaved: list[int] = []

        def keep(rows: list[int]) -> None:
            try:
                _write(folder, [hashes[r] for r in rows], features[rows])
                write_json(folder / "facts.json", dict(facts))
            except OSError as e:
                warn(f"features are not kept: {folder} can't be written ({e.strerror})")

        for rows, values in compute(missing):
            features[rows] = values
            unsaved += [int(r) for r in rows]
            if len(unsaved) >= SHARD_ROWS:
                keep(unsaved)
                unsaved = []
        if unsaved:
            keep(unsaved)
        for row, h in enumerate(hashes):
            if h in first:
                features[row] = features[first[h]]
    return Cached(features, len(hashes) - int(lacking.sum()), len(missing), tuple(damaged))
