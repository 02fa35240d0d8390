"""The functions of a Model, on the network of one layer and on the real ones."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seeded
from jax import export

from jaxcats import models
from jaxcats.common.errors import UserError
from jaxcats.core.step import normalise
from jaxcats.models.conv import Conv

REAL = ("resnet18", "resnet34", "resnet50", "efficientnet_lite0")


@pytest.fixture(scope="module")
def tiny():
    model = models.create(seeded.register_tiny(), 3)
    return model, *model.init(jax.random.key(1)), jnp.array(seeded.images((6, 8, 12, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet_34"}, "backbone: unknown value 'resnet_34'.*resnet18, resnet34.*Did you mean 'resnet34'"),
        ({"head": "leson"}, "head: unknown value 'leson'.*Did you mean 'lesson'"),
        ({"dtype": "float16"}, "dtype: unknown value 'float16'.*bfloat16"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_create_names_the_mistake(arguments, message):
    with pytest.raises(UserError, match=message):
        models.create(**{"name": "resnet34", "num_classes": 2, **arguments})


@pytest.mark.parametrize(
    ("name", "head", "size"),
    [
        ("resnet34", "lesson", 1024),
        ("resnet34", "linear", 512),
        ("resnet50", "classifier", 2048),
        ("efficientnet_lite0", "lesson", 2560),
        ("efficientnet_lite0", "linear", 1280),
    ],
)
def test_model_is_a_hashable_description(name, head, size):
    model = models.create(name, 2, head=head)
    assert model == models.create(name, 2, head=head)
    assert hash(model) == hash(models.create(name, 2, head=head))
    assert model != models.create(name, 3, head=head)
    assert (model.feature_size, model.backbone.stride) == (size, 32)
    assert model.preprocess.interpolation == ("bicubic" if name == "efficientnet_lite0" else "bilinear")


@pytest.mark.parametrize("name", REAL)
def test_every_parameter_is_in_exactly_one_group(name):
    params, _ = models.shapes(models.create(name, 2))
    groups = models.create(name, 2).groups(params)
    assert jax.tree.structure(groups) == jax.tree.structure(params)
    by_part = {}
    for (part, child, *_), group in jax.tree_util.tree_leaves_with_path(groups):
        by_part.setdefault(group, set()).add("head" if part.key == "head" else child.key)
    late = {f"stage{n}" for n in range(4, 8)} | {"tail"} if "lite" in name else {"layer3", "layer4"}
    early = {"stem", "stage1", "stage2", "stage3"} if "lite" in name else {"stem", "layer1", "layer2"}
    assert by_part == {0: early, 1: late, 2: {"head"}}


def test_random_weights_have_the_spread_they_should():
    images = jax.ShapeDtypeStruct((1, 8, 8, 256), jnp.float32)
    for conv, fan_out in ((Conv(128), 9 * 128), (Conv(256, depthwise=True), 9)):
        kernel = conv.lazy_init(jax.random.key(0), images)["params"]["kernel"]
        assert kernel.std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
    params, _ = models.create("resnet18", 2).init_head(jax.random.key(0))
    dense = params["dense1"]["kernel"]
    assert dense.std() == pytest.approx((2 / 1024) ** 0.5, rel=0.01)
    assert abs(dense).max() > 4 * dense.std()  # a plain normal, as torch's, not a truncated one
    assert not params["dense1"]["bias"].any()


def test_init_is_plain_float32_dictionaries_from_the_key_alone(tiny):
    model, *trees, _ = tiny
    assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {jnp.dtype("float32")}
    assert type(trees[0]["backbone"]["net"]) is dict
    jax.tree.map(np.testing.assert_array_equal, trees, list(model.init(jax.random.key(1))))
    other, _ = model.init(jax.random.key(2))
    assert not np.array_equal(other["head"]["dense1"]["kernel"], trees[0]["head"]["dense1"]["kernel"])


def test_linear_head_starts_as_torch_linear():
    model = models.create(seeded.register_tiny(), 1000, head="linear")
    params, batch_stats = model.init(jax.random.key(0))
    assert batch_stats["head"] == {}
    for leaf in params["head"]["dense"].values():
        assert 0.49 < abs(leaf).max() <= 0.5  # 1 / sqrt(4 features)
        assert leaf.std() == pytest.approx(0.5 / 3**0.5, rel=0.05)


def test_head_on_features_equals_the_whole(tiny):
    model, params, batch_stats, images = tiny
    whole, stats = jax.jit(lambda *a: model.apply(*a, train=False))(params, batch_stats, images)
    features = jax.jit(model.features)(params, batch_stats, images)
    assert features.shape == (6, model.feature_size)
    assert features.dtype == jnp.float32
    logits, _ = jax.jit(lambda *a: model.apply_head(*a, train=False))(params, batch_stats, features)
    np.testing.assert_allclose(whole, logits, rtol=1e-6, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, stats, batch_stats)
    feature_map = model.feature_map(params, batch_stats, images)
    assert feature_map.shape == (6, 2, 3, 4)
    np.testing.assert_allclose(features[:, :4], feature_map.max((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(features[:, 4:], feature_map.mean((1, 2)), rtol=1e-6)


def test_train_and_bn_train_say_which_statistics_move(tiny):
    model, params, batch_stats, images = tiny

    def moved(**how):
        _, new = model.apply(params, batch_stats, images, key=jax.random.key(0), **how)
        assert jax.tree.structure(new) == jax.tree.structure(batch_stats)
        same = jax.tree.map(np.array_equal, new, batch_stats)
        return {part for part in new if not all(jax.tree.leaves(same[part]))}

    assert moved(train=False) == set()
    assert moved(train=True) == {"head"}
    assert moved(train=True, bn_train=True) == {"backbone", "head"}
    assert moved(train=False, bn_train=True) == {"backbone"}
    features = model.features(params, batch_stats, images)
    _, new = model.apply_head(params, batch_stats, features, train=True, key=jax.random.key(0))
    want = 0.9 * batch_stats["head"]["bn1"]["mean"] + 0.1 * features.mean(0)
    np.testing.assert_allclose(new["head"]["bn1"]["mean"], want, rtol=1e-5, atol=1e-7)
    want = 0.9 * batch_stats["head"]["bn1"]["var"] + 0.1 * features.var(0)  # biased: torch's would be 6 / 5 of it
    np.testing.assert_allclose(new["head"]["bn1"]["var"], want, rtol=1e-5)
    assert new["backbone"] is batch_stats["backbone"]


def test_dropout_follows_its_key(tiny):
    model, params, batch_stats, images = tiny
    features = model.features(params, batch_stats, images)

    def logits(seed):
        return model.apply_head(params, batch_stats, features, train=True, key=jax.random.key(seed))[0]

    np.testing.assert_array_equal(logits(0), logits(0))
    assert not np.array_equal(logits(0), logits(1))
    with pytest.raises(ValueError, match="needs a key"):
        model.apply_head(params, batch_stats, features, train=True)
    linear = models.create(model.name, 3, head="linear")
    linear.apply(*linear.init(jax.random.key(0)), images, train=True)  # nothing to drop, no key


@pytest.mark.parametrize("shape", [(1, 31, 64, 3), (1, 64, 64), (1, 64, 64, 1)])
def test_images_that_do_not_fit_are_named(shape):
    model = models.create("resnet18", 2)
    params, batch_stats = models.shapes(model)
    with pytest.raises(ValueError, match=r"expected \[N,H,W,3\] with sides of at least 32"):
        jax.eval_shape(model.features, params, batch_stats, jax.ShapeDtypeStruct(shape, jnp.float32))


def test_bfloat16_changes_arithmetic_only(tiny):
    model, params, batch_stats, images = tiny
    half = models.create(model.name, 3, dtype="bfloat16")
    shapes = models.shapes(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    want, _ = model.apply(params, batch_stats, images, train=False)
    logits, _ = half.apply(params, batch_stats, images, train=False)
    assert logits.dtype == jnp.float32
    assert 0 < abs(logits - want).max() < 0.05 * abs(want).max()
    text = jax.jit(half.features).lower(params, batch_stats, images).as_text()
    assert "bf16" in next(line for line in text.splitlines() if "stablehlo.convolution" in line)


def test_exports_with_a_symbolic_batch(tiny):
    model, params, batch_stats, images = tiny
    (batch,) = export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((batch, *images.shape[1:]), jnp.float32)
    logits = jax.jit(lambda *args: model.apply(*args, train=False)[0])
    exported = export.export(logits)(params, batch_stats, shape)
    for count in (1, 6):
        want = logits(params, batch_stats, images[:count])
        np.testing.assert_allclose(exported.call(params, batch_stats, images[:count]), want, rtol=1e-6, atol=1e-7)


def test_import_brings_no_heavy_library():
    heavy = ["tensorflow", "jsonargparse", "matplotlib", "orbax", "torch", "huggingface_hub"]
    code = f"import sys, jaxcats.models; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("channels", "mean"), [(1, [0.449]), (3, [0.485, 0.456, 0.406]), (4, [0.485, 0.456, 0.406, 0.485])]
)
def test_images_of_another_number_of_channels_go_through_the_whole_pipeline(channels, mean):
    model = models.create("resnet18", 2, channels=channels)
    np.testing.assert_allclose(model.preprocess.mean, mean, atol=1e-3)
    prepare = normalise(model.preprocess.mean, model.preprocess.std)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, channels), np.uint8)
    params, stats = jax.eval_shape(model.init, jax.random.key(0))
    logits, _ = jax.eval_shape(lambda p, s, x: model.apply(p, s, prepare(x), train=False), params, stats, images)
    assert logits.shape == (2, 2)
    with pytest.raises(ValueError, match=f"expected {channels} channels"):
        prepare(images[..., :1] if channels > 1 else np.repeat(images, 3, -1))
