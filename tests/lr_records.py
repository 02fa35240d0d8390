"""Results of lr_find from their JSON."""

import numpy as np

from jaxcats.train.lr_finder import Curve, LRFindResult


def result_of(record) -> LRFindResult:
    names = ("lrs", "losses", "smoothed")
    arrays = (np.array([np.nan if x is None else float(x) for x in record[name]]) for name in names)
    return LRFindResult((Curve(*arrays, iterations=record["iterations"], stopped=record["stopped"]),))


def band_of(record) -> LRFindResult:
    return LRFindResult(sum((result_of(seed).curves for seed in record["seeds"]), ()))
