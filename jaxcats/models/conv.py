"""Convolution: the one place that chooses how it is computed, and the convolution-BatchNorm pair that networks use."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxcats.models.cpu_kernels import normalise, shifted_depthwise, winograd

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
Padding = str | int

# torchvision's kaiming_normal_(mode="fan_out").
dense_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Each output channel of a depthwise kernel sees one input channel: fan_out is the window, not window x channels.
depthwise_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal", out_axis=2, in_axis=3)


def conv2d(images: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding = 0) -> jax.Array:
    """Convolve images [N,H,W,C] with a kernel [k,k,C,F], or channel by channel with a kernel [k,k,1,C].

    `padding` is a number of zeros on each side, or "SAME" as TensorFlow means it (output size = input size / stride,
    rounded up; an odd zero goes to the bottom and right). Works under jit, grad, vmap and scan and exports with a
    symbolic batch size; depthwise and 3x3 have no forward-mode derivative (jvp).
    """
    channels, window = images.shape[-1], kernel.shape[0]
    top, left = (_pads(size, window=window, stride=stride, padding=padding) for size in images.shape[1:3])
    pads = top, left
    depthwise = kernel.shape[2] == 1 and channels > 1

    def xla(images, kernel):
        groups = channels if depthwise else 1
        return lax.conv_general_dilated(
            images,
            kernel,
            (stride, stride),
            pads,
            dimension_numbers=DIMENSIONS,
            feature_group_count=groups,
            precision=precision,
        )

    def shifted(images, kernel):
        return shifted_depthwise(images, kernel, stride, pads)

    # Half-size floats are asked for by dtype; float32 must not become TF32 on a GPU behind the user's back.
    precision = lax.Precision.HIGHEST if images.dtype == jnp.float32 else None
    if window == 1 and not any(any(p) for p in pads):
        # A matrix product is up to six times faster than XLA's 1x1 convolution on CPU. Of matrices: the weights' gradient
        # of one over three axes at once is another one after a transpose that takes longer than the product.
        pixels = images[:, ::stride, ::stride]
        product = jnp.dot(pixels.reshape(-1, channels), kernel[0, 0], precision=precision)
        return product.reshape(*pixels.shape[:-1], kernel.shape[-1])
    if not depthwise:
        plain = window == 3 and stride == 1 and pads == ((1, 1), (1, 1)) and images.dtype == jnp.float32
        if plain and min(images.shape[1:3]) >= 8 and min(kernel.shape[2:]) >= 64:  # where it is faster
            return lax.platform_dependent(images, kernel, cpu=winograd, default=xla)
        return xla(images, kernel)
    return lax.platform_dependent(images, kernel, cpu=shifted, default=xla)


def _pads(size: int, *, window: int, stride: int, padding: Padding) -> tuple[int, int]:
    if padding != "SAME":
        return int(padding), int(padding)
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


class Conv(nn.Module):
    """A convolution without bias; its only parameter is `kernel`, float32, computed in `dtype`."""

    features: int
    window: int = 3
    stride: int = 1
    padding: Padding = 0
    depthwise: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images):
        inputs = 1 if self.depthwise else images.shape[-1]
        init = depthwise_kernel_init if self.depthwise else dense_kernel_init
        kernel = self.param("kernel", init, (self.window, self.window, inputs, self.features), jnp.float32)
        if self.is_initializing():  # tracing the arithmetic would take most of a short run's time, for its shape alone
            sides = (
                (size + sum(_pads(size, window=self.window, stride=self.stride, padding=self.padding)) - self.window)
                // self.stride
                + 1
                for size in images.shape[1:3]
            )
            return jnp.zeros((len(images), *sides, self.features), self.dtype)
        images, kernel = images.astype(self.dtype), kernel.astype(self.dtype)
        return conv2d(images, kernel, stride=self.stride, padding=self.padding)


class BatchNorm(nn.Module):
    """BatchNorm of images [N,H,W,C] with float32 statistics and arithmetic, its result in `dtype`.

    As flax.linen.BatchNorm with `use_fast_variance=False`: the momentum is one minus torch's, and the batch's biased
    variance is averaged where torch averages the unbiased one (n / (n - 1) times as large), so that the running
    variances differ by that factor's share, by definition.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        wide, shape = jnp.promote_types(images.dtype, jnp.float32), images.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        if self.is_initializing():
            return images.astype(self.dtype)
        averages = None if train else (mean.value, variance.value)
        result: Any = normalise(images.astype(wide), scale, bias, averages, self.epsilon)
        out, *found = result
        if train:
            for average, now in zip((mean, variance), found, strict=True):
                average.value = self.momentum * average.value + (1 - self.momentum) * lax.stop_gradient(now)
        return out.astype(self.dtype)


class ConvNorm(nn.Module):
    """A convolution and its BatchNorm: parameters `conv/kernel`, `bn/scale`, `bn/bias`."""

    features: int
    window: int = 3
    stride: int = 1
    padding: Padding = 0
    depthwise: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        conv = Conv(
            self.features, self.window, self.stride, self.padding, self.depthwise, dtype=self.dtype, name="conv"
        )
        norm = BatchNorm(self.momentum, self.epsilon, self.dtype, name="bn")
        return norm(conv(images), train=train)
