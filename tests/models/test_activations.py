"""What the parts of a backbone put out, and the head on a feature map."""

import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest
import seeded
import tiny  # noqa: F401  (registers the backbone)

from jaxcats import models

PARTS = {
    "resnet18": ["stem", *(f"layer{n}/block{b}" for n in range(1, 5) for b in range(2))],
    "efficientnet_lite0": [
        "stem",
        *(f"stage{n}/block{b}" for n, count in enumerate((1, 2, 2, 3, 3, 4, 1), start=1) for b in range(count)),
        "tail",
    ],
}


@pytest.mark.parametrize("name", PARTS)
def test_every_block_is_there_in_order(name):
    model = models.create(name, 2)
    arguments = *models.shapes(model), jax.ShapeDtypeStruct((2, 96, 64, 3), jnp.float32)
    names = []

    def run(*arguments):
        found = model.activations(*arguments)
        names.extend(found)
        return list(found.values())

    found = jax.eval_shape(run, *arguments)
    want = jax.eval_shape(lambda *a: ours.block_outputs(model, *a), *arguments)
    assert names == PARTS[name]
    assert [x.shape for x in found] == [x.shape for x in want]
    assert {x.dtype for x in found} == {jnp.dtype("float32")}


def test_every_block_has_its_own_output():
    model = models.create("resnet18", 2)
    variables = model.init(jax.random.key(0))

    @jax.jit
    def run(*arguments):
        return list(model.activations(*arguments).values()), ours.block_outputs(model, *arguments)

    for mine, want in zip(*run(*variables, jnp.array(seeded.images((1, 32, 32, 3)))), strict=True):
        np.testing.assert_array_equal(mine, want)


def test_resnet34_has_its_sixteen_blocks():
    model = models.create("resnet34", 2)
    images = jax.ShapeDtypeStruct((3, 224, 224, 3), jnp.float32)
    found = jax.eval_shape(model.activations, *models.shapes(model), images)
    assert len(found) == 17
    assert found["stem"].shape == (3, 112, 112, 64)
    assert found["layer4/block2"].shape == (3, 7, 7, 512)


def test_a_registered_backbone_gives_its_top_level_modules():
    model = models.create("tiny", 3)
    params, batch_stats = model.init(jax.random.key(0))
    images = jnp.array(seeded.images((2, 16, 24, 3)))
    found = model.activations(params, batch_stats, images)
    assert list(found) == ["conv0", "bn0", "conv1", "bn1", "conv2", "bn2"]
    assert found["bn2"].shape == (2, 2, 3, 8)
    np.testing.assert_allclose(jax.nn.relu(found["bn2"]), model.feature_map(params, batch_stats, images), rtol=1e-6)


def test_batch_norm_uses_its_stored_averages():
    model = models.create("tiny", 3)
    params, batch_stats = model.init(jax.random.key(0))
    images = jnp.array(seeded.images((4, 16, 16, 3)))
    together = model.activations(params, batch_stats, images)["bn2"]
    alone = model.activations(params, batch_stats, images[:1])["bn2"]
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_bfloat16_gives_float32():
    model = models.create(seeded.register_tiny(), 3, dtype="bfloat16")
    found = model.activations(*model.init(jax.random.key(0)), jnp.array(seeded.images((1, 8, 8, 3))))
    assert {name: x.dtype for name, x in found.items()} == {"net": jnp.float32}


@pytest.mark.parametrize("head", ["lesson", "linear", "classifier"])
def test_the_head_on_the_feature_map_equals_the_whole(head):
    model = models.create("tiny", 3, head=head)
    params, batch_stats = model.init(jax.random.key(0))
    images = jnp.array(seeded.images((2, 16, 24, 3)))
    logits = model.apply_map(params, batch_stats, model.feature_map(params, batch_stats, images))
    want, _ = model.apply(params, batch_stats, images, train=False)
    np.testing.assert_allclose(logits, want, rtol=1e-6, atol=1e-6)
