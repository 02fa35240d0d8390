"""The artefact: what is written comes back, and nothing damaged is used."""

import dataclasses
import json
import os
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from artefacts import CLASSES, PREPROCESS, change, export, replace, weights

from jaxcats import models
from jaxcats.common.errors import UserError
from jaxcats.export import artifact, program


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def test_what_is_written_comes_back(folder):
    verified = artifact.read(folder)
    model = models.create("tiny", len(CLASSES), head="linear")
    params, stats = weights(model, 0)
    assert (verified.classes, verified.preprocess) == (CLASSES, PREPROCESS)
    assert verified.facts["abstain"] == {"threshold": 0.6, "max_error": 0.01}
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors", "model.stablehlo"]
    kernel = verified.tensors["params/backbone/conv0/kernel"]
    np.testing.assert_array_equal(kernel, params["backbone"]["conv0"]["kernel"])
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), np.uint8)
    mean, std = (np.array(x, np.float32) for x in (PREPROCESS.mean, PREPROCESS.std))
    logits, _ = model.apply(params, stats, jnp.asarray((images / np.float32(255) - mean) / std), train=False)
    expected = jax.nn.softmax(logits / 1.7)
    np.testing.assert_allclose(verified.exported.call(verified.tensors, images), expected, atol=1e-6)


def test_an_export_can_run_on_cpu_and_cuda_and_names_no_file_of_the_machine(folder):
    exported = artifact.read(folder).exported
    assert exported.platforms == ("cpu", "cuda")
    content = (folder / artifact.PROGRAM).read_bytes()
    assert b".py" not in content
    assert os.fsencode(Path(models.__file__).parent) not in content


def test_exporting_again_replaces_the_whole(folder):
    (folder / artifact.TENSORS).write_bytes(b"broken")
    export(folder, seed=1)
    assert artifact.read(folder).classes == CLASSES
    assert [p.name for p in folder.parent.iterdir() if "model" in p.name] == ["model"]


@pytest.mark.parametrize("broken_at", ["write_json", "_replace_folder"])
def test_an_export_that_dies_leaves_the_old_one(folder, monkeypatch, broken_at):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, broken_at, die)
    with pytest.raises(KeyboardInterrupt):
        export(folder, seed=1)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir() if "model" in p.name] == ["model"]


def test_the_swap_without_the_systems_help(folder, monkeypatch):
    monkeypatch.setattr(artifact.ctypes, "CDLL", lambda _: None)
    (folder / artifact.TENSORS).write_bytes(b"broken")
    export(folder, seed=1)
    assert artifact.read(folder).classes == CLASSES
    assert [p.name for p in folder.parent.iterdir() if "model" in p.name] == ["model"]


def test_a_folder_with_anything_else_in_it_is_left_alone(folder):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something other"):
        export(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_file_is_no_folder_for_an_export(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(UserError, match="something other"):
        export(tmp_path / "model")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"format": 2}, "has format 2; this jaxcats reads 1"),
        ({"transform": None}, "has transform None"),
        ({"format": None}, "has format"),
        ({"transform": 99}, "transform 99"),
        ({"classes": ["cats", "dogs"]}, "probabilities of 2 classes"),
        ({"classes": ["cats", "dogs", "cats"]}, "different names"),
        ({"classes": ["cats", "dogs", 3]}, "different names"),
        ({"classes": "cat"}, "a list of different names"),
        ({"classes": []}, "a list of different names"),
        ({"classes": [str(i) for i in range(200_000)]}, "probabilities of 200000 classes"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": "1.7"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 1.5}, "its temperature is not the one"),
        ({"abstain": None}, "abstain.threshold: expected"),
        ({"tta": None}, "tta.augment"),
        ({"abstain__threshold": 2}, "abstain.threshold"),
        ({"tta__augment": "../x"}, "tta.augment"),
        ({"tta__augment": []}, "tta.augment"),
        ({"accuracy": {"n": "many", "errors": 1}}, "accuracy"),
        ({"preprocess": None}, "preprocess"),
        ({"preprocess__size": 1 << 40}, "images of 1099511627776 pixels"),
        ({"preprocess__size": 32}, "images of 32 pixels"),
        ({"preprocess__size": 24.0}, "whole size"),
        ({"preprocess__mean": "none"}, "preprocess"),
        ({"preprocess__crop_fraction": 1e-300}, "crop_fraction from 0.05"),
        ({"preprocess__policy": "../.."}, "policy"),
        ({"preprocess__more": 1}, "unknown field"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, "files.model.safetensors"),
        ({"files": ["/etc/passwd"]}, "files.model.safetensors"),
        ({"files__model.stablehlo": "x"}, "files.model.stablehlo"),
        ({"files__model.safetensors": {"bytes": -1, "sha256": "0" * 64}}, "model.json says -1"),
        ({"files__model.safetensors": {"bytes": 1 << 60, "sha256": "0" * 64}}, "model.json says"),
    ],
)
def test_a_description_that_cannot_be_is_refused(folder, facts, message):
    change(folder, **facts)
    with pytest.raises(UserError, match=message) as caught:
        artifact.read(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1, "temperature": NaN}', b"9" * 10_000],
    ids=["empty", "cut", "list", "null", "no text", "deep", "NaN", "digits"],
)
def test_a_description_that_is_no_json_object_is_refused(folder, text):
    (folder / artifact.JSON).write_bytes(text)
    with pytest.raises(UserError, match=r"model\.json: .+"):
        artifact.read(folder)


