"""`python -m jaxcats.train --config FILE [--KEY VALUE ...]`: trains, evaluates, and leaves everything in the run folder."""

import importlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
    from jaxcats.train.experiment import Experiment
    from jaxcats.train.user_functions import UserFunctions

DESCRIPTION = "Trains an image classifier on a folder of images and evaluates it on the validation images."
OPTIONS = {
    "workdir": {"type": str, "help": "run folder (default: runs/NAME OF THE CONFIG-TIME)"},
    "resume": {
        "action": "store_true",
        "help": "continue from the last checkpoint in --workdir; start if there is none",
    },
    "print_config": {"action": "store_true", "help": "print the resolved configuration and stop"},
}


def train_main(
    *,
    loss_fn: Callable | None = None,
    augment: Callable | None = None,
    metrics: Callable | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """`python -m jaxcats.train` as the main of a script: with its functions, and the networks that it registers.

    Args:
        loss_fn: see jaxcats.train.user_functions.UserFunctions.
        augment: see UserFunctions.
        metrics: see UserFunctions.
        argv: flags, as of the command; None: those of the script.

    Returns:
        The exit code.
    """
    from jaxcats.train.user_functions import UserFunctions

    functions = UserFunctions(loss_fn, augment, metrics)
    return run_command(lambda words: main(words, user_functions=functions), argv)


def main(argv: Sequence[str], *, user_functions: "UserFunctions | None" = None) -> None:
    """The command; with `user_functions` it is the main of a script."""
    started = time.perf_counter()
    command = command_line("train") if user_functions is None else f"python {shlex.quote(sys.argv[0])}"
    config, options = parse(_with_saved_config(argv), prog=command, description=DESCRIPTION, options=OPTIONS)
    if options["print_config"]:
        print(to_yaml(config), end="")
        return
    silence_tensorflow()
    stopping, folder = Stopping(), None
    try:
        with stopping.listen(several=distributed.is_requested(config.distributed)):
            folder = begin(config, options)
            train(config, folder, started=started, stopping=stopping, user_functions=user_functions)
    except KeyboardInterrupt as stopped:
        if folder:
            purpose = "To continue from the last checkpoint" if has_checkpoint(folder) else "To start again"
            print(f"{purpose}: {command} --resume {shlex.join(['--workdir', str(folder)])}", file=sys.stderr)
        # The other processes are told of a SIGTERM, but not of Ctrl-C in this process.
        if getattr(stopped, "code", 130) == 130 and distributed.has_joined():
            distributed.exit_now(str(stopped), 130)
        raise
    finally:
        if folder:
            unlock_folder(folder)


def _with_saved_config(argv: Sequence[str]) -> list[str]:
    """The flags, with the configuration of the run folder where --resume is given without --config."""
    words, workdir = list(argv), flag_value(argv, "workdir")
    if "--resume" not in words or "--help" in words:
        return words
    if not workdir:
        raise UserError("--resume: needs --workdir, the run folder to continue.")
    if flag_value(words, "config") is None:
        saved = Path(workdir) / "config.yaml"
        if not saved.is_file():
            raise UserError(f"--resume: {workdir} holds no run. Name a run folder, or give a --config to start.")
        words += ["--config", str(saved)]
    return words


def begin(config: Config, options: Mapping[str, Any]) -> Path:
    """Joins other processes, if there are any, and opens the run folder."""
    distributed.start(config.distributed)
    workdir, resume = options["workdir"], options["resume"]
    if distributed.is_multiprocess() and not workdir:
        raise UserError("--workdir: name the run folder where several processes train; it must be the same for all.")
    settings = json.dumps([shared(config), resume, versions()["jax"]])
    distributed.require_equal("The settings or the versions", settings)
    opened = distributed.on_primary(lambda: open_run(config, options["config"], workdir=workdir, resume=resume))
    distributed.silence_stdout()
    from jaxcats.common.compile_cache import keep_freed_memory

    keep_freed_memory()
    return opened or Path(workdir)


def train(
    config: Config, workdir: Path, *, started: float, stopping: Stopping, user_functions: "UserFunctions | None"
) -> None:
    """Runs a whole Config and writes the results into an open run folder.

    Args:
        config: what to do.
        workdir: the run folder.
        started: time.perf_counter() at the start of the command.
        stopping: asked after each step whether to save and leave.
        user_functions: loss, augmentation and metrics of the user.
    """
    from jaxcats.data.quality import findings, summary
    from jaxcats.train.drivers import decoding
    from jaxcats.train.evaluator import evaluate_split
    from jaxcats.train.experiment import describe, setup
    from jaxcats.train.loop import train_run

    seconds, start = {"imports": time.perf_counter() - started}, time.perf_counter()
    resumed = has_checkpoint(workdir)
    experiment = setup(config, user_functions=user_functions, run=workdir if resumed else None)
    seconds["index"] = time.perf_counter() - start
    facts, problems = run_facts(experiment), findings(experiment.index)
    print("\n".join([f"Run folder: {workdir}", describe(experiment), *summary(problems)]))

    stopping.check()
    accept = partial(write_dataset_files, workdir, experiment, problems, resumed=resumed)
    result = train_run(experiment, workdir, on_accepted=accept, facts=facts, stopping=stopping)
    stopping.check()
    start, weights = time.perf_counter(), (result.params, result.batch_stats)
    options = {"features": result.valid_features, **decoding(experiment)}
    logits = evaluate_split(experiment.model, experiment.index.splits["valid"], *weights, **options)
    seconds |= result.seconds | {"evaluate": time.perf_counter() - start}
    if distributed.is_primary():
        # train/ may not import evaluate/ or export/ (docs/architecture.md), so this is loaded by name.
        finish = importlib.import_module("jaxcats.export.finish")
        finish.finish_training(
            experiment, result, workdir=workdir, logits=logits, facts=facts, seconds=seconds, started=started
        )


def run_facts(experiment: "Experiment") -> dict[str, Any]:
    """The facts saved with a run's configuration: versions, dataset, backend, and names of user functions."""
    import jax

    from jaxcats.train.experiment import fingerprint

    index, names = experiment.index, experiment.user_functions.names(experiment.config)
    facts = {"versions": versions(), "fingerprint": fingerprint(index), "backend": jax.default_backend()}
    return facts | ({"own": names} if names else {})


def write_dataset_files(folder: Path, experiment: "Experiment", problems: list[dict], *, resumed: bool) -> None:
    """Writes the files on settings and images that later commands read; a resumed run keeps its split."""
    from jaxcats.data.quality import counts
    from jaxcats.train.experiment import SPLIT_FILE

    index, split = experiment.index, folder / SPLIT_FILE
    write_config(folder, experiment.config)
    write_json(folder / "bad_files.json", [vars(b) for b in index.bad])
    write_json(folder / "data.json", {"pictures": counts(index), "findings": problems})
    if index.manifest and index.manifest.is_file() and not (resumed and split.exists()):
        write_bytes(split, index.manifest.read_bytes())


if __name__ == "__main__":
    sys.exit(run_command(main))
