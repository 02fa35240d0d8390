"""What XLA's compiler for CPU does slowly, written so that it does it fast; other platforms get the plain operation.

Measured on AVX-512 cores: a sum over pixels runs on one core, eight times slower than reading the memory takes; a
gradient that several operations use is computed again inside each; XLA's grouped convolution is 10 to 38 times slower
than shifting, multiplying and adding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]


def materialised(x: jax.Array) -> jax.Array:
    """`x`; on CPU computed once and kept, not again inside each operation that uses it."""
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def channel_sums(x: jax.Array) -> jax.Array:
    """Sums of [..., C] over all but the last axis: [C]."""
    return lax.platform_dependent(x, cpu=_blocked_sums, default=lambda x: x.sum(tuple(range(x.ndim - 1))))


def _blocked_sums(x: jax.Array) -> jax.Array:
    """`channel_sums` as an elementwise sum of a few neighbouring pixels, which all cores do, and a matrix product."""
    rows = x.reshape(-1, x.shape[-1])
    block = _block(len(rows))
    blocks = rows.reshape(-1, block, x.shape[-1])
    return _summed([blocks[:, i] for i in range(block)])


def _block(n: int) -> int:
    """How many to add up first: a divisor of n, 8 at most."""
    return next(k for k in range(8, 0, -1) if n % k == 0)


def _summed(terms: list[jax.Array]) -> jax.Array:
    """The sum of arrays [..., C] over everything but channels: [C]."""
    total = sum(terms[1:], start=terms[0])
    total = lax.optimization_barrier(total.reshape(-1, total.shape[-1]))
    ones = jnp.ones(len(total), total.dtype)
    return lax.dot_general(ones, total, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def shifted_depthwise(images: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """Depthwise convolution, images [N,H,W,C] and kernel [k,k,1,C], as k x k shifted copies, each multiplied by one
    row of weights [C], added in float32 or better. For CPU."""
    window = kernel.shape[0]
    padded = jnp.pad(images, [(0, 0), *pads, (0, 0)])
    wide = jnp.promote_types(images.dtype, jnp.float32)
    size = tuple((n - window) // stride + 1 for n in padded.shape[1:3])
    total: Any = None
    for row in range(window):
        for column in range(window):
            term = _window(padded, (row, column), size, (stride, stride)).astype(wide)
            term = term * kernel[row, column, 0].astype(wide)
            total = term if total is None else total + term
    return total.astype(images.dtype)


def _window(images: jax.Array, start: tuple[int, int], size: tuple[int, int], step: tuple[int, int]) -> jax.Array:
    """Rows and columns of [N,H,W,C] from `start`, `size` of them, every `step`-th."""
    n, _, _, channels = images.shape
    stop = [first + (count - 1) * every + 1 for first, count, every in zip(start, size, step, strict=True)]
    return lax.slice(images, (0, *start, 0), (n, *stop, channels), (1, *step, 1))


def _depthwise_forward(images, kernel, stride, pads):
    images = lax.optimization_barrier(images)
    return lax.optimization_barrier(shifted_depthwise(images, kernel, stride, pads)), (images, kernel)


def _depthwise_backward(stride, pads, kept, gradient):
    images, kernel = kept
    gradient = lax.optimization_barrier(gradient)
    window, edges = kernel.shape[0], []
    for size, count, (before, _) in zip(images.shape[1:3], gradient.shape[1:3], pads, strict=True):
        first = window - 1 - before
        edges.append((first, size + window - 1 - first - ((count - 1) * stride + 1), stride - 1))
    spread = lax.pad(gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    of_images = shifted_depthwise(spread, kernel[::-1, ::-1], 1, ((0, 0), (0, 0)))
    return lax.optimization_barrier(of_images), _depthwise_weights(images, kernel, gradient, stride, pads)


def _depthwise_weights(images, kernel, gradient, stride, pads):
    """Gradient of the kernel. One picture at a time: k x k passes over it, which the processor's cache then holds."""
    window, (height, width) = kernel.shape[0], gradient.shape[1:3]
    wide = jnp.promote_types(images.dtype, jnp.float32)
    padded = lax.optimization_barrier(jnp.pad(images, [(0, 0), *pads, (0, 0)]))
    block = _block(height)  # rows

    def add(total, picture):
        image, slope = (x[None].astype(wide) for x in picture)

        def tap(row: int, column: int) -> jax.Array:
            starts = [(row + i * stride, column) for i in range(block)]
            near = [_window(image, s, (height // block, width), (block * stride, stride)) for s in starts]
            return _summed([x * slope[:, i::block] for i, x in enumerate(near)])

        return total + jnp.stack([tap(row, column) for row in range(window) for column in range(window)]), None

    start = jnp.zeros((window * window, kernel.shape[-1]), wide)
    return lax.scan(add, start, (padded, gradient))[0].reshape(kernel.shape).astype(kernel.dtype)


shifted_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, averages: tuple | None, epsilon: float):
    """BatchNorm of x [..., C] (Ioffe and Szegedy, arXiv:1502.03167).

    Args:
        scale, bias: [C].
        averages: (mean, variance), [C] each; None for those of x, which come back as constants.

    Returns:
        (normalised x, mean, variance).
    """
    mean, variance = averages if averages else _moments(x)
    return (x - mean) * (lax.rsqrt(variance + epsilon) * scale) + bias, mean, variance


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The fast variance E[x^2] - E[x]^2 loses digits when the mean is large, as it is after max pooling.
    count = x.size // x.shape[-1]
    mean = channel_sums(x) / count
    return mean, channel_sums(jnp.square(x - mean)) / count


def _normalise_forward(x, scale, bias, averages, epsilon):
    x = materialised(x)
    out = normalise(x, scale, bias, averages, epsilon)
    return out, (x, scale, averages, *out[1:])


def _normalise_backward(epsilon, kept, gradients):
    x, scale, averages, mean, variance = kept
    gradient, count = materialised(gradients[0]), x.size // x.shape[-1]
    inverse = lax.rsqrt(variance + epsilon)
    of_bias = channel_sums(gradient)
    of_scale = channel_sums(gradient * (x - mean)) * inverse
    if averages:
        of_mean = -scale * inverse * of_bias
        of_averages = of_mean, -0.5 * scale * jnp.square(inverse) * of_scale
        return scale * inverse * gradient, of_scale, of_bias, of_averages
    of_x = scale * inverse * (gradient - of_bias / count - (x - mean) * (inverse * of_scale / count))
    return materialised(of_x), of_scale, of_bias, None


normalise.defvjp(_normalise_forward, _normalise_backward)
