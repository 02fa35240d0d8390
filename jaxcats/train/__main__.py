"""`python -m jaxcats.train --config FILE [--KEY VALUE ...]`: trains, evaluates, and leaves everything in the run folder."""

import importlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcats.common import distributed
from jaxcats.common.cli import command_line, flag_value, parse, run_command, silence_tensorflow
from jaxcats.common.config import Config, to_yaml
from jaxcats.common.errors import UserError
from jaxcats.common.io import unlock_folder, write_bytes, write_json
from jaxcats.common.signals import Stopping
from jaxcats.common.versions import versions
from jaxcats.train.run_folder import has_checkpoint, open_run, shared, write_config

if TYPE_CHECKING:
    from jaxcats.train.user_functions import UserFunctions


DESCRIPTION = "Trains an image classifier on a folder of images and judges it on the validation images."
OPTIONS = {
    "workdir": {"type": str, "help": "run folder (default: runs/NAME OF THE CONFIG-TIME)"},
    "resume": {"action": "store_true", "help": "go on from the last checkpoint in --workdir; start if there is none"},
    "print_config": {"action": "store_true", "help": "print the resolved configuration and stop"},
}


def run_facts(setup: Any) -> dict[str, Any]:
    """What is kept of a run beside its configuration: versions, images, backend, and functions of one's own."""
    import jax

    from jaxcats.train.experiment import fingerprint

    names = setup.own.names(setup.config)
    found = {"versions": versions(), "fingerprint": fingerprint(setup.index), "backend": jax.default_backend()}
    return found | ({"own": names} if names else {})


def write_run_facts(folder: Path, setup: Any, found: Any, *, resumed: bool) -> None:
    """Writes what later commands read of the settings and images; `begun`: of a run that goes on, whose split stands."""
    from jaxcats.data.quality import counts
    from jaxcats.train.experiment import SPLIT

    write_config(folder, setup.config)
    write_json(folder / "bad_files.json", [vars(b) for b in setup.index.bad])
    write_json(folder / "data.json", {"pictures": counts(setup.index), "findings": found})
    manifest, split = setup.index.manifest, folder / SPLIT
    if manifest and manifest.is_file() and not (resumed and split.exists()):
        write_bytes(split, manifest.read_bytes())


def train(
    config: Config,
    workdir: Path,
    *,
    started: float,
    stopping: Stopping | None = None,
    own: "UserFunctions | None" = None,
) -> None:
    """Runs everything that a Config says, into a run folder; see Trainer for `stopping`."""
    from jaxcats.data.quality import findings, summary
    from jaxcats.train import experiment
    from jaxcats.train.drivers import decoding
    from jaxcats.train.evaluator import Evaluator
    from jaxcats.train.loop import Trainer

    seconds = {"imports": time.perf_counter() - started}
    at = time.perf_counter()
    resumed = has_checkpoint(workdir)
    setup = experiment.setup(config, own=own, run=workdir if resumed else None)
    seconds["index"] = time.perf_counter() - at
    facts = run_facts(setup)
    writes, found = distributed.is_primary(), findings(setup.index)
    print("\n".join([f"Run folder: {workdir}", experiment.describe(setup), *summary(found)]))

    def initial() -> tuple[Any, Any]:
        before = time.perf_counter()
        params, stats, weights = distributed.all_or_none(lambda: experiment.initial_params(setup))
        if writes:
            write_json(workdir / "versions.json", facts | {"weights": weights})
        seconds["weights"] = time.perf_counter() - before
        return params, stats

    stopping = stopping or Stopping()
    stopping.check()
    with Trainer(setup, workdir, facts=facts, stopping=stopping) as trainer:
        fitted = trainer.run(initial, partial(write_run_facts, workdir, setup, found, resumed=resumed))
    stopping.check()
    at = time.perf_counter()
    valid = setup.index.splits["valid"]
    logits = Evaluator(setup.model, valid, feats=fitted.valid_features, **decoding(setup))(
        fitted.params, fitted.batch_stats
    )
    seconds |= fitted.seconds | {"evaluate": time.perf_counter() - at}
    if not writes:
        return
    # Evaluate and export stand to the right of this folder, so they are loaded by name, as a command is.
    finish = importlib.import_module("jaxcats.export.finish")
    finish.finish_training(setup, fitted, workdir=workdir, logits=logits, facts=facts, seconds=seconds, started=started)


def train_main(
    *,
    loss_fn: Callable | None = None,
    augment: Callable | None = None,
    metrics: Callable | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """`python -m jaxcats.train` as the main of a script of your own: with its functions, and the networks it registers.

    Args:
        loss_fn: see jaxcats.train.user_functions.UserFunctions.
        augment: likewise.
        metrics: likewise.
        argv: flags, as of the command; None: the script's.

    Returns:
        The exit code.
    """
    from jaxcats.train.user_functions import UserFunctions

    return run_command(partial(main, own=UserFunctions(loss_fn, augment, metrics)), argv)


def main(argv: Sequence[str], *, own: "UserFunctions | None" = None) -> None:
    """The command; `own` is of the script that it is the main of."""
    started = time.perf_counter()
    words, workdir = list(argv), flag_value(argv, "workdir")
    if "--resume" in words and "--help" not in words:
        if not workdir:
            raise UserError("--resume: needs --workdir, the run folder to go on with.")
        if flag_value(words, "config") is None:
            saved = Path(workdir) / "config.yaml"
            if not saved.is_file():
                raise UserError(
                    f"--resume: {workdir} holds no run (no config.yaml). Name a run folder, or give a --config to start."
                )
            words += ["--config", str(saved)]
    prog = "python -m jaxcats.train" if own is None else f"python {sys.argv[0]}"
    config, options = parse(words, prog=prog, description=DESCRIPTION, options=OPTIONS)
    if options["print_config"]:
        print(to_yaml(config), end="")
        return
    silence_tensorflow()
    stopping, folder = Stopping(), None
    try:
        with stopping.listen(several=distributed.is_requested(config.distributed)):
            folder = begin(config, options)
            train(config, folder, started=started, stopping=stopping, own=own)
    except KeyboardInterrupt as stopped:
        if folder:
            script = command_line("train") if own is None else shlex.join(["python", *sys.argv[:1]])
            what = "To go on from the last checkpoint" if has_checkpoint(folder) else "To start again"
            print(f"{what}: {script} --resume {shlex.join(['--workdir', str(folder)])}", file=sys.stderr)
        code = getattr(stopped, "code", 130)
        if code == 130 and distributed.has_joined():  # Ctrl-C; SIGTERM has been agreed on with the others
            distributed.exit_now(str(stopped) or "stopped by the keyboard.", code)
        raise
    finally:
        if folder:
            unlock_folder(folder)


def begin(config: Config, options: dict[str, Any]) -> Path:
    """Joins other processes, if there are any, and opens the run folder."""
    distributed.start(config.distributed)
    if distributed.is_multiprocess() and not options["workdir"]:
        raise UserError("--workdir: name the run folder where several processes train; it must be the same for all.")
    distributed.require_equal(
        "The settings or the versions", json.dumps([shared(config), options["resume"], versions()["jax"]])
    )
    opened = distributed.on_primary(
        lambda: open_run(config, options["config"], workdir=options["workdir"], resume=options["resume"])
    )
    distributed.silence_stdout()
    from jaxcats.common.compile_cache import keep_freed_memory

    keep_freed_memory()
    return opened or Path(options["workdir"])


if __name__ == "__main__":
    sys.exit(run_command(main))
