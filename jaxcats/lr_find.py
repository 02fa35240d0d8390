"""`python -m jaxcats.lr_find --config FILE`: runs the range test of a phase, prints its table, writes lr_find.json and a figure."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jaxcats.common.cli import parse, run_command, silence_tensorflow
from jaxcats.common.errors import RunError, UserError, nearest

DESCRIPTION = (
    "Finds a learning rate: trains a copy of the network for a while under a rate that grows exponentially, and looks "
    "where the loss falls. The trained copy is discarded."
)
OPTIONS = {
    "phase": {"type": str, "help": "phase whose rate to find, from the initial weights (default: the first phase)"},
    "seeds": {"type": int, "default": 1, "help": "number of fresh heads to test at once, for a band (with precompute)"},
    "start": {"type": float, "default": 1e-7, "help": "first learning rate"},
    "end": {"type": float, "default": 10.0, "help": "learning rate that the last iteration approaches"},
    "iterations": {"type": int, "default": 100, "help": "number of batches"},
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
    from jaxcats.train.experiment import describe, initial_params, plans, setup
    from jaxcats.train.features import precompute
    from jaxcats.train.lr_finder import Sweep, find_lr, write_lr_find

    sweep = Sweep(**{key: options[key] for key in ("start", "end", "iterations", "seeds")})
    experiment = setup(config)
    print(describe(experiment))
    plan = plans(experiment)[names.index(name)]
    params, batch_stats, _ = initial_params(experiment)
    features = precompute(experiment, params, batch_stats)[0]["train"] if plan.phase.precompute else None
    result = find_lr(experiment, plan, (params, batch_stats), features, sweep)
    folder = Path(options["out"] or f"runs/lr_find-{time.strftime('%Y%m%d-%H%M%S')}")
    files = write_lr_find(folder, result)
    print(result.table())
    print(f"Written: {', '.join(map(str, files))}")
    if result.refusal:
        raise RunError(f"no trustworthy learning rate: {result.refusal}")


if __name__ == "__main__":
    sys.exit(run_command(main))
