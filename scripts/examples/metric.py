"""A metric of one's own, in a notebook's few lines: what the mistakes cost, where a dog taken for a cat costs five times as much.

    python scripts/examples/metric.py [data/dogscats [BACKBONE]]

It stands in the table of epochs, in `learn.history` and, with `jaxcats.train_main(metrics=cost)`, in the run folder.
"""

import sys

import numpy as np

import jaxcats as jc
from jaxcats.common.cli import run_command

COSTS = np.array([[0.0, 1.0], [5.0, 0.0]])  # [what it shows, what it is taken for], cats and dogs


def cost(logits, labels):
    """Logits float32 [N, 2] and labels int32 [N] of all validation images -> numbers by name."""
    odds = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = odds / odds.sum(1, keepdims=True)
    cautious = (probabilities @ COSTS).argmin(1)  # the answer that costs least on average, not the likeliest
    return {"cost": COSTS[labels, logits.argmax(1)].sum(), "cautious cost": COSTS[labels, cautious].sum()}


def train(folder="data/dogscats", backbone="efficientnet_lite0", **options):
    data = jc.ImageClassifierData.from_paths(folder)
    learn = jc.Learner.pretrained(backbone, data, precompute=True, **options)
    learn.fit(0.01, 3, metrics=cost)
    return learn


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: train(*argv) and 0))
