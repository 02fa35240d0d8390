"""EfficientNet-Lite0: EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946) without squeeze-and-excitation, with ReLU6.

Google published the Lite networks in TensorFlow's TPU models in 2020. This one equals that of the Python package
efficientnet_lite_pytorch, built for the image's size: TensorFlow's "SAME" padding, BatchNorm with momentum 0.99 and
epsilon 1e-3. It leaves out drop-connect (stochastic depth), which that package applies in training.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcats.models.conv import ConvNorm, Stage

CHANNELS = 1280
# Of each stage: repeats of its block, window, stride of the first block, expansion, features.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
FIRST_GROUP = ("stem", "stage1", "stage2", "stage3")  # down to stride 8
# The reference numbers its blocks through all stages: the number of each stage's first block.
_FIRST_BLOCK = {f"stage{n + 1}": sum(stage[0] for stage in STAGES[:n]) for n in range(len(STAGES))}
# The reference's names of our pairs of convolution and BatchNorm.
_TORCH_UNITS = {
    "stem": ("_conv_stem", "_bn0"),
    "tail": ("_conv_head", "_bn1"),
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}


class Block(nn.Module):
    """An inverted bottleneck: expand 1x1, depthwise, project 1x1, plus the input where the shapes agree."""

    features: int
    window: int
    stride: int
    expansion: int
    dtype: Any

    @nn.compact
    def __call__(self, images, *, train: bool):
        channels = images.shape[-1]
        expanded = channels * self.expansion
        x = images
        if self.expansion != 1:
            x = nn.relu6(_conv_norm("expand", expanded, dtype=self.dtype)(images, train=train))
        depthwise = _conv_norm("depthwise", expanded, self.window, self.stride, depthwise=True, dtype=self.dtype)
        x = nn.relu6(depthwise(x, train=train))
        x = _conv_norm("project", self.features, dtype=self.dtype)(x, train=train)
        return x + images if self.stride == 1 and channels == self.features else x


class EfficientNetLite0(nn.Module):
    """The network up to its last feature map: images [N,H,W,3] to [N,H/32,W/32,1280]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        x = nn.relu6(_conv_norm("stem", 32, 3, 2, dtype=self.dtype)(images, train=train))
        for number, (repeats, window, stride, expansion, features) in enumerate(STAGES, start=1):
            block = partial(Block, features, window, expansion=expansion, dtype=self.dtype)
            x = Stage(block, repeats, stride, name=f"stage{number}")(x, train=train)
        return nn.relu6(_conv_norm("tail", CHANNELS, dtype=self.dtype)(x, train=train))


def _conv_norm(name: str, features: int, window: int = 1, stride: int = 1, *, depthwise: bool = False, dtype: Any):
    return ConvNorm(features, window, stride, "SAME", depthwise, momentum=0.99, epsilon=1e-3, dtype=dtype, name=name)


def torch_module(path: tuple[str, ...]) -> str:
    """The reference's name of one of our modules: ("stage2", "block1", "expand", "bn") -> "_blocks.2._bn0"."""
    *place, unit, kind = path
    module = _TORCH_UNITS[unit][0 if kind == "conv" else 1]
    if place:
        stage, block = place
        return f"_blocks.{_FIRST_BLOCK[stage] + int(block.removeprefix('block'))}.{module}"
    return module
