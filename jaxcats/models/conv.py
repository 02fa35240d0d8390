"""Convolution and BatchNorm as the networks use them; `conv2d` is the one place that chooses how to convolve."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxcats.models.cpu_kernels import normalise, shifted_depthwise, winograd

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
Padding = Literal["SAME"] | int

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
    pads = tuple(_pads(size, window, stride, padding) for size in images.shape[1:3])
    depthwise = kernel.shape[2] == 1 and channels > 1
    # On a GPU float32 would become TF32 by default; half-size floats are the user's own choice.
    precision = lax.Precision.HIGHEST if images.dtype == jnp.float32 else None

    def xla(images, kernel):
        options = {"feature_group_count": channels if depthwise else 1, "precision": precision}
        return lax.conv_general_dilated(images, kernel, (stride, stride), pads, dimension_numbers=DIMENSIONS, **options)

    if window == 1 and pads == ((0, 0), (0, 0)):
        # On CPU a matrix product is up to six times faster than XLA's 1x1 convolution. The pixels are one axis: with
        # three, the gradient of the weights would be a product after a transpose that takes longer than the product.
        pixels = images[:, ::stride, ::stride]
        product = jnp.dot(pixels.reshape(-1, channels), kernel[0, 0], precision=precision)
        return product.reshape(*pixels.shape[:-1], kernel.shape[-1])
    if depthwise:
        shifted = partial(shifted_depthwise, stride=stride, pads=pads)
        return lax.platform_dependent(images, kernel, cpu=shifted, default=xla)
    plain_3x3 = window == 3 and stride == 1 and pads == ((1, 1), (1, 1)) and images.dtype == jnp.float32
    if plain_3x3 and min(images.shape[1:3]) >= 8 and min(kernel.shape[2:]) >= 64:  # where Winograd is faster
        return lax.platform_dependent(images, kernel, cpu=winograd, default=xla)
    return xla(images, kernel)


def _pads(size: int, window: int, stride: int, padding: Padding) -> tuple[int, int]:
    if isinstance(padding, int):
        return padding, padding
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


class Conv(nn.Module):
    """A convolution without bias: its only parameter is `kernel` in float32, its arithmetic is in `dtype`."""

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
        if self.is_initializing():
            # Only the shape matters: tracing the arithmetic would take most of a short run's time.
            window, stride = self.window, self.stride
            padded = (size + sum(_pads(size, window, stride, self.padding)) for size in images.shape[1:3])
            sides = ((size - window) // stride + 1 for size in padded)
            return jnp.zeros((len(images), *sides, self.features), self.dtype)
        images, kernel = images.astype(self.dtype), kernel.astype(self.dtype)
        return conv2d(images, kernel, stride=self.stride, padding=self.padding)


class BatchNorm(nn.Module):
    """BatchNorm of images [N,H,W,C] with float32 statistics and arithmetic, and its result in `dtype`.

    It is flax.linen.BatchNorm with `use_fast_variance=False`. The momentum is one minus torch's. The running variance
    averages the biased variance of each batch, where torch averages the unbiased one, n / (n - 1) times as large.
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
        out, *moments = result
        if train:
            for average, moment in zip((mean, variance), moments, strict=True):
                average.value = self.momentum * average.value + (1 - self.momentum) * lax.stop_gradient(moment)
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
        shape = self.features, self.window, self.stride, self.padding
        x = Conv(*shape, depthwise=self.depthwise, dtype=self.dtype, name="conv")(images)
        return BatchNorm(self.momentum, self.epsilon, self.dtype, name="bn")(x, train=train)


class Stage(nn.Module):
    """Blocks of one width, block0, block1 and so on; the first one has the stride."""

    block: Callable[..., nn.Module]  # called with `stride` and `name`
    count: int
    stride: int

    @nn.compact
    def __call__(self, x, *, train: bool):
        for number in range(self.count):
            x = self.block(stride=self.stride if number == 0 else 1, name=f"block{number}")(x, train=train)
        return x
