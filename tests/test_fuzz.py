"""Gives damaged bytes to everything that reads bytes from outside: it must give a sensible result or a one-line error.

Hypothesis chooses the damage for JAXCATS_FUZZ_SECONDS (60) per reader. tests/export/test_artifact_mutations.py does the
same with artefacts.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from artefacts import CLASSES, export
from folders import write_images
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from jaxcats.common import cli
from jaxcats.common.cli import from_file
from jaxcats.common.config import Config, to_yaml
from jaxcats.common.errors import UserError
from jaxcats.data.index import scan
from jaxcats.data.labels import read_table
from jaxcats.export import artifact
from jaxcats.models.torch_file import load_torch_file
from jaxcats.train.features import cached_features

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


def fuzz(good: bytes, words: tuple[bytes, ...], try_reading: Callable[[bytes], str]) -> dict[str, int]:
    """Tries damaged bytes for SECONDS and counts the results of `try_reading`."""
    counts: dict[str, int] = {}
    phases = [Phase.explicit, Phase.generate, Phase.shrink]
    options = settings(
        max_examples=300, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck)
    )
    end, turn = time.monotonic() + SECONDS, 0

    def check(data: bytes) -> None:
        result = try_reading(data)
        counts[result] = counts.get(result, 0) + 1

    while time.monotonic() < end:
        seed(turn)(options(given(damages(good, words=words))(check)))()
        turn += 1
    print(f"{sum(counts.values()):,} inputs: {counts}")
    return counts


def refused(error: UserError) -> str:
    """Checks that the command would print one line of a sensible length."""
    message = cli.one_line(error)
    assert message.isprintable(), message
    assert 20 < len(message) < 2000, message
    return "refused"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*invalid.*escape")  # pickletools decodes opcodes that are then refused
@pytest.mark.parametrize("name", ["tensors_zip", "tensors_legacy"])
def test_torch_files(tmp_path, name):
    file = tmp_path / "w.pth"

    def try_reading(data: bytes) -> str:
        file.write_bytes(data)
        try:
            loaded = load_torch_file(file)
        except UserError as e:
            return refused(e)
        assert all(isinstance(t, np.ndarray) for t in loaded.values())
        assert sum(t.nbytes for t in loaded.values()) < 10_000_000
        return "read"

    counts = fuzz(
        (GOLDEN / f"{name}.pth").read_bytes(),
        (b"ctorch\n", b"PK\x03\x04", b"\x80\x02", b"R.", b"\xff" * 8),
        try_reading,
    )
    assert counts["refused"] > 10


@pytest.mark.slow
def test_descriptions_of_artefacts(tmp_path):
    folder = export(tmp_path / "model")
    description = folder / artifact.JSON

    def try_reading(data: bytes) -> str:
        description.write_bytes(data)
        try:
            loaded = artifact.read(folder)
        except UserError as e:
            return refused(e)
        assert len(set(loaded.classes)) == len(CLASSES)
        return "read"

    counts = fuzz(description.read_bytes(), (b"null", b"-1", b"1e999", b'"../x"', b"[]", b"{}"), try_reading)
    assert counts["refused"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("forged", [False, True])
def test_feature_caches(tmp_path, forged):
    """`forged`: damaged ones under the name that says they are whole, which only their types and shapes can belie.

    Their values are then believed; the shapes must be right, and nothing raised.
    """
    hashes = [f"{i:064x}" for i in range(6)]
    truth = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)

    def ask():
        return cached_features(
            hashes, facts={"a": 1}, width=5, compute=lambda rows: iter([(rows, truth[rows])]), cache_dir=tmp_path
        )

    ask()
    (shard,) = tmp_path.glob("features/*/*.safetensors")
    good = shard.read_bytes()

    def try_reading(data: bytes) -> str:
        for other in shard.parent.glob("*.safetensors"):
            other.unlink()
        name = hashlib.sha256(data).hexdigest() if forged else shard.stem
        shard.with_name(f"{name}.safetensors").write_bytes(data)
        loaded = ask()
        assert loaded.features.shape == truth.shape
        assert loaded.features.dtype == np.float32
        assert (loaded.features == truth).all() or (forged and loaded.reused)
        assert loaded.reused + loaded.computed == 6
        return "whole" if data == good else f"{loaded.reused} reused"

    words = (b'"F32"', b'"F64"', b'"BF16"', b'"U8"', b"[6,5]", b"[5,6]", b"[]", b"-1", b"\xff" * 8, b"\x00" * 8)
    counts = fuzz(good, words, try_reading)
    assert counts["0 reused"] > 10
    assert ("6 reused" in counts) == forged


@pytest.mark.slow
def test_index_caches(tmp_path, own_cache):
    root = write_images(tmp_path / "photos", train=8, valid=4)
    whole = scan(root, progress=False)
    (store,) = (own_cache / "index").iterdir()
    good = store.read_bytes()

    def try_reading(data: bytes) -> str:
        store.write_bytes(data)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            loaded = scan(root, progress=False)
        assert stderr.getvalue().count("\n") <= 1
        assert not loaded.bad
        for name, split in whole.splits.items():
            assert (loaded.splits[name].paths, loaded.splits[name].hashes) == (split.paths, split.hashes)
            np.testing.assert_array_equal(loaded.splits[name].labels, split.labels)
        return "whole" if data == good else "looked again"

    words = (
        b"null",
        b"1",
        b'"bad"',
        b"[]",
        b"true",
        b"-1.5",
        b"1e999",
        b'"\\ud800"',
        b'"\\n"',
        b"[" * 9999,
        b"9" * 5000,
    )
    assert fuzz(good, words, try_reading)["looked again"] > 10


@pytest.mark.slow
def test_split_manifests(tmp_path, own_cache):
    root = tmp_path / "photos"
    write_images(tmp_path / "all", train=16, valid=4)
    (tmp_path / "all" / "train").rename(root)
    manifest = tmp_path / "split.json"

    def ask():
        return scan(root, valid_fraction=0.25, manifest=manifest, progress=False)

    ask()
    good = manifest.read_bytes()
    every = sorted(path for split in ask().splits.values() for path in split.paths)

    def try_reading(data: bytes) -> str:
        manifest.write_bytes(data)
        try:
            loaded = ask()
        except UserError as e:
            return refused(e)
        assert sorted(path for split in loaded.splits.values() for path in split.paths) == every
        return "read"

    counts = fuzz(good, (b'"train"', b'"valid"', b'"test"', b"null", b"0.25", b"[]"), try_reading)
    assert counts["refused"] > 10


@pytest.mark.slow
def test_configurations(tmp_path):
    file = tmp_path / "c.yaml"

    def try_reading(data: bytes) -> str:
        file.write_bytes(data)
        try:
            loaded = from_file(file)
        except UserError as e:
            return refused(e)
        file.write_text(to_yaml(loaded))
        assert from_file(file) == loaded  # what a run folder keeps reads back to the same
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
    counts = fuzz(good, words, try_reading)
    assert min(counts["refused"], counts["read"]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_label_tables(tmp_path, encoding):
    write_images(tmp_path, train=2, valid=2)

    def try_reading(data: bytes) -> str:
        (tmp_path / "labels.csv").write_bytes(data)
        try:
            rows, _ = read_table(tmp_path, "labels.csv", {})
        except UserError as e:
            return refused(e)
        assert all(row.path and row.label for row in rows)
        return "read"

    good = 'path,label,split\n"cat.0.jpg",cat,train\r\ndog;0.jpg,"dog ""x""\n",valid\n'.encode(encoding)
    counts = fuzz(good, (b'"', b",", b";", b"\t", b"\r", b"\n", b"\x00", b"path", b"../"), try_reading)
    assert min(counts["refused"], counts["read"]) > 10
