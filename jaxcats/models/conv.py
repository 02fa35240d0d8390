"""Convolution: the one place that chooses how it is computed, and the convolution-BatchNorm pair that networks use."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

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
    symbolic batch size.
    """
    channels, window = images.shape[-1], kernel.shape[0]
    pads = [_pads(size, window=window, stride=stride, padding=padding) for size in images.shape[1:3]]
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
        return _shifted_depthwise(images, kernel, stride=stride, pads=pads)

    # Half-size floats are asked for by dtype; float32 must not become TF32 on a GPU behind the user's back.
    precision = lax.Precision.HIGHEST if images.dtype == jnp.float32 else None
    if window == 1 and not any(any(p) for p in pads):
        # A matrix product is up to six times faster than XLA's 1x1 convolution on CPU, and its gradients are products too.
        return lax.dot_general(
            images[:, ::stride, ::stride], kernel[0, 0], (((3,), (0,)), ((), ())), precision=precision
        )
    if not depthwise:
        return xla(images, kernel)
    # XLA's grouped convolution on CPU is 10 to 38 times slower than shifting, multiplying and adding.
    return lax.platform_dependent(images, kernel, cpu=shifted, default=xla)


def _pads(size: int, *, window: int, stride: int, padding: Padding) -> tuple[int, int]:
    if padding != "SAME":
        return int(padding), int(padding)
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def _shifted_depthwise(images, kernel, *, stride: int, pads) -> jax.Array:
    """Depthwise convolution as k x k shifted copies, each multiplied by one row of weights [C], added in float32."""
    window = kernel.shape[0]
    padded = jnp.pad(images, [(0, 0), *pads, (0, 0)])
    n, height, width, channels = padded.shape
    reach_h, reach_w = height - window, width - window  # how far the window can move
    total: Any = None
    for row in range(window):
        for column in range(window):
            start = (0, row, column, 0)
            stop = (n, row + reach_h + 1, column + reach_w + 1, channels)
            term = lax.slice(padded, start, stop, (1, stride, stride, 1)).astype(jnp.float32)
            term = term * kernel[row, column, 0].astype(jnp.float32)
            total = term if total is None else total + term
    return total.astype(images.dtype)


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
        images, kernel = images.astype(self.dtype), kernel.astype(self.dtype)
        return conv2d(images, kernel, stride=self.stride, padding=self.padding)


def batch_norm(*, train: bool, momentum: float, epsilon: float, dtype: Any, name: str) -> nn.BatchNorm:
    """BatchNorm with float32 statistics and arithmetic, its result in `dtype`.

    Flax's momentum is one minus torch's, and Flax averages the batch's biased variance where torch averages the
    unbiased one (n / (n - 1) times as large): the running variances differ by that factor's share, by definition.
    """
    # The fast variance E[x^2] - E[x]^2 loses digits when the mean is large, as it is after max pooling.
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=momentum,
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=jnp.float32,
        use_fast_variance=False,
        name=name,
    )


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
        norm = batch_norm(train=train, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype, name="bn")
        return norm(conv(images))