def test_a_description_too_long_to_be_one_is_not_read(folder):
    with open(folder / artifact.JSON, "r+b") as file:
        file.truncate(1 << 40)  # a sparse file: reading it would take a terabyte
    with pytest.raises(UserError, match="more than such a file can have"):
        artifact.read(folder)


@pytest.mark.parametrize("name", [artifact.TENSORS, artifact.PROGRAM])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "can't be read"),
        (lambda p: (p.unlink(), p.mkdir()), "not an ordinary file|directory"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "not an ordinary file"),
        (lambda p: (p.unlink(), p.symlink_to(p.with_name("nowhere"))), "can't be read"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "model.json says"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\xee"), "SHA-256"),
        (lambda p: os.truncate(p, 1 << 40), "more than such a file can have"),
    ],
    ids=["missing", "folder", "pipe", "broken link", "cut", "altered", "huge"],
)
def test_a_damaged_file_is_refused_by_name(folder, name, damage, message):
    damage(folder / name)
    with pytest.raises(UserError, match=message) as caught:
        artifact.read(folder)
    assert f"{folder / name}: " in str(caught.value)
    assert "python -m jaxcats.export --run RUN" in str(caught.value)


def test_a_folder_of_links_can_be_used_as_in_the_cache_of_a_hub(folder, tmp_path):
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in folder.iterdir():
        (links / file.name).symlink_to(os.path.relpath(file, links))
    assert artifact.read(links).facts == artifact.read(folder).facts


def test_a_folder_without_a_classifier_is_said_to_be_one(tmp_path):
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "\0"):
        with pytest.raises(UserError, match="not an exported classifier"):
            artifact.read(path)


def test_a_run_folder_stands_for_its_model(folder):
    assert artifact.read(folder.parent).folder == folder


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 1 << 62) + b"{}",
        with_header({"temperature": {"dtype": "F32", "shape": [1 << 31, 1 << 31], "data_offsets": [0, 4]}}, b"\0" * 4),
        with_header({"temperature": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        with_header({"temperature": {"dtype": "F32", "shape": [], "data_offsets": [0, 1 << 50]}}, b"\0" * 4),
        with_header({"temperature": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}}, b"\0" * 8),
        with_header([1, 2]),
    ],
    ids=["empty", "header", "overflow", "shape", "offsets", "dtype", "list"],
)
def test_tensors_that_declare_what_is_not_there_are_refused(folder, content):
    replace(folder, artifact.TENSORS, content)
    with pytest.raises(UserError, match=r"model\.safetensors: "):
        artifact.read(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("params/head/dense/bias"), "not a function of the arrays"),
        (lambda t: t.update(extra=t["temperature"]), "not a function of the arrays"),
        (lambda t: t.update(temperature=np.full(1, 1.7, np.float32)), "its temperature"),
        (lambda t: t["params/head/dense/bias"].fill(np.nan), "not numbers"),
        (lambda t: t["params/backbone/conv1/kernel"].fill(np.inf), "not numbers"),
        (lambda t: swap(t, "params/backbone/conv1/kernel", "params/backbone/conv2/kernel"), "not a function"),
    ],
    ids=["missing", "more", "shape", "nan", "inf", "swapped"],
)
def test_tensors_of_another_network_are_refused(folder, edit, message):
    tensors = {k: v.copy() for k, v in safetensors.numpy.load_file(folder / artifact.TENSORS).items()}
    edit(tensors)
    replace(folder, artifact.TENSORS, safetensors.numpy.save(tensors))
    with pytest.raises(UserError, match=message):
        artifact.read(folder)


