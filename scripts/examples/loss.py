"""A loss of one's own: `train` with the focal loss, which makes little of images that are already right (arXiv:1708.02002).

    python scripts/examples/loss.py --config configs/dogscats_lite0.yaml --data.root data/dogscats

Takes every flag of `python -m jaxcats.train`. The run folder says which function it was, and is resumed with this script only.
"""

import sys

import jax
import jax.numpy as jnp

from jaxcats import train_main


def focal(logits, labels, *, gamma=2.0):
    """Logits float32 [B, C], labels int32 [B] -> losses float32 [B]."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return -((1 - jnp.exp(log_p)) ** gamma) * log_p


if __name__ == "__main__":
    sys.exit(train_main(loss_fn=focal))
