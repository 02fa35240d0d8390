"""Everything that reads bytes from outside, given damaged ones: an answer that makes sense or one line, never anything else.

Hypothesis chooses the damage, JAXCATS_FUZZ_SECONDS (60) long for each reader. Artefacts have a campaign of their own:
tests/storage/test_artifact_mutations.py.
"""

import contextlib
import dataclasses
import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from artefacts import CLASSES, export
from folders import write_pictures
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from jaxcats import command
from jaxcats.cli import from_file
from jaxcats.config import Config, to_yaml
from jaxcats.data.features import cached_features
from jaxcats.data.index import scan
from jaxcats.data.table import read_table
from jaxcats.errors import UserError
from jaxcats.models.torch_file import load_torch_file
from jaxcats.storage import artifact

SECONDS = float(os.environ.get("JAXCATS_FUZZ_SECONDS", "60"))
GOLDEN = Path(__file__).parent / "golden"


def damages(good: bytes, *, words: tuple[bytes, ...]):
    """Bytes made of good ones: some altered, cut out, put in or repeated; or any bytes at all."""
    place = st.integers(0, len(good))
    piece = st.one_of(st.binary(max_size=8), st.sampled_from(words))
    edit = st.tuples(st.sampled_from(["alter", "insert", "cut", "repeat", "flip"]), place, place, piece)

    def apply(edits: list[tuple[str, int, int, bytes]]) -> bytes:
        data = good
        for kind, a, b, word in edits:
            if kind == "alter":
                data = data[:a] + word + data[a + len(word) :]
            elif kind == "insert":
                data = data[:a] + word + data[a:]
            elif kind == "cut":
                data = data[: min(a, b)] + data[max(a, b) :]
            elif kind == "repeat":
                data = data[: max(a, b)] + data[min(a, b) :]
            elif a < len(data):
                data = data[:a] + bytes([data[a] ^ 1 << b % 8]) + data[a + 1 :]
        return data

    return st.one_of(st.lists(edit, min_size=1, max_size=4).map(apply), st.binary(max_size=400))


def fuzz(good: bytes, words: tuple[bytes, ...], look: Callable[[bytes], str]) -> dict[str, int]:
    """How often each of `look`'s answers came, over the seconds asked for."""
    counts: dict[str, int] = {}
    phases = [Phase.explicit, Phase.generate, Phase.shrink]
    how = settings(
        max_examples=300, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck)
    )
    end, turn = time.monotonic() + SECONDS, 0

    def check(data: bytes) -> None:
        said = look(data)
        counts[said] = counts.get(said, 0) + 1

    while time.monotonic() < end:
        seed(turn)(how(given(damages(good, words=words))(check)))()
        turn += 1
    print(f"{sum(counts.values()):,} inputs: {counts}")
    return counts


def refused(error: UserError) -> str:
    """What the command prints is one line, and no flood."""
    said = command.one_line(error)
    assert said.isprintable(), said
    assert 20 < len(said) < 2000, said
    return "refused"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensors_zip", "tensors_legacy"])
def test_torch_files(tmp_path, name):
    file = tmp_path / "w.pth"

    def look(data: bytes) -> str:
        file.write_bytes(data)
        try:
            found = load_torch_file(file)
        except UserError as e:
            return refused(e)
        assert all(isinstance(t, np.ndarray) for t in found.values())
        assert sum(t.nbytes for t in found.values()) < 10_000_000
        return "read"

    counts = fuzz(
        (GOLDEN / f"{name}.pth").read_bytes(), (b"ctorch\n", b"PK\x03\x04", b"\x80\x02", b"R.", b"\xff" * 8), look
    )
    assert counts["refused"] > 10


@pytest.mark.slow
def test_descriptions_of_artefacts(tmp_path):
    folder = export(tmp_path / "model")
    description = folder / artifact.JSON

    def look(data: bytes) -> str:
        description.write_bytes(data)
        try:
            found = artifact.read(folder)
        except UserError as e:
            return refused(e)
        assert len(set(found.classes)) == len(CLASSES)
        return "read"

    counts = fuzz(description.read_bytes(), (b"null", b"-1", b"1e999", b'"../x"', b"[]", b"{}"), look)
    assert counts["refused"] > 10


