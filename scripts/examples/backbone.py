"""A network of one's own: EfficientNet-Lite0 that passes on the square roots of its features (Perronnin et al., ECCV 2010).

    python scripts/examples/backbone.py train --config configs/dogscats_lite0.yaml --data.root data/dogscats --model.backbone mine
    python scripts/examples/backbone.py evaluate --run runs/NAME

Has every command of `jaxcats`, each of which knows the network. Any Linen module `(images [N, H, W, 3], *, train) -> [N, h, w, C]` will do: with
no `source` of weights it starts from random ones (`--model.pretrained false`).
"""

import dataclasses
import sys

import jax.numpy as jnp

from jaxcats import main, models
from jaxcats.models.efficientnet_lite import EfficientNetLite0


class Rooted(EfficientNetLite0):
    """The published network up to its last feature map; its weights keep their names, and so are found."""

    def __call__(self, images, *, train):
        return jnp.sqrt(super().__call__(images, train=train))  # ReLU6 leaves nothing below 0


published = models.registry.get("efficientnet_lite0")
models.register("mine", dataclasses.replace(published, build=Rooted))

if __name__ == "__main__":
    sys.exit(main())
