"""ResNet 18, 34, 50, 101 and 152, equal to torchvision's (He et al. 2015; the stride on the 3x3 of the bottleneck)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcats.models.conv import ConvNorm

FIRST_GROUP = ("stem", "layer1", "layer2")


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or as a bottleneck 1x1, 3x3, 1x1 with four times the width going out."""

    width: int
    stride: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, images, *, train: bool):
        features = self.width * 4 if self.bottleneck else self.width
        if self.bottleneck:
            convs = [(self.width, 1, 1), (self.width, 3, self.stride), (features, 1, 1)]
        else:
            convs = [(features, 3, self.stride), (features, 3, 1)]
        x = images
        for number, (width, window, stride) in enumerate(convs, start=1):
            conv = ConvNorm(width, window, stride, window // 2, dtype=self.dtype, name=f"conv{number}")
            x = conv(x, train=train)
            if number < len(convs):
                x = nn.relu(x)
        shortcut = images
        if self.stride != 1 or images.shape[-1] != features:
            shortcut = ConvNorm(features, 1, self.stride, dtype=self.dtype, name="shortcut")(images, train=train)
        return nn.relu(x + shortcut)


class Stage(nn.Module):
    """Blocks of one width; the first one has the stride."""

    blocks: int
    width: int
    stride: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, *, train: bool):
        for number in range(self.blocks):
            stride = self.stride if number == 0 else 1
            x = Block(self.width, stride, self.bottleneck, self.dtype, name=f"block{number}")(x, train=train)
        return x


class ResNet(nn.Module):
    """The network up to its last feature map: images [N,H,W,channels] to [N,H/32,W/32,512 or 2048]."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        # Explicit (1, 1): XLA's "SAME" pads (0, 1) at stride 2.
        x = nn.relu(ConvNorm(64, 7, 2, 3, dtype=self.dtype, name="stem")(images, train=train))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]  (declared as str, takes pairs)
        for number, blocks in enumerate(self.blocks):
            stride, width = (1 if number == 0 else 2), 64 * 2**number
            x = Stage(blocks, width, stride, self.bottleneck, self.dtype, name=f"layer{number + 1}")(x, train=train)
        return x


def torch_module(path: tuple[str, ...]) -> str:
    """The name of torchvision's module for ours, such as ("layer1", "block0", "conv2", "bn") -> "layer1.0.bn2"."""
    kind = path[-1]
    if path[0] == "stem":
        return f"{kind}1"
    layer, block, unit = path[:3]
    prefix = f"{layer}.{block.removeprefix('block')}"
    if unit == "shortcut":
        return f"{prefix}.downsample.{0 if kind == 'conv' else 1}"
    return f"{prefix}.{kind}{unit.removeprefix('conv')}"
