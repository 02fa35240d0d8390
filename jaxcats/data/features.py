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


def _read(folder: Path, rows: Mapping[str, int], features: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Fills the rows of `features` that the cache has; returns which these are, bool [N], and the files that are damaged."""
    known, damaged = np.zeros(len(features), bool), []
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != path.stem:
                raise ValueError("content does not match its name")
            tensors = load(data)
            names, values = tensors["hashes"], tensors["features"]
            if values.shape != (len(names), features.shape[1]) or names.shape[1:] != (32,):
                raise ValueError("unexpected shapes")
        except Exception:  # whatever is wrong with a cache file, the answer is to compute it again
            damaged.append(str(path))
            with contextlib.suppress(OSError):  # a shared cache may be read-only
                path.unlink()
            continue
        for name, value in zip(names, values, strict=True):
            row = rows.get(bytes(name).hex())
            if row is not None:
                features[row], known[row] = value, True
    return known, damaged


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
    features = np.zeros((len(hashes), width), np.float32)
    rows: dict[str, int] = {}
    first = np.array([rows.setdefault(h, row) for row, h in enumerate(hashes)], int)  # equal pictures are computed once
    known, damaged = _read(folder, rows, features)
    lacking = agree(~known[first])
    missing = np.flatnonzero(lacking & (first == np.arange(len(hashes))))
    if len(missing):
        unsaved: list[int] = []

        def keep(rows: list[int]) -> None:
            try:
                _write(folder, [hashes[r] for r in rows], features[rows])
                write_json(folder / "facts.json", dict(facts))
            except OSError as e:
                warn(f"features are not kept: {folder} can't be written ({e.strerror})")

        for computed, values in compute(missing):
            features[computed] = values
            unsaved += [int(r) for r in computed]
            if len(unsaved) >= SHARD_ROWS:
                keep(unsaved)
                unsaved = []
        if unsaved:
            keep(unsaved)
    copies = np.flatnonzero(first != np.arange(len(hashes)))
    features[copies] = features[first[copies]]
    return Cached(features, len(hashes) - int(lacking.sum()), len(missing), tuple(damaged))
