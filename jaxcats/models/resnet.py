"""ResNet 18, 34, 50, 101 and 152 (He et al. 2015, arXiv:1512.03385), equal to torchvision's.

As there, a bottleneck has its stride on the 3x3 convolution and not on the first 1x1.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcats.models.conv import ConvNorm, Stage

FIRST_GROUP = ("stem", "layer1", "layer2")


class Block(nn.Module):
    """A residual block: two 3x3 convolutions; or a bottleneck, 1x1, 3x3 and 1x1, whose output has four times the width."""

    width: int
    stride: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, images, *, train: bool):
        def conv_norm(x, features: int, window: int, stride: int, name: str):
            return ConvNorm(features, window, stride, window // 2, dtype=self.dtype, name=name)(x, train=train)

        features = 4 * self.width if self.bottleneck else self.width
        if self.bottleneck:
            x = nn.relu(conv_norm(images, self.width, 1, 1, "conv1"))
            x = nn.relu(conv_norm(x, self.width, 3, self.stride, "conv2"))
            x = conv_norm(x, features, 1, 1, "conv3")
        else:
            x = nn.relu(conv_norm(images, features, 3, self.stride, "conv1"))
            x = conv_norm(x, features, 3, 1, "conv2")
        shortcut = images
        if self.stride != 1 or images.shape[-1] != features:
            shortcut = conv_norm(images, features, 1, self.stride, "shortcut")
        return nn.relu(x + shortcut)


class ResNet(nn.Module):
    """The network up to its last feature map: images [N,H,W,channels] to [N,H/32,W/32,512], or 2048 with bottlenecks."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        # Explicit (1, 1): XLA's "SAME" pads (0, 1) at stride 2.
        x = nn.relu(ConvNorm(64, 7, 2, 3, dtype=self.dtype, name="stem")(images, train=train))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]  (declared as str, takes pairs)
        for number, blocks in enumerate(self.blocks):
            block = partial(Block, 64 * 2**number, bottleneck=self.bottleneck, dtype=self.dtype)
            x = Stage(block, blocks, 1 if number == 0 else 2, name=f"layer{number + 1}")(x, train=train)
        return x


def torch_module(path: tuple[str, ...]) -> str:
    """Torchvision's name of one of our modules: ("layer1", "block0", "conv2", "bn") -> "layer1.0.bn2"."""
    kind = path[-1]
    if path[0] == "stem":
        return f"{kind}1"
    layer, block, unit = path[:3]
    prefix = f"{layer}.{block.removeprefix('block')}"
    if unit == "shortcut":
        return f"{prefix}.downsample.{0 if kind == 'conv' else 1}"
    return f"{prefix}.{kind}{unit.removeprefix('conv')}"
