"""What XLA's compiler for CPU does slowly, written so that it does it fast; other platforms get the plain operation.

Measured on AVX-512 cores: a sum over pixels runs on one core, eight times slower than reading the memory takes; a
gradient that several operations use is computed again inside each; XLA's grouped convolution is 10 to 38 times slower
than shifting, multiplying and adding; its 3x3 convolution multiplies 2.25 times as often as it needs to.
"""

from collections.abc import Callable
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
    height, width = ((n - window) // stride + 1 for n in padded.shape[1:3])
    total: Any = None
    for row in range(window):
        for column in range(window):
            term = _window(padded, (row, column), (height, width), (stride, stride)).astype(wide)
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
    """Gradient of the kernel. One image at a time: k x k passes over it, which the processor's cache then holds."""
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


@jax.custom_vjp
def winograd(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution with stride 1 and padding 1, images [N,H,W,C] and kernel [3,3,C,F], float32. For CPU.

    F(2x2, 3x3) of Lavin and Gray, arXiv:1509.09308: each 2x2 of the result comes from a 4x4 of the images by 16
    products where there would be 36; its error is some 6e-7 of the largest result.
    """
    n, height, width, channels = images.shape
    weights = _both_axes(_of_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])
    products = [
        [jnp.dot(x.reshape(-1, channels), w, precision=lax.Precision.HIGHEST) for x, w in zip(*pair, strict=True)]
        for pair in zip(_tiles(images), weights, strict=True)
    ]
    rows, columns = -(-height // 2), -(-width // 2)
    quarters = [[x.reshape(n, rows, columns, -1) for x in row] for row in _both_axes(_of_products, products)]
    whole = jnp.stack([jnp.stack(row, axis=3) for row in quarters], axis=2)  # [N, rows, 2, columns, 2, F]
    return whole.reshape(n, 2 * rows, 2 * columns, -1)[:, :height, :width]


def _tiles(images: jax.Array) -> list[list[jax.Array]]:
    """The 4x4 tiles that overlap by two, transformed: 4 x 4 arrays [N, ceil(H/2), ceil(W/2), C]."""
    rows, columns = (-(-size // 2) for size in images.shape[1:3])
    after = (2 * count + 1 - size for count, size in zip((rows, columns), images.shape[1:3], strict=True))
    padded = jnp.pad(images, [(0, 0), *((1, more) for more in after), (0, 0)])
    return _both_axes(
        _of_tile, [[_window(padded, (i, j), (rows, columns), (2, 2)) for j in range(4)] for i in range(4)]
    )


def _both_axes(transform: Callable[[list], list], grid: list[list[Any]]) -> list[list[Any]]:
    """A grid of arrays, transformed along its rows and along its columns."""
    along_columns = [transform(list(column)) for column in zip(*grid, strict=True)]
    return [transform(list(row)) for row in zip(*along_columns, strict=True)]


def _of_tile(d: list) -> list:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _of_kernel(g: list) -> list:
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _of_products(m: list) -> list:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _winograd_backward(kept, gradient):
    images, kernel = kept
    gradient = lax.optimization_barrier(gradient)
    of_images = winograd(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    part = next(k for k in (8, 4, 2, 1) if len(images) % k == 0)  # images, that the processor's cache holds

    def add(total, some):
        return jax.tree.map(jnp.add, total, _tile_products(*some)), None

    start = [[jnp.zeros(kernel.shape[2:])] * 4] * 4
    some = tuple(x.reshape(-1, part, *x.shape[1:]) for x in (images, gradient))
    products = lax.scan(add, start, some)[0]
    return of_images, jnp.stack([jnp.stack(row) for row in _both_axes(_from_kernel, products)])


def _tile_products(images: jax.Array, gradient: jax.Array) -> list[list[jax.Array]]:
    """The gradient of the transformed kernel: 4 x 4 arrays [C,F]."""
    rows, columns = (-(-size // 2) for size in gradient.shape[1:3])
    after = (2 * count - size for count, size in zip((rows, columns), gradient.shape[1:3], strict=True))
    padded = jnp.pad(gradient, [(0, 0), *((0, more) for more in after), (0, 0)])
    slopes = [[_window(padded, (i, j), (rows, columns), (2, 2)) for j in range(2)] for i in range(2)]
    return [
        [_over_pixels(x, y) for x, y in zip(*pair, strict=True)]
        for pair in zip(_tiles(images), _both_axes(_from_products, slopes), strict=True)
    ]


def _over_pixels(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums over pixels of products of channels: [..., C] and [..., F] to [C, F]."""
    x, y = (array.reshape(-1, array.shape[-1]) for array in (x, y))
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _from_products(y: list) -> list:
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _from_kernel(m: list) -> list:
    return [m[0] + (m[1] + m[2]) / 2, (m[1] - m[2]) / 2, (m[1] + m[2]) / 2 + m[3]]


winograd.defvjp(lambda images, kernel: (winograd(images, kernel), (images, kernel)), _winograd_backward)


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
    out: Any = normalise(x, scale, bias, averages, epsilon)
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
