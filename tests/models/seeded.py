"""What the tests of models/ and scripts/make_golden.py share: seeded weights and images, and a network of one layer."""

import zlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxcats import models
from jaxcats.models.conv import ConvNorm

SHAPE = (2, 71, 66, 3)  # odd, even and not square, so that paddings can't agree by luck
TINY = "tiny_test_network"
TINY_SHAPES = {
    "net.conv.weight": (4, 3, 5, 5),
    "net.bn.weight": (4,),
    "net.bn.bias": (4,),
    "net.bn.running_mean": (4,),
    "net.bn.running_var": (4,),
    "out.weight": (3, 4),
    "out.bias": (3,),
}


def seeded_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A state dict in torch's names and layout; each array depends on its name and shape alone."""
    return {name: _seeded(name, shape) for name, shape in sorted(shapes.items()) if "num_batches" not in name}


def _seeded(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) > 1:
        fan_in = int(np.prod(shape[1:]))
        array = rng.normal(0, np.sqrt(2 / fan_in), shape)
    elif name.endswith(("weight", "running_var")):
        array = rng.uniform(0.4, 1.2, shape)
    else:
        array = rng.normal(0, 0.2, shape)
    return array.astype(np.float32)


def images(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def torch_shapes(model: models.Model) -> dict[str, tuple[int, ...]]:
    """Names and shapes, in torch's terms, of everything that a network's weight file holds."""
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), models.shapes(model))
    return {name: array.shape for name, array in models.to_state_dict(model, *empty).items()}


class Tiny(nn.Module):
    """One convolution, BatchNorm and ReLU."""

    dtype: Any

    @nn.compact
    def __call__(self, x, *, train: bool):
        return nn.relu(ConvNorm(4, 5, 4, 2, dtype=self.dtype, name="net")(x, train=train))


def register_tiny() -> str:
    """Register the network of one layer, whose file has the tensors of TINY_SHAPES, and give its name."""
    backbone = models.Backbone(Tiny, channels=4, first_group=("net",), classifier="out", stride=4)
    models.register(TINY, backbone)
    return TINY


# --- golden numbers ---

STEP_SHAPE = (4, 64, 64, 3)
STEP_LABELS = [3, 999, 3, 500]
STEP_LR = 0.1
STEP_TENSORS = (
    "conv1.weight",
    "bn1.running_mean",
    "bn1.running_var",
    "layer1.1.conv2.weight",
    "layer2.0.downsample.0.weight",
    "layer2.0.downsample.1.running_var",
    "layer3.0.bn1.weight",
    "layer4.1.bn2.bias",
    "layer4.1.bn2.running_mean",
    "layer4.1.bn2.running_var",
    "fc.weight",
    "fc.bias",
)


def sample(array: np.ndarray, count: int = 16) -> np.ndarray:
    """A few values of an array, always the same ones, as float32."""
    flat = np.asarray(array).reshape(-1)
    return flat[np.random.default_rng(flat.size).integers(0, flat.size, count)].astype(np.float32)


def summary(outputs: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Mean, deviation, largest absolute value and a few values of each output, stacked."""
    rows = [np.asarray(output, np.float64) for output in outputs]
    return {
        "mean": np.array([row.mean() for row in rows], np.float32),
        "std": np.array([row.std() for row in rows], np.float32),
        "largest": np.array([np.abs(row).max() for row in rows], np.float32),
        "samples": np.stack([sample(row) for row in rows]),
    }
