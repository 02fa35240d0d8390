"""How configs/recommended.yaml was chosen: cross-validation on the training photos alone.

    python scripts/choose_recommended.py --root data/dogscats [--folds 5] [--seeds 2]

Every candidate is trained `folds` x `seeds` times and evaluated each time on the fold that it was not trained on. The
validation folder is never read. Folds are stratified and assigned by content hash. The script prints the errors of all
held-out photos, summed over the seeds, and their mean log loss, the best candidate first.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
from collections import deque

import numpy as np

from jaxcats.common import stats as stats_module
from jaxcats.common.config import Config, DataConfig, ModelConfig, Phase
from jaxcats.core.scan import epoch_order
from jaxcats.core.state import copy
from jaxcats.data.index import FolderIndex, Split
from jaxcats.train.drivers import decoding, make_driver
from jaxcats.train.evaluator import evaluate_split
from jaxcats.train.experiment import Experiment, create_model, initial_params, make_phase, plans, setup
from jaxcats.train.features import backbone_features

# optimizer, learning rate, weight decay, epochs
GRID = [
    ("sgd", 0.01, 0.0, 4),
    ("sgd", 0.01, 0.0, 10),
    ("sgd", 0.01, 0.0, 20),
    ("sgd", 0.03, 0.0, 10),
    ("sgd", 0.03, 0.001, 10),
    ("sgd", 0.003, 0.0, 20),
    ("adamw", 0.001, 0.05, 4),
    ("adamw", 0.001, 0.05, 10),
    ("adamw", 0.0003, 0.05, 10),
]


def candidates():
    """Yields (name, policy, head, Phase) of each candidate."""
    lesson = Phase(precompute=True)
    for policy in ("lesson", "weights"):
        yield f"{policy}: the lesson's fit(0.01, 3)", policy, "lesson", lesson
        for kind, lr, decay, epochs in GRID:
            phase = dataclasses.replace(
                lesson, epochs=epochs, lr=lr, optimizer=kind, schedule="one_cycle", weight_decay=decay
            )
            for head in ("lesson", "linear"):
                name = f"{policy}: {head} {kind} one_cycle lr {lr:g} x {epochs} epochs, decay {decay:g}"
                yield name, policy, head, phase


def rows_of(split: Split, rows: np.ndarray) -> Split:
    """The split with these rows only."""
    paths, hashes = (tuple(values[i] for i in rows.tolist()) for values in (split.paths, split.hashes))
    return Split(split.root, paths, split.labels[rows], hashes)


def fold_of(split: Split, folds: int) -> np.ndarray:
    """Fold of each row: rank by content hash within its class, modulo the number of folds."""
    fold = np.zeros(len(split), int)
    for label in np.unique(split.labels):
        rows = np.flatnonzero(split.labels == label)
        order = sorted(rows, key=lambda i: hashlib.sha256(split.hashes[i].encode()).hexdigest())
        fold[order] = np.arange(len(order)) % folds
    return fold


def train_and_evaluate(whole: Experiment, feats: np.ndarray, start, *, held: np.ndarray) -> np.ndarray:
    """Logits of the held-out rows, after training on the others."""
    split = whole.index.splits["train"]
    parts = {"train": np.flatnonzero(~held), "valid": np.flatnonzero(held)}
    index = FolderIndex(split.root, whole.index.classes, {k: rows_of(split, r) for k, r in parts.items()}, (), 0.0, 0)
    one = dataclasses.replace(whole, index=index)
    (plan,) = plans(one)
    step, create = make_phase(one, plan)
    state, drive = create(*start), make_driver(one, plan, step, feats[parts["train"]])
    state = copy(state)
    for epoch in range(plan.phase.epochs):
        order = epoch_order(len(parts["train"]), batch_size=plan.phase.batch_size, seed=one.config.seed, epoch=epoch)
        state = deque(drive(state, order, epoch), maxlen=1)[0][0]
    valid, features = index.splits["valid"], feats[parts["valid"]]
    return evaluate_split(one.model, valid, state.params, state.batch_stats, features=features, **decoding(one))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--candidates", type=int, help="try only the first of them")
    args = parser.parse_args()
    results, known = [], {}
    base = setup(Config(data=DataConfig(args.root), model=ModelConfig(args.backbone)))
    for name, policy, head, phase in itertools.islice(candidates(), args.candidates):
        logits = []
        for seed in range(args.seeds):
            config = Config(
                seed, DataConfig(args.root, policy=policy), ModelConfig(args.backbone, head), {"head": phase}
            )
            model, preprocess = create_model(config, len(base.index.classes))
            whole = Experiment(config, base.index, model, preprocess, base.cache)
            train = whole.index.splits["train"]
            params, stats, _ = initial_params(whole)
            if (policy, head) not in known:
                got = backbone_features(
                    model, train, params=params, batch_stats=stats, cache_dir=whole.cache, **decoding(whole)
                )
                known[policy, head] = got.features
            fold, out = fold_of(train, args.folds), np.zeros((len(train), len(base.index.classes)), np.float32)
            for k in range(args.folds):
                out[fold == k] = train_and_evaluate(whole, known[policy, head], (params, stats), held=fold == k)
            logits.append(out)
        labels = np.tile(base.index.splits["train"].labels, args.seeds)
        found = stats_module.summary(np.concatenate(logits), labels)
        results.append((found["errors"], found["log_loss"], name))
        print(
            json.dumps(
                {"errors": found["errors"], "of": found["n"], "log_loss": round(found["log_loss"], 4), "what": name}
            ),
            flush=True,
        )
    print("\nbest first:")
    for errors, loss, name in sorted(results)[:15]:
        print(f"{errors:4d} of {len(labels)}  log loss {loss:.4f}  {name}")


if __name__ == "__main__":
    main()
