"""`jaxcats weights` as a user meets it, weights by name, and images of other sizes and channels."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxcats import models, weights
from jaxcats.common.cli import run_command
from jaxcats.common.errors import UserError
from jaxcats.data.images import evaluation_pixels
from jaxcats.models import pretrained, registry

sys.path.append(str(Path(__file__).parent / "models"))
import seeded

GOLDEN = Path(__file__).parent / "golden"
STATE = seeded.seeded_state(seeded.TINY_SHAPES)
# As timm's and torchvision's tables have them: name, millions of parameters, top-1, licence.
PUBLISHED = """
resnet18.tv_in1k 11.7 69.76 BSD-3-Clause
resnet18.a1_in1k 11.7 71.49 Apache-2.0
resnet34.tv_in1k 21.8 73.31 BSD-3-Clause
resnet34.a1_in1k 21.8 76.42 Apache-2.0
resnet50.tv_in1k 25.6 76.13 BSD-3-Clause
resnet50.tv2_in1k 25.6 80.85 BSD-3-Clause
resnet50.a1_in1k 25.6 80.38 Apache-2.0
resnet101.tv_in1k 44.5 77.38 BSD-3-Clause
resnet101.tv2_in1k 44.5 81.89 BSD-3-Clause
resnet101.a1_in1k 44.5 81.50 Apache-2.0
resnet152.tv_in1k 60.2 78.32 BSD-3-Clause
resnet152.tv2_in1k 60.2 82.29 BSD-3-Clause
resnet152.a1_in1k 60.2 81.97 Apache-2.0
efficientnet_lite0 4.7 75.10 Apache-2.0
"""


@pytest.fixture
def run(capsys):
    """run(*argv): exit code, what was printed, what was complained."""

    def call(*argv) -> tuple[int, str, str]:
        code = run_command(weights.main, [str(a) for a in argv])
        return code, *capsys.readouterr()

    return call


def test_list_names_each_with_its_facts(run):
    code, out, _ = run("list")
    assert code == 0
    rows = {line.split("  ")[0]: re.split("  +", line) for line in out.splitlines()}
    assert rows.keys() >= registry.named_weights().keys()
    for line in PUBLISHED.strip().splitlines():
        name, parameters, top1, licence = line.split()
        assert rows[name][1] == f"{parameters} M"
        assert rows[name][3] == f"{top1} %"
        assert rows[name][5] == licence
    assert rows["resnet50.a1_in1k"][7] == "hf:timm/resnet50.a1_in1k/model.safetensors"
    assert rows["efficientnet_lite0"][6] == "yes"


def test_the_listed_parameters_are_the_networks():
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "efficientnet_lite0"):
        params, _ = models.shapes(models.create(name, 1000, head="classifier"))
        assert registry.get(name).parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_fetch_says_where_the_file_is(run):
    code, out, _ = run("fetch", "efficientnet_lite0")
    assert code == 0
    path = models.find_weights("efficientnet_lite0").path
    assert out.startswith(f"efficientnet_lite0: {path} (18.8 MB, sha256 5793442")


def test_check_tells_the_published_file_from_another(run, tmp_path):
    code, out, err = run("check", "efficientnet_lite0")
    assert code == 0, err
    assert "fits efficientnet_lite0; 296 tensors, a classifier of 1,000 classes; sha256 5793442" in out
    assert "that of the published file" in out
    copy = tmp_path / "copy.pth"
    copy.write_bytes((GOLDEN / "tiny_zip.pth").read_bytes())
    code, out, _ = run("check", copy, "--backbone", seeded.register_tiny())
    assert code == 0
    assert f"{copy}: fits {seeded.TINY}; 8 tensors, a classifier of 3 classes; sha256 " in out
    assert out.endswith(", its hash is not known here\n")


def test_a_network_of_ones_own_may_share_published_weights_and_takes_no_name_away(monkeypatch):
    monkeypatch.setattr(registry, "_BACKBONES", dict(registry._BACKBONES))
    models.register("zmine", registry.get("efficientnet_lite0"))
    assert registry.named_weights()["efficientnet_lite0"] == "efficientnet_lite0"
    assert registry.sources("zmine", "efficientnet_lite0") == registry.sources("efficientnet_lite0")
    with pytest.raises(UserError, match="belong to resnet18, not to zmine"):
        registry.sources("zmine", "resnet18.a1_in1k")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out.bias": np.zeros(4, np.float32)}, "misfit: out.bias has shape (4,) instead of (3,)"),
        ({"out.bias": np.float32(0)}, "misfit: out.bias has shape () instead of (3,)"),
        ({"out.bias": None}, "missing: out.bias"),
        ({"out.weight": None}, "missing: out.weight"),
        ({"net.bn.bias": np.full(4, 1e300)}, "net.bn.bias is float64, with values that are infinite in float32"),
        ({"net.bn.running_var": -np.ones(4, np.float32)}, "net.bn.running_var is a variance, and negative somewhere"),
        ({"net.bn.bias": np.full(4, "x")}, "net.bn.bias is <U1, not a floating-point number"),
        ({"net.bn.bias": np.zeros(4, "M8[s]")}, "net.bn.bias is datetime64[s], not a floating-point number"),
        ({"net.bn.bias": np.zeros(4, [("a", "f4")])}, "net.bn.bias is [('a', '<f4')], not a floating-point number"),
    ],
)
def test_check_refuses_what_would_not_load(run, tmp_path, recwarn, change, words):
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: array for name, array in (STATE | change).items() if array is not None})
    code, _, err = run("check", path, "--backbone", seeded.register_tiny())
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_check_of_a_backbone_alone(run, tmp_path):
    path = tmp_path / "bare.npz"
    np.savez(path, **{name: array for name, array in STATE.items() if not name.startswith("out.")})
    code, out, _ = run("check", path, "--backbone", seeded.register_tiny())
    assert code == 0
    assert "; 5 tensors, no classifier; sha256 " in out


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": np.array(["x", "yz"])}, "can't hold its tensors (Unknown dtype "),
        ({"b": np.zeros(2, np.complex256)}, "complex256"),
        ({"b": np.zeros(2, np.longdouble)}, "float128"),
        ({"ok": np.zeros(2), "c": np.zeros(2, "M8[s]")}, "datetime64[s]"),
        ({"d": np.zeros(2, [("a", "f4")])}, "can't hold its tensors ("),
        ({"__metadata__": np.zeros(2)}, "can't hold its tensors (the name '__metadata__' is reserved)"),
        ({}, "in.npz: holds no tensors"),
    ],
)
def test_what_a_file_can_not_hold_is_not_converted(run, tmp_path, arrays, words):
    np.savez(tmp_path / "in.npz", **arrays)
    code, _, err = run("convert", tmp_path / "in.npz", tmp_path / "out.safetensors")
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


def test_a_target_may_begin_at_home_and_is_named_where_it_can_not_be_written(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, _ = run("convert", GOLDEN / "tiny_zip.pth", "~/out.safetensors")
    assert (code, (tmp_path / "out.safetensors").is_file()) == (0, True)
    assert out.startswith(f"Written: {tmp_path}/out.safetensors (")
    code, _, err = run("convert", GOLDEN / "tiny_zip.pth", tmp_path / "out.safetensors/a.safetensors")
    assert code == 2
    assert err.startswith(f"error: {tmp_path}/out.safetensors/a.safetensors can't be written (")


def test_check_refuses_what_is_not_a_number(run, tmp_path):
    path = tmp_path / "nan.safetensors"
    save_file(STATE | {"net.bn.bias": np.full(4, np.nan, np.float32)}, path)
    code, _, err = run("check", path, "--backbone", seeded.register_tiny())
    assert code == 2
    assert "has values that are not finite numbers, in net.bn.bias" in err


@pytest.mark.parametrize("source", ["tiny_zip.pth", "tiny_legacy.pth"])
def test_convert_writes_the_same_tensors(run, tmp_path, source):
    target = tmp_path / "out.safetensors"
    code, out, _ = run("convert", GOLDEN / source, target)
    assert code == 0
    assert out.startswith(f"Written: {target} (8 tensors")
    found = load_file(target)
    assert found.pop("net.bn.num_batches_tracked").shape == ()
    assert found.keys() == STATE.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, STATE[name])
    before = target.read_bytes()
    code, _, err = run("convert", GOLDEN / source, target)
    assert (code, err) == (2, f"error: {target}: expected the name of a new file that ends in .safetensors\n")
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_transposed_view_is_converted_right(run, tmp_path):
    code, _, _ = run("convert", GOLDEN / "tensors_zip.pth", tmp_path / "a.safetensors")
    assert code == 0
    found = load_file(tmp_path / "a.safetensors")
    with np.load(GOLDEN / "tensors.npz") as want:
        for name in want.files:
            np.testing.assert_array_equal(found[name], want[name])


def test_a_data_parallel_file_is_the_same_network(tmp_path):
    path = tmp_path / "wrapped.safetensors"
    save_file({f"module.{name}": array for name, array in STATE.items()}, path)
    model = models.create(seeded.register_tiny(), 3, head="classifier")
    found, want = models.load_pretrained(model, path), models.load_pretrained(model, GOLDEN / "tiny_zip.pth")
    jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lst"], "there is no action 'lst'. Did you mean 'list'?"),
        (["fetch"], "what: is required."),
        (["fetch", "resnet50.a1_in"], "resnet50.a1_in: not known. Did you mean 'resnet50.a1_in1k'?"),
        (["fetch", "hf:timm"], "expected hf:OWNER/REPO/FILE"),
        (["check", "absent.pth"], "weight file absent.pth does not exist"),
        (["check", "absent.safetensors"], "weight file absent.safetensors does not exist"),
        (["check", "hf:a"], "expected hf:OWNER/REPO/FILE"),
        (
            ["check", "hf:nobody/nothing/a.npz"],
            "is not on this machine; run: jaxcats weights fetch hf:nobody/nothing/a.npz",
        ),
        (["check", GOLDEN / "tiny_zip.pth"], "--backbone: is required for a file; one of efficientnet_lite0"),
        (["check", GOLDEN / "tiny_zip.pth", "--backbone", "resnet"], "backbone: unknown value 'resnet'"),
        (["check", GOLDEN / "tiny_zip.pth", "--backbone", "resnet18"], "as resnet18: not the weights of this network"),
        (
            ["convert", GOLDEN / "tiny_zip.pth", "a.bin"],
            "a.bin: expected the name of a new file that ends in .safetensors",
        ),
        (["convert", GOLDEN / "module.pth", "never.safetensors"], "module.pth: "),
    ],
)
def test_a_slip_is_one_line(run, argv, words):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not Path("never.safetensors").exists()


# --- weights by name ---


def test_a_name_brings_its_own_preprocessing():
    default, a1 = models.create("resnet50", 2), models.create("resnet50", 2, weights="resnet50.a1_in1k")
    assert default.preprocess == models.create("resnet50", 2, weights="resnet50.tv_in1k").preprocess
    assert (default.preprocess.interpolation, default.preprocess.crop_fraction) == ("bilinear", 0.875)
    assert (a1.preprocess.interpolation, a1.preprocess.crop_fraction) == ("bicubic", 0.95)
    by_place = models.create("resnet50", 2, weights="hf:timm/resnet50.a1_in1k/model.safetensors")
    assert by_place.preprocess == a1.preprocess
    tv2 = models.create("resnet50", 2, weights="resnet50.tv2_in1k").preprocess
    assert pretrained.Preprocess(crop_fraction=tv2.crop_fraction, policy="weights").resize_to == 232  # torchvision's


def test_a_name_of_another_network_or_of_none_is_explained():
    with pytest.raises(UserError, match=r"belong to resnet50, not to resnet34; set `model.backbone: resnet50`"):
        models.find_weights("resnet34", "resnet50.a1_in1k")
    with pytest.raises(UserError, match=r"or one of resnet50.tv_in1k, .*Did you mean 'resnet50.a1_in1k'\?"):
        models.find_weights("resnet50", "resnet50.a1")


# --- other channels and sizes ---


def test_a_grey_image_is_the_same_with_one_channel():
    rgb = models.create(seeded.register_tiny(), 3, head="classifier")
    grey = models.create(rgb.name, 3, head="classifier", channels=1)
    images = seeded.images((2, 16, 16, 1))
    path = GOLDEN / "tiny_zip.pth"
    want, _ = rgb.apply(*models.load_pretrained(rgb, path), np.repeat(images, 3, 3), train=False)
    found, _ = grey.apply(*models.load_pretrained(grey, path), images, train=False)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_a_fourth_channel_repeats_the_first():
    model = models.create(seeded.register_tiny(), 3, head="classifier", channels=4)
    kernel = models.load_pretrained(model, GOLDEN / "tiny_zip.pth")[0]["backbone"]["net"]["conv"]["kernel"]
    want = STATE["net.conv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_allclose(kernel, want[:, :, [0, 1, 2, 0]] * 0.75, rtol=1e-6)
    assert jax.tree.map(np.shape, model.init(jax.random.key(0))[0]["backbone"]["net"]["conv"]) == {
        "kernel": (5, 5, 4, 4)
    }


def test_the_wrong_number_of_channels_is_named():
    model = models.create("resnet18", 2, channels=4)
    with pytest.raises(ValueError, match=r"shape \(1, 64, 64, 3\); expected \[N,H,W,4\] with sides of at least 32"):
        model.features(*models.shapes(model), np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(UserError, match="channels is 0; expected 1 or more"):
        models.create("resnet18", 2, channels=0)


@pytest.mark.parametrize("size", [64, 65, 512])
def test_images_from_64_to_512_pixels_fit(size):
    preprocess = dataclasses.replace(models.create("resnet18", 5).preprocess, size=size)
    pixels = evaluation_pixels(Image.new("RGB", (300, 200), "red"), preprocess)
    assert pixels.shape == (size, size, 3)
    for name in ("resnet18", "efficientnet_lite0"):
        model = models.create(name, 5, head="linear")
        images = jax.ShapeDtypeStruct((2, *pixels.shape), np.float32)
        features = jax.eval_shape(model.features, *models.shapes(model), images)
        assert features.shape == (2, model.feature_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101", "resnet152", "efficientnet_lite0"])
def test_logits_from_64_to_512_pixels_are_numbers(name):
    model = models.create(name, 5)
    run = jax.jit(lambda *arguments: model.apply(*arguments, train=False)[0])
    trees = jax.jit(model.init)(jax.random.key(0))
    for size in (64, 224, 512):
        logits = run(*trees, seeded.images((2, size, size, 3)))
        assert logits.shape == (2, 5)
        assert np.isfinite(logits).all()


def test_sizes_that_cannot_be_are_said():
    model = models.create("resnet18", 2)
    with pytest.raises(ValueError, match="sides of at least 32"):
        model.features(*models.shapes(model), np.zeros((1, 31, 64, 3), np.float32))
