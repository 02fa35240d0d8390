"""Pooling and the heads that classify pooled features; always in float32, where they cost almost nothing."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

HEADS = ("lesson", "linear", "classifier")

# torch's kaiming_normal_: a plain, not a truncated, normal with variance 2 / inputs.
_kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def pool(feature_map: jax.Array, *, head: str) -> jax.Array:
    """Features [N,F] of a feature map [N,h,w,C]: its maximum and average for the lesson's head (F = 2C), else its average."""
    feature_map = feature_map.astype(jnp.float32)
    average = feature_map.mean((1, 2))
    return jnp.concatenate([feature_map.max((1, 2)), average], axis=-1) if head == "lesson" else average


class LessonHead(nn.Module):
    """The head of fast.ai's lesson: BN, dropout 0.25, 512 units, ReLU, BN, dropout 0.5, classes."""

    num_classes: int

    @nn.compact
    def __call__(self, features, *, train: bool):
        norm = partial(nn.BatchNorm, not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False)
        dense = partial(nn.Dense, precision="highest", kernel_init=_kaiming)
        x = nn.Dropout(0.25, deterministic=not train)(norm(name="bn1")(features))
        x = nn.relu(dense(512, name="dense1")(x))
        x = nn.Dropout(0.5, deterministic=not train)(norm(name="bn2")(x))
        return dense(self.num_classes, name="dense2")(x)


class LinearHead(nn.Module):
    """One dense layer, after dropout where the published network has it."""

    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, features, *, train: bool):
        bound = features.shape[-1] ** -0.5  # as torch's nn.Linear: weights and biases uniform within 1 / sqrt(inputs)

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        x = nn.Dropout(self.dropout, deterministic=not train)(features)
        return nn.Dense(self.num_classes, precision="highest", kernel_init=uniform, bias_init=uniform, name="dense")(x)
