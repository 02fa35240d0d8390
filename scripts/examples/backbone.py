"""Your own backbone: EfficientNet-Lite0 with the square roots of its features (Perronnin et al., ECCV 2010).

    python scripts/examples/backbone.py train --config configs/dogscats_lite0.yaml --data.root data/dogscats --model.backbone mine
    python scripts/examples/backbone.py evaluate --run runs/NAME

The script has every command of `jaxcats`, and each of them knows the backbone. A backbone is any Linen module with
`(images [N, H, W, 3], *, train) -> [N, h, w, C]`. Without a `source` of weights it starts from random weights
(`--model.pretrained false`).
"""

import dataclasses
import sys

import jax.numpy as jnp

from jaxcats import main, models
from jaxcats.models.efficientnet_lite import EfficientNetLite0


class Rooted(EfficientNetLite0):
    """The published network with other features; its parameters keep their names, so the published weights fit."""

    def __call__(self, images, *, train):
        return jnp.sqrt(super().__call__(images, train=train))  # ReLU6 gives no negative features


published = models.registry.get("efficientnet_lite0")
models.register("mine", dataclasses.replace(published, build=Rooted))

if __name__ == "__main__":
    sys.exit(main())
