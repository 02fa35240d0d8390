"""Your own augmentation: `train` with a grey square somewhere in each image ("cutout", arXiv:1708.04552).

    python scripts/examples/augmentation.py --config configs/dogscats_lite0.yaml --data.root data/dogscats \
        --phases.head.precompute false --phases.head.epochs 1

The script takes every flag of `python -m jaxcats.train`. With `--phases.head.augment side_on`, side_on comes before cutout.
The key of an image depends only on the seed, the epoch and the image, so a run can be repeated and resumed bit for bit.
"""

import sys

import jax
import jax.numpy as jnp

from jaxcats import train_main


def cutout(image, key):
    """Makes a square of a third of the side grey; the image is float32 [S, S, 3] from 0 to 255."""
    side = image.shape[0]
    top, left = jax.random.randint(key, (2,), -side // 6, side - side // 6)  # the square may cross the edge
    position = jnp.arange(side)
    rows = (position >= top) & (position < top + side // 3)
    columns = (position >= left) & (position < left + side // 3)
    return jnp.where((rows[:, None] & columns)[..., None], 127.0, image)


if __name__ == "__main__":
    sys.exit(train_main(augment=cutout))
