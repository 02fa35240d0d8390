"""An augmentation of one's own: `train` with a grey square somewhere in each image ("cutout", arXiv:1708.04552).

    python scripts/examples/augmentation.py --config configs/dogscats_lite0.yaml --data.root data/dogscats \
        --phases.head.precompute false --phases.head.epochs 1

Takes every flag of `python -m jaxcats.train`; `--phases.head.augment side_on` comes before it. The key of an image depends on
the seed, the epoch and the image alone, so that a run can be repeated and resumed to the bit.
"""

import sys

import jax
import jax.numpy as jnp

from jaxcats import train_main


def cutout(image, key):
    """An image float32 [S, S, 3] from 0 to 255 -> the same with a square of a third of its side grey."""
    side = image.shape[0]
    top, left = jax.random.randint(key, (2,), -side // 6, side - side // 6)  # it may hang over the edge
    at = jnp.arange(side)
    rows, columns = (at >= top) & (at < top + side // 3), (at >= left) & (at < left + side // 3)
    return jnp.where((rows[:, None] & columns)[..., None], 127.0, image)


if __name__ == "__main__":
    sys.exit(train_main(augment=cutout))
