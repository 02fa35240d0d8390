"""Measures how well label errors are found: flips some training labels and looks for them as `evaluate --split train` does.

    python scripts/flipped_labels.py --config configs/dogscats_lite0.yaml --root data/dogscats [--share 0.02] [--seeds 3]

The labels are flipped in memory only. Recall is the share of the flipped images that is listed, and precision is the
share of the listed images that was flipped. Labels that were wrong before count against the precision.
"""

import argparse
import dataclasses
import time
from types import SimpleNamespace

import numpy as np

from jaxcats.common.cli import from_file
from jaxcats.evaluate.label_errors import find_suspects
from jaxcats.train.experiment import initial_params, setup


def suspect_paths(run: SimpleNamespace, split, *, folds: int) -> list[str]:
    """The paths of the training images with a suspicious label, the most suspicious first."""
    return [s.path for s in find_suspects(run, {"train": split}, folds=folds) if s.reason.startswith("label")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/dogscats_lite0.yaml")
    parser.add_argument("--root", required=True)
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    args = parser.parse_args()
    config = from_file(args.config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=args.root))
    whole = setup(config)
    params, batch_stats, _ = initial_params(whole)
    train, classes = whole.index.splits["train"], whole.index.classes
    n = len(train)
    run = SimpleNamespace(config=config, model=whole.model, preprocess=whole.preprocess, classes=classes)
    run.params, run.batch_stats = params, batch_stats
    print(
        f"no label flipped: {len(suspect_paths(run, train, folds=args.folds))} of {n:,} listed (features are computed now)"
    )
    hits: list[np.ndarray] = []
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        rows = np.asarray(rng.choice(n, round(args.share * n), replace=False))
        labels = train.labels.copy()
        labels[rows] = (labels[rows] + rng.integers(1, len(classes), len(rows))) % len(classes)
        run.config = dataclasses.replace(config, seed=seed)
        before = time.perf_counter()
        names = suspect_paths(run, dataclasses.replace(train, labels=labels), folds=args.folds)
        seconds = time.perf_counter() - before
        flipped, k = {train.paths[i] for i in rows}, len(rows)
        hit = np.asarray([name in flipped for name in names], bool)
        hits.append(hit)
        print(
            f"seed {seed}: {k} flipped; {len(hit)} listed, {hit.sum()} of them flipped: recall {hit.sum() / k:.3f}, "
            f"precision {hit.mean():.3f}; of the first {k}, {hit[:k].mean():.3f}; {seconds:.1f} s",
            flush=True,
        )
    print("rank  precision  recall  (all seeds)")
    flips, longest = round(args.share * n) * args.seeds, max(map(len, hits))
    for rank in [*range(10, longest, 10), longest]:
        first = np.concatenate([hit[:rank] for hit in hits])
        print(f"{rank:4d}  {first.mean():9.3f}  {first.sum() / flips:6.3f}")


if __name__ == "__main__":
    main()