@pytest.mark.slow
def test_feature_caches(tmp_path):
    hashes = [f"{i:064x}" for i in range(6)]
    truth = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)

    def ask():
        return cached_features(
            hashes, facts={"a": 1}, width=5, compute=lambda rows: iter([(rows, truth[rows])]), cache_dir=tmp_path
        )

    ask()
    (shard,) = tmp_path.glob("features/*/*.safetensors")
    good = shard.read_bytes()

    def look(data: bytes) -> str:
        for other in shard.parent.glob("*.safetensors"):
            other.unlink()
        shard.write_bytes(data)
        found = ask()
        assert (found.features == truth).all()
        return "reused" if found.reused == 6 else "computed"

    counts = fuzz(good, (b'"F32"', b"[6,5]", b"\xff" * 8, b"\x00" * 8), look)
    assert counts["computed"] > 10


@pytest.mark.slow
def test_index_caches(tmp_path, own_cache):
    root = write_pictures(tmp_path / "photos", train=8, valid=4)
    whole = scan(root, progress=False)
    (store,) = (own_cache / "index").iterdir()
    good = store.read_bytes()

    def look(data: bytes) -> str:
        store.write_bytes(data)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            found = scan(root, progress=False)
        assert said.getvalue().count("\n") <= 1
        for name, split in whole.splits.items():
            assert found.splits[name].paths == split.paths
            assert found.splits[name].hashes == split.hashes
            assert (found.splits[name].labels == split.labels).all()
        return "believed" if found.reused else "looked again"

    counts = fuzz(good, (b"null", b"1", b'"bad"', b"[]"), look)
    assert counts["looked again"] > 10


@pytest.mark.slow
def test_split_manifests(tmp_path, own_cache):
    root = tmp_path / "photos"
    write_pictures(tmp_path / "all", train=16, valid=4)
    (tmp_path / "all" / "train").rename(root)
    manifest = tmp_path / "split.json"

    def ask():
        return scan(root, valid_fraction=0.25, manifest=manifest, progress=False)

    ask()
    good = manifest.read_bytes()
    every = sorted(path for split in ask().splits.values() for path in split.paths)

    def look(data: bytes) -> str:
        manifest.write_bytes(data)
        try:
            found = ask()
        except UserError as e:
            return refused(e)
        assert sorted(path for split in found.splits.values() for path in split.paths) == every
        return "read"

    counts = fuzz(good, (b'"train"', b'"valid"', b'"test"', b"null", b"0.25", b"[]"), look)
    assert counts["refused"] > 10


@pytest.mark.slow
def test_configurations(tmp_path):
    file = tmp_path / "c.yaml"

    def look(data: bytes) -> str:
        file.write_bytes(data)
        try:
            found = from_file(file)
        except UserError as e:
            return refused(e)
        file.write_text(to_yaml(found))
        assert from_file(file) == found  # what a run folder keeps reads back to the same
        return "read"

    words = (
        b"null",
        b"[1, 2]",
        b"{a: b}",
        b"!!python/object:os.system",
        b"&a ",
        b"*a",
        b": ",
        b"- ",
        b"\t",
        b"1e400",
        b".nan",
    )
    good = to_yaml(dataclasses.replace(Config(), seed=3)).encode()
    counts = fuzz(good, words, look)
    assert min(counts["refused"], counts["read"]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_label_tables(tmp_path, encoding):
    write_pictures(tmp_path, train=2, valid=2)

    def look(data: bytes) -> str:
        (tmp_path / "labels.csv").write_bytes(data)
        try:
            rows, _ = read_table(tmp_path, "labels.csv", {})
        except UserError as e:
            return refused(e)
        assert all(row.path and row.label for row in rows)
        return "read"

    good = 'path,label,split\n"cat.0.jpg",cat,train\r\ndog;0.jpg,"dog ""x""\n",valid\n'.encode(encoding)
    counts = fuzz(good, (b'"', b",", b";", b"\t", b"\r", b"\n", b"\x00", b"path", b"../"), look)
    assert min(counts["refused"], counts["read"]) > 10