def swap(tensors: dict, one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


def exported_of(function) -> bytes:
    """A program with the arguments of an artefact's that does something else."""
    (batch,) = jax.export.symbolic_shape("b")
    shapes = (
        {"temperature": jax.ShapeDtypeStruct((), np.float32)},
        jax.ShapeDtypeStruct((batch, 24, 24, 3), np.uint8),
    )
    return bytes(jax.export.export(jax.jit(function))(*shapes).serialize())


def write_program(folder: Path, function) -> None:
    replace(folder, artifact.TENSORS, safetensors.numpy.save({"temperature": np.array(1.7, np.float32)}))
    replace(folder, artifact.PROGRAM, exported_of(function))


def test_a_program_with_custom_calls_is_refused(folder):
    def call_lapack(tensors, images):
        return jnp.zeros((images.shape[0], 3)) + jnp.linalg.cholesky(tensors["temperature"] * jnp.eye(3))[0]

    write_program(folder, call_lapack)
    with pytest.raises(UserError, match=r"model\.stablehlo: .* makes the custom call 'lapack_"):
        artifact.read(folder)


@pytest.mark.parametrize(
    "function",
    [
        lambda t, x: jnp.zeros((x.shape[0], 2)) * t["temperature"],
        lambda t, x: jnp.zeros((1, 3)) * t["temperature"],
        lambda t, x: (jnp.zeros((x.shape[0], 3), jnp.int32), t["temperature"]),
    ],
    ids=["classes", "one row", "two results"],
)
def test_a_program_with_another_result_is_refused(folder, function):
    write_program(folder, function)
    with pytest.raises(UserError, match="not a function of the arrays"):
        artifact.read(folder)


@pytest.mark.parametrize("call", [lambda x: jax.pure_callback(np.asarray, x, x), jnp.linalg.cholesky])
def test_a_network_that_calls_code_outside_itself_can_not_be_exported(monkeypatch, call):
    model = models.create("tiny", 3, head="linear")

    def apply(self, params, batch_stats, images, *, train):
        return call(jnp.eye(3)) + images.mean((1, 2, 3))[:, None, None], batch_stats

    monkeypatch.setattr(models.Model, "apply", apply)
    with pytest.raises(UserError, match="tiny: this network can't be exported"):
        program.make_program(model, PREPROCESS)


def test_what_is_no_program_is_refused(folder):
    replace(folder, artifact.PROGRAM, b"no program at all")
    change(folder, jax="99.1")
    with pytest.raises(
        UserError, match=r"model\.stablehlo: can't be used: .+; it was written by jax 99.1, and this is"
    ):
        artifact.read(folder)


def test_a_network_of_this_package_is_exported_once_and_a_damaged_copy_is_made_again(own_cache, monkeypatch):
    model = models.create("resnet18", 2)
    preprocess = dataclasses.replace(PREPROCESS, size=32)
    original = program.make_program(model, preprocess)
    with monkeypatch.context() as patch:
        patch.setattr(jax.export, "export", None)  # would raise TypeError
        assert program.make_program(model, preprocess) == original
        with pytest.raises(TypeError):
            program.make_program(model, dataclasses.replace(preprocess, mean=(0.1, 0.2, 0.3)))
    (cached,) = (own_cache / "programs").glob("*.stablehlo")
    cached.write_bytes(cached.read_bytes()[:-1] + b"?")
    assert program.make_program(model, preprocess) == original
