"""Depthwise convolution: as XLA's grouped convolution, under every transformation, without being it on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from jaxcats.models.conv import DIMENSIONS, conv2d


def operands(*, size=(9, 8), channels=6, window=3, batch=2):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, *size, channels)).astype(np.float32)
    return images, rng.normal(size=(window, window, 1, channels)).astype(np.float32)


def reference(images, kernel, *, stride, padding):
    pads = padding if padding == "SAME" else [(padding, padding)] * 2
    channels = images.shape[-1]
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), pads, dimension_numbers=DIMENSIONS, feature_group_count=channels
    )


@pytest.mark.parametrize("padding", ["SAME", 0, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("window", [3, 5])
def test_depthwise_equals_grouped(window, stride, padding):
    images, kernel = operands(window=window)
    want = reference(images, kernel, stride=stride, padding=padding)
    got = conv2d(images, kernel, stride=stride, padding=padding)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_depthwise_gradients_under_scan_and_vmap():
    images, kernel = operands()

    def loss(conv):
        return lambda images, kernel: jnp.sin(conv(images, kernel, stride=2, padding="SAME")).sum()

    def scanned(conv):
        per_image = jax.vmap(jax.grad(loss(conv), argnums=(0, 1)), in_axes=(0, None))
        return lax.scan(lambda _, batch: (0, per_image(batch[:, None], kernel)), 0, jnp.stack([images, -images]))[1]

    for got, want in zip(scanned(conv2d), scanned(reference), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_depthwise_exports_with_a_symbolic_batch_and_no_grouped_convolution():
    images, kernel = operands(batch=3)

    @jax.jit
    def depthwise(images, kernel):
        return conv2d(images, kernel, stride=2, padding="SAME")

    (batch,) = export.symbolic_shape("n")
    shapes = [jax.ShapeDtypeStruct((batch, *images.shape[1:]), jnp.float32), jax.ShapeDtypeStruct(kernel.shape, "f4")]
    exported = export.export(depthwise, platforms=["cpu"])(*shapes)
    assert "stablehlo.convolution" not in exported.mlir_module()
    want = reference(images, kernel, stride=2, padding="SAME")
    np.testing.assert_allclose(exported.call(images, kernel), want, atol=1e-5)


def test_other_platforms_get_the_grouped_convolution():
    images, kernel = operands()
    text = export.export(jax.jit(conv2d), platforms=["cuda"])(images, kernel).mlir_module()
    assert "feature_group_count = 6" in text


def test_full_convolution_pads_as_asked():
    images = np.ones((1, 8, 8, 2), np.float32)
    kernel = np.ones((3, 3, 2, 5), np.float32)
    assert conv2d(images, kernel, stride=2, padding=1).shape == (1, 4, 4, 5)
    # "SAME" puts the odd zero at the bottom and right, 1 puts one on each side.
    assert conv2d(images, kernel, stride=2, padding="SAME")[0, 0, 0, 0] == 18
    assert conv2d(images, kernel, stride=2, padding=1)[0, 0, 0, 0] == 8


def test_bfloat16_is_summed_in_float32():
    images, kernel = (operand.astype(jnp.bfloat16) for operand in operands(window=5))
    got = conv2d(images, kernel, padding=2)
    want = reference(images.astype(np.float32), kernel.astype(np.float32), stride=1, padding=2)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (15, 11)])
def test_full_3x3_convolution_and_its_gradients_equal_xlas(size):
    """Relative to the largest value, as rounding is; sides that are odd, and a batch that no part divides."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, *size, 64)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 64, 72)).astype(np.float32)
    slope = rng.normal(size=(3, *size, 72)).astype(np.float32)

    def plain(images, kernel):
        return lax.conv_general_dilated(
            images, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=DIMENSIONS, precision="highest"
        )

    text = jax.jit(lambda x, k: conv2d(x, k, padding=1)).lower(images, kernel).as_text()
    assert "stablehlo.convolution" not in text
    (want, back), (got, our_back) = (
        jax.vjp(f, images, kernel) for f in (plain, lambda x, k: conv2d(x, k, stride=1, padding=1))
    )
    for ours, theirs in zip((got, *our_back(slope)), (want, *back(slope)), strict=True):
        assert np.abs(ours - theirs).max() < 2e-6 * np.abs(theirs).max()


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_and_its_gradients_equal_flaxs(train):
    import flax.linen as nn

    from jaxcats.models.conv import BatchNorm

    rng = np.random.default_rng(0)
    images = rng.normal(3, 2, size=(4, 7, 9, 6)).astype(np.float32)
    ours = BatchNorm()
    theirs = nn.BatchNorm(use_running_average=not train, momentum=0.9, use_fast_variance=False)
    variables = {
        "params": {"scale": jnp.linspace(0.5, 2, 6), "bias": jnp.linspace(-1, 1, 6)},
        "batch_stats": {"mean": jnp.linspace(2, 4, 6), "var": jnp.linspace(1, 5, 6)},
    }

    def loss(apply):
        def value(variables, images):
            out, new = apply(variables, images)
            return jnp.sin(out).sum(), (out, new)

        return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)

    got = loss(lambda v, x: ours.apply(v, x, train=train, mutable=["batch_stats"]))(variables, images)
    want = loss(lambda v, x: theirs.apply(v, x, mutable=["batch_stats"]))(variables, images)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
