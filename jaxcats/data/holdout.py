"""Holding out a validation split by content, written down so that it is the same next time."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxcats.data.files import warn
from jaxcats.errors import UserError
from jaxcats.storage.atomic import write_json


def default_manifest(cache_dir: Path, root: Path, fraction: float, seed: int) -> Path:
    """Where the split of a folder is kept when the user names no place."""
    key = hashlib.sha256(os.fsencode(root) + f"|{fraction}|{seed}".encode()).hexdigest()[:16]
    return cache_dir / "splits" / f"{root.name or 'root'}-{key}.json"


def hold_out(
    contents: Mapping[str, Sequence[str]], *, fraction: float, seed: int, manifest: Path, given: bool
) -> frozenset[str]:
    """The content hashes that belong to validation.

    Within each class the distinct contents are ranked by a hash of (seed, content), and the first `fraction` of them
    held out, at least one and never all. Equal contents share a side, in different classes too. Contents that the
    manifest knows keep their side, so pictures that arrive later only fill up what is short.

    Args:
        contents: content hashes of each class.
        manifest: JSON file read first and written when something was added.
        given: the user chose the manifest's place: problems with it are errors, not warnings.
    """
    sides = _read(manifest, fraction, seed, given)
    before = len(sides)
    for name, hashes in contents.items():
        distinct = set(hashes)
        if len(distinct) < 2:
            raise UserError(
                f"class {name}: {len(hashes)} pictures, but only one distinct; "
                "valid_fraction needs two at least, one for each side"
            )
        fresh = sorted(distinct - sides.keys(), key=lambda content: _rank(seed, content))
        target = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
        short = max(0, target - sum(sides.get(content) == "valid" for content in distinct))
        sides |= {content: "valid" if place < short else "train" for place, content in enumerate(fresh)}
        for side in ("train", "valid"):
            if all(sides[content] != side for content in distinct):
                raise UserError(
                    f"class {name}: the split written in {manifest} leaves it no {side} pictures; "
                    "remove that file to split afresh, or add pictures"
                )
    if len(sides) > before:
        _write(
            manifest, {"version": 1, "fraction": fraction, "seed": seed, "sides": dict(sorted(sides.items()))}, given
        )
    return frozenset(content for content, side in sides.items() if side == "valid")


def _rank(seed: int, content: str) -> str:
    return hashlib.sha256(f"{seed}:{content}".encode()).hexdigest()


def _read(manifest: Path, fraction: float, seed: int, given: bool) -> dict[str, str]:
    try:
        saved = json.loads(manifest.read_text(encoding="utf-8"))
        made_with, sides = (saved["fraction"], saved["seed"]), dict(saved["sides"])
        if not set(sides.values()) <= {"train", "valid"}:
            raise ValueError("a side is neither train nor valid")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = f"the split manifest {manifest} can't be read ({type(error).__name__})"
        if given:
            raise UserError(f"{message}; restore it, or remove it to split afresh") from error
        warn(f"{message}: the folder is split afresh")
        return {}
    if made_with != (fraction, seed):
        raise UserError(
            f"the split manifest {manifest} was made with valid_fraction {made_with[0]} and seed {made_with[1]}, not "
            f"{fraction} and {seed}; give those, or another manifest"
        )
    return sides


def _write(manifest: Path, value: dict, given: bool) -> None:
    try:
        write_json(manifest, value)
    except OSError as error:
        message = f"the split manifest {manifest} can't be written ({error.strerror})"
        if given:
            raise UserError(f"{message}; give a place that can be written") from error
        warn(f"{message}: the split may change when pictures are added")
