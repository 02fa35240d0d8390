"""A tiny backbone for tests of logic; importing this registers it as "tiny"."""

import flax.linen as nn
import jax.numpy as jnp

from jaxcats import models


class Tiny(nn.Module):
    """Three convolutions with BatchNorm, stride 8 in all."""

    @nn.compact
    def __call__(self, x, *, train):
        for i, width in enumerate((4, 8, 8)):
            x = nn.Conv(width, (3, 3), strides=2, use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{i}")(x))
        return x.astype(jnp.float32)


models.register("tiny", models.Backbone(build=lambda dtype: Tiny(), channels=8, first_group=("conv0", "bn0"), stride=8))
