"""Your own loss: `train` with the focal loss, which gives little weight to images that are already right (arXiv:1708.02002).

    python scripts/examples/loss.py --config configs/dogscats_lite0.yaml --data.root data/dogscats

The script takes every flag of `python -m jaxcats.train`. The run folder keeps the name of the function, and only this
script can resume the run.
"""

import sys

import jax
import jax.numpy as jnp

from jaxcats import train_main


def focal(logits, labels, *, gamma=2.0):
    """The losses float32 [B] of logits float32 [B, C] and labels int32 [B]."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return -((1 - jnp.exp(log_p)) ** gamma) * log_p


if __name__ == "__main__":
    sys.exit(train_main(loss_fn=focal))
