"""Thousands of altered artefacts: each is used or refused; nothing crashes, hangs, or takes memory.

Programs are altered without their hash. Whoever puts the hash right can write any program at all, and an artefact is
only as trusted as whoever gave it.
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
from artefacts import CLASSES, PREPROCESS, export, replace

from jaxcats.common.errors import UserError
from jaxcats.export import artifact


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("original") / "model")


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bits or bytes altered, a part cut out, doubled or moved, or the end cut off."""
    out = bytearray(content)
    at, n = rng.randrange(len(out)), rng.randint(1, 64)
    match rng.randrange(5):
        case 0:
            for _ in range(rng.randint(1, 8)):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 1:
            out[at : at + n] = rng.randbytes(n)
        case 2:
            del out[at : at + n]
        case 3:
            out[at:at] = out[at : at + n]
        case 4:
            del out[at:]
    return bytes(out)


VALUES = [
    None,
    True,
    0,
    -1,
    1 << 70,
    0.5,
    -1e308,
    1e-320,
    "",
    "x" * 5000,
    "../../etc/passwd",
    "\0",
    [],
    [[]],
    {},
    {"a": 1},
]


def mutate_tree(tree, rng: random.Random):
    """One value somewhere in a JSON tree replaced, removed or renamed."""
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    node, key = rng.choice(places)
    if rng.random() < 0.7:
        node[key] = rng.choice(VALUES)
    elif isinstance(node, dict) and rng.random() < 0.5:
        node[rng.choice(["x", "../y", "format"])] = node.pop(key)
    else:
        del node[key]
    return tree


def mutated(original: Path, folder: Path, rng: random.Random, kinds: str) -> None:
    """Fills `folder` with an artefact that has one mutation, of one of `kinds`."""
    files = {p.name: p.read_bytes() for p in original.iterdir()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    kind = rng.choice(kinds)
    if kind == "j":  # JSON as text
        (folder / artifact.JSON).write_bytes(mutate_bytes(files[artifact.JSON], rng))
    elif kind == "v":  # JSON's values
        (folder / artifact.JSON).write_text(json.dumps(mutate_tree(json.loads(files[artifact.JSON]), rng)))
    elif kind in "tp":  # a file alone
        name = artifact.TENSORS if kind == "t" else artifact.PROGRAM
        (folder / name).write_bytes(mutate_bytes(files[name], rng))
    elif kind == "s":  # the set of files: one missing, empty, swapped with another, or in a folder of its own
        name, other = rng.sample(sorted(files), 2)
        file = folder / name
        file.unlink()
        match rng.randrange(4):
            case 1:
                file.touch()
            case 2:
                file.write_bytes(files[other])
            case 3:
                file.mkdir()
    else:  # the tensors, with their size and hash put right in model.json; half the time the header
        content = files[artifact.TENSORS]
        head = 8 + struct.unpack("<Q", content[:8])[0] if rng.random() < 0.5 else len(content)
        replace(folder, artifact.TENSORS, mutate_bytes(content[:head], rng) + content[head:])


def use(folder: Path) -> str:
    """'used' or 'refused'; anything but an Artifact that makes sense or a UserError of one line is a failure."""
    try:
        verified = artifact.read(folder)
    except UserError as error:
        message = str(error)
        assert str(folder) in message
        assert "\n" not in message
        assert len(message) < 1000
        return "refused"
    assert all(np.isfinite(tensor).all() for tensor in verified.tensors.values())
    assert len(verified.classes) == len(CLASSES)
    assert verified.preprocess.size == PREPROCESS.size
    return "used"


def fuzz(original: Path, folder: Path, *, n: int, kinds: str, first: int = 0) -> dict[str, int]:
    """How many of n mutated artefacts were used and refused; each within seconds and little memory."""
    counts = {"used": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first, first + n):
        mutated(original, folder, random.Random(seed), kinds)
        signal.alarm(60)  # a hang ends the tests, with the traceback of the place
        try:
            counts[use(folder)] += 1
        except BaseException as error:
            raise AssertionError(f"mutation {seed} of {kinds}") from error
        finally:
            signal.alarm(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    return counts


def test_mutated_artefacts_are_used_or_refused_and_nothing_else(original, tmp_path):
    counts = fuzz(original, tmp_path / "mutated", n=300, kinds="jvvvthhps")
    assert counts["refused"] > 150
    assert counts["used"] > 5  # some mutations change nothing that matters: the training's seed, say


@pytest.mark.slow
def test_five_thousand_mutated_artefacts(original, tmp_path):
    n = int(os.environ.get("JAXCATS_MUTATIONS", "5000"))
    counts = fuzz(original, tmp_path / "mutated", n=n, kinds="jvvvthhps", first=1000)
    print(counts)
    assert min(counts.values()) > n / 100
