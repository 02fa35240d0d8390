"""Augmentation on the device: pure JAX, keyed by seed, epoch and the picture's row, so that order and batching don't matter."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def flip(key: jax.Array) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """A function `(images [B, H, W, C], epoch, index [B]) -> images` that mirrors each picture with probability one half.

    The choice depends on (key, epoch, index) only.
    """

    def apply(images: jax.Array, epoch: jax.Array, index: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, epoch), i))(index)
        mirror = jax.vmap(jax.random.bernoulli)(keys)
        return jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)

    return apply
