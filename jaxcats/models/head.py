"""Pooling and the classifiers that stand on pooled features; always computed in float32, where they cost nothing."""

import flax.linen as nn
import jax
import jax.numpy as jnp

HEADS = ("lesson", "linear", "classifier")

# torch's kaiming_normal_: a plain, not a truncated, normal with variance 2 / inputs.
_kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def pool(feature_map: jax.Array, *, head: str) -> jax.Array:
    """Features [N,F] of a feature map [N,h,w,C]: maximum then average for the lesson's head (F = 2C), else average."""
    feature_map = feature_map.astype(jnp.float32)
    average = feature_map.mean((1, 2))
    return jnp.concatenate([feature_map.max((1, 2)), average], axis=-1) if head == "lesson" else average


def _uniform(inputs: int):
    """torch's nn.Linear: weights and biases uniform within 1 / sqrt(inputs)."""
    bound = inputs**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class LessonHead(nn.Module):
    """The head of fast.ai's lesson: BN, dropout .25, 512 units, ReLU, BN, dropout .5, classes."""

    num_classes: int

    @nn.compact
    def __call__(self, features, *, train: bool):
        x = features
        for number, (units, rate) in enumerate(((512, 0.25), (self.num_classes, 0.5)), start=1):
            norm = nn.BatchNorm(
                use_running_average=not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, name=f"bn{number}"
            )
            x = nn.Dropout(rate, deterministic=not train)(norm(x))
            x = nn.Dense(units, precision="highest", kernel_init=_kaiming, name=f"dense{number}")(x)
            x = nn.relu(x) if number == 1 else x
        return x


class LinearHead(nn.Module):
    """One dense layer, after dropout where the published network has it."""

    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, features, *, train: bool):
        init = _uniform(features.shape[-1])
        x = nn.Dropout(self.dropout, deterministic=not train)(features)
        return nn.Dense(self.num_classes, precision="highest", kernel_init=init, bias_init=init, name="dense")(x)
