"""Operations that XLA computes slowly on CPU, written so that it computes them fast; other platforms get the plain ones.

Three kernels, each explained above its code: depthwise convolution as shifted multiply-adds, 3x3 convolution by
Winograd's method, and BatchNorm with its gradient. `conv` uses them and chooses where. The speeds that the explanations
give were measured on AVX-512 cores.

`lax.optimization_barrier` is used wherever a result must be computed once and kept in memory: XLA otherwise computes it
again inside each operation that uses it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]
Grid = list[list[Any]]  # rows of arrays


# --- depthwise convolution ---
#
# XLA computes it as a grouped convolution, 10 to 38 times slower than shifting, multiplying and adding. Here a k x k
# window is k x k copies of the images, each shifted to one place of the window and multiplied by the weights [C] of
# that place; XLA makes one loop of all of them. It adds in another order than XLA's convolution does, so the results
# differ by rounding (1e-5 at values around 1); bfloat16 is added in float32.
# Two gradients: that of the images is the same convolution with the window turned around, over gradients that are
# spread by the stride; that of the weights is, for each place of the window, a sum over all pixels.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def shifted_depthwise(images: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """Depthwise convolution of images [N,H,W,C] with a kernel [k,k,1,C]. For CPU."""
    window = kernel.shape[0]
    padded = jnp.pad(images, [(0, 0), *pads, (0, 0)])
    wide = jnp.promote_types(images.dtype, jnp.float32)
    height, width = ((n - window) // stride + 1 for n in padded.shape[1:3])
    total: Any = None
    for row in range(window):
        for column in range(window):
            term = _slice(padded, (row, column), (height, width), (stride, stride)).astype(wide)
            term = term * kernel[row, column, 0].astype(wide)
            total = term if total is None else total + term
    return total.astype(images.dtype)


def _depthwise_forward(images, kernel, stride, pads):
    images = lax.optimization_barrier(images)
    return lax.optimization_barrier(shifted_depthwise(images, kernel, stride, pads)), (images, kernel)


def _depthwise_backward(stride, pads, residuals, gradient):
    images, kernel = residuals
    gradient = lax.optimization_barrier(gradient)
    window, edges = kernel.shape[0], []
    for size, count, (before, _) in zip(images.shape[1:3], gradient.shape[1:3], pads, strict=True):
        first = window - 1 - before
        edges.append((first, size + window - 1 - first - ((count - 1) * stride + 1), stride - 1))
    spread = lax.pad(gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    images_gradient = shifted_depthwise(spread, kernel[::-1, ::-1], 1, ((0, 0), (0, 0)))

    # The weights' gradient takes one image at a time: the k x k passes over it then find it in the processor's cache.
    height, width = gradient.shape[1:3]
    wide = jnp.promote_types(images.dtype, jnp.float32)
    padded = lax.optimization_barrier(jnp.pad(images, [(0, 0), *pads, (0, 0)]))
    block = _block_size(height)

    def add_image(total, pair):
        image, slope = (x[None].astype(wide) for x in pair)

        def at(row: int, column: int) -> jax.Array:
            starts = [(row + i * stride, column) for i in range(block)]
            rows = [_slice(image, start, (height // block, width), (block * stride, stride)) for start in starts]
            return _sum_pixels([x * slope[:, i::block] for i, x in enumerate(rows)])

        return total + jnp.stack([at(row, column) for row in range(window) for column in range(window)]), None

    start = jnp.zeros((window * window, kernel.shape[-1]), wide)
    kernel_gradient = lax.scan(add_image, start, (padded, gradient))[0].reshape(kernel.shape).astype(kernel.dtype)
    return lax.optimization_barrier(images_gradient), kernel_gradient


shifted_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


# --- 3x3 convolution ---
#
# XLA's multiplies 2.25 times as often as it needs to. This is F(2x2, 3x3) of Lavin and Gray, arXiv:1509.09308: a tile
# of 2x2 results comes from a tile of 4x4 pixels by 16 products, where a plain convolution takes 36. Tiles, kernel and
# products are transformed along rows and along columns by sums of two or three terms; the 16 products are 16 matrix
# products over all tiles. The result differs from the plain convolution by some 6e-7 of the largest value.
# Two gradients: that of the images is the same convolution with the kernel turned around; that of the kernel takes the
# same tiles, and the transposes of the transforms.


@jax.custom_vjp
def winograd(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve images [N,H,W,C] with a kernel [3,3,C,F], float32, stride 1 and padding 1. For CPU."""
    n, height, width, channels = images.shape
    weights = _along_both_axes(_transform_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])
    tiles = _along_both_axes(_transform_tile, _tiles(images, size=4, before=1))

    def multiply(tile: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.dot(tile.reshape(-1, channels), weight, precision=lax.Precision.HIGHEST)

    results = _along_both_axes(_transform_products, jax.tree.map(multiply, tiles, weights))
    rows, columns = -(-height // 2), -(-width // 2)
    results = jax.tree.map(lambda x: x.reshape(n, rows, columns, -1), results)
    whole = jnp.stack([jnp.stack(row, axis=3) for row in results], axis=2)  # [N, rows, 2, columns, 2, F]
    return whole.reshape(n, 2 * rows, 2 * columns, -1)[:, :height, :width]


def _tiles(images: jax.Array, *, size: int, before: int) -> Grid:
    """The tiles of size x size pixels that begin at every second pixel, the first one `before` the images' corner.

    Returns:
        For each place in a tile, an array [N, ceil(H/2), ceil(W/2), C].
    """
    rows, columns = (-(-side // 2) for side in images.shape[1:3])
    ends = (2 * n + size - 2 - before - side for n, side in zip((rows, columns), images.shape[1:3], strict=True))
    padded = jnp.pad(images, [(0, 0), *((before, end) for end in ends), (0, 0)])
    return [[_slice(padded, (i, j), (rows, columns), (2, 2)) for j in range(size)] for i in range(size)]


def _winograd_backward(residuals, gradient):
    images, kernel = residuals
    gradient = lax.optimization_barrier(gradient)
    images_gradient = winograd(gradient, kernel[::-1, ::-1].swapaxes(2, 3))

    def sum_products(x: jax.Array, y: jax.Array) -> jax.Array:
        """The sum over all tiles of the products of each channel of x with each of y: [C,F]."""
        x, y = (array.reshape(-1, array.shape[-1]) for array in (x, y))
        return lax.dot_general(x, y, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)

    def add_part(total, pair):
        some_images, some_gradient = pair
        tiles = _along_both_axes(_transform_tile, _tiles(some_images, size=4, before=1))
        slopes = _along_both_axes(_transform_slopes, _tiles(some_gradient, size=2, before=0))
        return jax.tree.map(jnp.add, total, jax.tree.map(sum_products, tiles, slopes)), None

    part = next(k for k in (8, 4, 2, 1) if len(images) % k == 0)  # images, which fit into the processor's cache
    parts = tuple(x.reshape(-1, part, *x.shape[1:]) for x in (images, gradient))
    start = [[jnp.zeros(kernel.shape[2:])] * 4] * 4
    products = lax.scan(add_part, start, parts)[0]  # the gradient of the transformed kernel
    kernel_gradient = _along_both_axes(_transform_products_to_kernel, products)
    return images_gradient, jnp.stack([jnp.stack(row) for row in kernel_gradient])


def _along_both_axes(transform: Callable[[list], list], grid: Grid) -> Grid:
    """A grid of arrays, transformed along its columns and then along its rows."""
    columns = [transform(list(column)) for column in zip(*grid, strict=True)]
    return [transform(list(row)) for row in zip(*columns, strict=True)]


# The transforms, which the paper calls B, G and A; those of the gradient are the transposes of A and G.
def _transform_tile(d: list) -> list:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _transform_kernel(g: list) -> list:
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _transform_products(m: list) -> list:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _transform_slopes(y: list) -> list:
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _transform_products_to_kernel(m: list) -> list:
    return [m[0] + (m[1] + m[2]) / 2, (m[1] - m[2]) / 2, (m[1] + m[2]) / 2 + m[3]]


winograd.defvjp(lambda images, kernel: (winograd(images, kernel), (images, kernel)), _winograd_backward)


# --- BatchNorm ---
#
# XLA sums over pixels on one core, eight times slower than it takes to read the memory, and a BatchNorm and its
# gradient need four such sums. `_channel_sums` adds neighbouring pixels elementwise, which all cores do, and sums what
# is left by a matrix product with ones. It adds in another order than a plain sum does, so the results differ by
# rounding (relative 1e-5 or less). The gradient is written out because JAX's own would sum more often.


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, averages: tuple | None, epsilon: float):
    """BatchNorm of x [..., C] (Ioffe and Szegedy, arXiv:1502.03167).

    Args:
        scale, bias: [C].
        averages: the stored (mean, variance), [C] each; None for those of x.

    Returns:
        (normalised x, mean, variance); no gradient flows through the last two.
    """
    if averages:
        mean, variance = averages
    else:
        # The fast variance E[x^2] - E[x]^2 would lose digits when the mean is large, as it is after max pooling.
        count = x.size // x.shape[-1]
        mean = _channel_sums(x) / count
        variance = _channel_sums(jnp.square(x - mean)) / count
    return (x - mean) * (lax.rsqrt(variance + epsilon) * scale) + bias, mean, variance


def _normalise_forward(x, scale, bias, averages, epsilon):
    x = _compute_once(x)
    out: Any = normalise(x, scale, bias, averages, epsilon)
    return out, (x, scale, averages, *out[1:])


def _normalise_backward(epsilon, residuals, gradients):
    x, scale, averages, mean, variance = residuals
    gradient, count = _compute_once(gradients[0]), x.size // x.shape[-1]
    inverse = lax.rsqrt(variance + epsilon)
    bias_gradient = _channel_sums(gradient)
    scale_gradient = _channel_sums(gradient * (x - mean)) * inverse
    if averages:
        mean_gradient = -scale * inverse * bias_gradient
        averages_gradient = mean_gradient, -0.5 * scale * jnp.square(inverse) * scale_gradient
        return scale * inverse * gradient, scale_gradient, bias_gradient, averages_gradient
    x_gradient = scale * inverse * (gradient - bias_gradient / count - (x - mean) * (inverse * scale_gradient / count))
    return _compute_once(x_gradient), scale_gradient, bias_gradient, None


normalise.defvjp(_normalise_forward, _normalise_backward)


def _channel_sums(x: jax.Array) -> jax.Array:
    """Sums of [..., C] over all but the last axis: [C]."""

    def blocked(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        block = _block_size(len(rows))
        blocks = rows.reshape(-1, block, x.shape[-1])
        return _sum_pixels([blocks[:, i] for i in range(block)])

    return lax.platform_dependent(x, cpu=blocked, default=lambda x: x.sum(tuple(range(x.ndim - 1))))


def _compute_once(x: jax.Array) -> jax.Array:
    """`x`, on CPU behind a barrier; on other platforms XLA decides."""
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


# --- what the kernels share ---


def _sum_pixels(terms: list[jax.Array]) -> jax.Array:
    """The sum of arrays [..., C] over the arrays and over all but the last axis: [C]."""
    total = sum(terms[1:], start=terms[0])
    total = lax.optimization_barrier(total.reshape(-1, total.shape[-1]))
    ones = jnp.ones(len(total), total.dtype)
    return lax.dot_general(ones, total, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _block_size(n: int) -> int:
    """The number of neighbours that are added first: the largest divisor of n up to 8."""
    return next(k for k in range(8, 0, -1) if n % k == 0)


def _slice(images: jax.Array, start: tuple[int, int], size: tuple[int, int], step: tuple[int, int]) -> jax.Array:
    """`size` rows and columns of [N,H,W,C] from `start`, every `step`-th."""
    n, _, _, channels = images.shape
    stop = [first + (count - 1) * every + 1 for first, count, every in zip(start, size, step, strict=True)]
    return lax.slice(images, (0, *start, 0), (n, *stop, channels), (1, *step, 1))
