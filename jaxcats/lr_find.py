"""`python -m jaxcats.lr_find --config FILE`: the range test of a phase; prints its table, writes lr_find.json and the figure."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jaxcats.common.cli import parse, run_command, silence_tensorflow
from jaxcats.common.errors import RunError, UserError, nearest

DESCRIPTION = (
    "Finds a learning rate: trains a copy of the network for a while under a rate that grows exponentially, and looks "
    "where the loss falls. Nothing is kept of the training."
)
OPTIONS = {
    "phase": {"type": str, "help": "whose rate to find, from the initial weights (default: the first phase)"},
    "seeds": {"type": int, "default": 1, "help": "so many heads at once, for a band (with precompute)"},
    "start": {"type": float, "default": 1e-7, "help": "first learning rate"},
    "end": {"type": float, "default": 10.0, "help": "learning rate that the last iteration approaches"},
    "iterations": {"type": int, "default": 100, "help": "batches in all"},
    "out": {"type": str, "help": "folder for lr_find.json and figures/lr_find.png (default: runs/lr_find-TIME)"},
}


def main(argv: Sequence[str]) -> None:
    """The command."""
    config, options = parse(argv, prog="python -m jaxcats.lr_find", description=DESCRIPTION, options=OPTIONS)
    names = list(config.phases)
    name = options["phase"] or names[0]
    if name not in names:
        raise UserError(f"--phase {name}: not in the configuration.{nearest(name, names)} It has {', '.join(names)}.")
    silence_tensorflow()
    from jaxcats.train import experiment
    from jaxcats.train.experiment import describe
    from jaxcats.train.features import precompute
    from jaxcats.train.lr_finder import check_range, find_lr, find_lr_band, write_lr_find

    span = {key: options[key] for key in ("start", "end", "iterations")}
    check_range(**span, seeds=options["seeds"])
    setup = experiment.setup(config)
    print(describe(setup))
    plan = experiment.plans(setup)[names.index(name)]
    params, stats, _ = experiment.initial_params(setup)
    feats = precompute(setup, params, stats)[0]["train"] if plan.phase.precompute else None
    if options["seeds"] == 1:
        result = find_lr(setup, plan, params, stats, feats, **span)
    else:
        result = find_lr_band(setup, plan, params, stats, feats, seeds=options["seeds"], **span)
    folder = Path(options["out"] or f"runs/lr_find-{time.strftime('%Y%m%d-%H%M%S')}")
    files = write_lr_find(folder, result)
    print(result.table())
    print(f"Written: {', '.join(map(str, files))}")
    if result.refusal:
        raise RunError(f"no trustworthy learning rate: {result.refusal}")


if __name__ == "__main__":
    sys.exit(run_command(main))
