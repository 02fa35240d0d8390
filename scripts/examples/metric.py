"""Your own metric: the cost of the errors, where a dog taken for a cat costs five times as much as a cat taken for a dog.

    python scripts/examples/metric.py [data/dogscats [BACKBONE]]

The metric appears in the table of epochs and in `learn.history`. In a script with the flags of `train`, pass
`metrics=cost` as loss.py passes its loss; then the metric is also in the run folder.
"""

import sys

import numpy as np

import jaxcats as jc
from jaxcats.common.cli import run_command

COSTS = np.array([[0.0, 1.0], [5.0, 0.0]])  # [actual class, predicted class], cats and dogs


def cost(logits, labels):
    """Metrics by name, of logits float32 [N, 2] and labels int32 [N] of all validation images."""
    odds = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = odds / odds.sum(1, keepdims=True)
    cautious = (probabilities @ COSTS).argmin(1)  # the class with the lowest expected cost, not the likeliest class
    return {"cost": COSTS[labels, logits.argmax(1)].sum(), "cautious cost": COSTS[labels, cautious].sum()}


def train(folder="data/dogscats", backbone="efficientnet_lite0", **options):
    data = jc.ImageClassifierData.from_paths(folder)
    learn = jc.Learner.pretrained(backbone, data, precompute=True, **options)
    learn.fit(0.01, 3, metrics=cost)
    return learn


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: train(*argv) and 0))
