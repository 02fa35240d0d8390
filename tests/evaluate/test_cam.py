"""The class heat map, where its answer is known by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny  # noqa: F401  (registers the backbone)

from jaxcats import models
from jaxcats.evaluate.figures import grad_cam
from jaxcats.models.head import HEADS


class Identity(nn.Module):
    """A backbone whose feature map is the image itself: red, green and blue are its channels."""

    @nn.compact
    def __call__(self, x, *, train):
        return x * self.param("scale", nn.initializers.ones, (3,))


models.register("identity", models.Backbone(build=lambda dtype: Identity(), channels=3, stride=1))


def squares():
    """A red square at the top left and a blue one at the bottom right; then its mirror image; float32 [2, 6, 8, 3]."""
    image = np.zeros((6, 8, 3), np.float32)
    image[:2, :2, 0] = 1.0
    image[:2, 0, 0] = 2.0
    image[4:, 6:, 2] = 3.0
    return jnp.array(np.stack([image, image[:, ::-1]]))


def red_or_blue(head="linear"):
    """Class 0 likes red, class 1 likes blue, class 2 dislikes both."""
    model = models.create("identity", 3, head=head)
    params, batch_stats = model.init(jax.random.key(0))
    kernel = jnp.array([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [0.0, 1.0, -1.0]])
    params["head"]["dense"] = {"kernel": kernel, "bias": jnp.zeros(3)}
    return model, params, batch_stats


def test_each_class_lights_up_its_own_colour():
    model, images = red_or_blue(), squares()
    heat = grad_cam(*model, images, jnp.array([0, 1]))
    assert heat.shape == (2, 6, 8)
    assert heat.dtype == jnp.float32
    want = np.zeros((2, 6, 8), np.float32)
    want[0, :2, :2] = 0.5
    want[0, :2, 0] = 1.0
    want[1, 4:, :2] = 1.0
    np.testing.assert_allclose(heat, want, atol=1e-6)


def test_where_nothing_speaks_for_the_class_there_is_no_heat():
    heat = grad_cam(*red_or_blue(), squares(), jnp.array([2, 2]))
    np.testing.assert_array_equal(heat, np.zeros((2, 6, 8)))


@pytest.mark.parametrize("head", HEADS)
def test_any_head_gives_heat_from_0_to_1_and_images_do_not_mix(head):
    model = models.create("tiny", 3, head=head)
    params, batch_stats = model.init(jax.random.key(3))
    images = jax.random.normal(jax.random.key(1), (5, 40, 48, 3))
    look = jax.jit(grad_cam, static_argnums=0)
    heat = look(model, params, batch_stats, images, jnp.arange(5) % 3)
    assert heat.shape == (5, 5, 6)
    assert float(heat.min()) >= 0
    assert np.all(np.isclose(heat.max((1, 2)), 1) | (heat.max((1, 2)) == 0))
    assert float(heat.max()) == pytest.approx(1)
    other = look(model, params, batch_stats, images.at[jnp.array([0, 1, 3, 4])].multiply(-2), jnp.arange(5) % 3)
    np.testing.assert_array_equal(heat[2], other[2])
    assert not np.array_equal(heat, other)


def test_equals_the_formula_of_the_paper_by_finite_differences():
    """The weight of a channel is the mean over places of d logit / d activation."""
    label, model = 0, models.create("tiny", 2)
    params, batch_stats = model.init(jax.random.key(0))
    image = jax.random.normal(jax.random.key(4), (1, 24, 24, 3))
    features = np.asarray(model.feature_map(params, batch_stats, image))
    logit = jax.jit(lambda x: model.apply_map(params, batch_stats, x)[:, label])
    step = 1e-3
    nudges = np.eye(features.size, dtype=np.float32).reshape(-1, *features.shape[1:]) * step
    slopes = (logit(features + nudges) - logit(features - nudges)) / (2 * step)
    weights = np.asarray(slopes).reshape(features.shape).mean((0, 1, 2))
    want = np.maximum((features[0] * weights).sum(-1), 0)
    assert want.max() > 0
    heat = jax.jit(grad_cam, static_argnums=0)(model, params, batch_stats, image, jnp.array([label]))[0]
    np.testing.assert_allclose(heat, want / want.max(), atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head", "dtype"),
    [
        *((name, head, "float32") for name in ("efficientnet_lite0", "resnet34") for head in HEADS),
        ("resnet50", "lesson", "float32"),
        ("resnet34", "lesson", "bfloat16"),
        ("efficientnet_lite0", "linear", "bfloat16"),
    ],
)
def test_every_network_gives_heat_whatever_it_computes_in(name, head, dtype):
    model = models.create(name, 3, head=head, dtype=dtype)
    params, batch_stats = model.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (3, 96, 96, 3))
    look = jax.jit(grad_cam, static_argnums=0)
    heat = np.asarray(look(model, params, batch_stats, images, jnp.arange(3)))
    assert heat.shape == (3, 3, 3)
    assert heat.dtype == np.float32
    assert np.all(np.isclose(heat.max((1, 2)), 1) | (heat.max((1, 2)) == 0))
    alone = np.asarray(look(model, params, batch_stats, images[1:2], jnp.array([1])))
    np.testing.assert_allclose(alone, heat[1:2], atol=1e-4 if dtype == "float32" else 0.1)
