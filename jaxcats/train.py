"""`python -m jaxcats.train --config FILE [--KEY VALUE ...]`: trains, evaluates, and leaves everything in the run folder."""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcats import distributed
from jaxcats.cli import flag_value, parse
from jaxcats.command import as_typed, quiet_tensorflow, run_command
from jaxcats.config import Config, to_yaml
from jaxcats.errors import UserError
from jaxcats.judging import BEST_EPOCH, Run
from jaxcats.outcome import CHOSE, skipped, write_results
from jaxcats.resumption import shared
from jaxcats.run_folder import has_checkpoint, keep_config, open_run
from jaxcats.stopping import Stopping
from jaxcats.storage.atomic import write_bytes, write_json
from jaxcats.storage.lock import release
from jaxcats.versions import versions

if TYPE_CHECKING:
    from jaxcats.own import Own

DESCRIPTION = "Trains an image classifier on a folder of pictures and judges it on the validation pictures."
OPTIONS = {
    "workdir": {"type": str, "help": "run folder (default: runs/NAME OF THE CONFIG-TIME)"},
    "resume": {"action": "store_true", "help": "go on from the last checkpoint in --workdir; start if there is none"},
    "print_config": {"action": "store_true", "help": "print the resolved configuration and stop"},
}


def rates(lr: Any) -> str:
    """A phase's learning rate, or its three, in words."""
    return " / ".join(map(str, lr if len(set(lr)) > 1 else lr[:1])) if isinstance(lr, (tuple, list)) else str(lr)


def describe(setup: Any) -> str:
    """What is about to be trained, in a few lines."""
    index, c = setup.index, setup.config
    train, valid = index.splits["train"], index.splits["valid"]
    lines = [
        f"{len(train):,} training and {len(valid):,} validation pictures in {len(index.classes)} classes "
        f"({', '.join(index.classes[:6])}{', ...' if len(index.classes) > 6 else ''}) from {index.root}"
    ]
    lines += skipped(index.bad)
    start = "pretrained" if c.model.pretrained else "random weights"
    lines.append(
        f"{c.model.backbone} ({start}), {c.model.head} head, {setup.preprocess.size} px, {setup.model.dtype}; "
        + "; ".join(
            f"{n}: {p.epochs} epoch{'s' * (p.epochs > 1)}, {p.optimizer} {p.schedule} lr {rates(p.lr)}, "
            f"{p.freeze} frozen, BatchNorm {p.bn}"
            for n, p in c.phases.items()
        )
    )
    if names := setup.own.names(c):
        from jaxcats.own import words

        lines.append(f"Functions of your own: {words(names)}")
    return "\n".join(lines)


def about(setup: Any) -> dict[str, Any]:
    """What is kept of a run beside its configuration: versions, pictures, backend, and functions of one's own."""
    import jax

    from jaxcats.job import fingerprint

    names = setup.own.names(setup.config)
    found = {"versions": versions(), "fingerprint": fingerprint(setup.index), "backend": jax.default_backend()}
    return found | ({"own": names} if names else {})


def keep_facts(folder: Path, setup: Any, found: Any, *, begun: bool) -> None:
    """Writes what later commands read of the settings and pictures; `begun`: of a run that goes on, whose split stands."""
    from jaxcats.data.findings import counts
    from jaxcats.job import SPLIT

    keep_config(folder, setup.config)
    write_json(folder / "bad_files.json", [vars(b) for b in setup.index.bad])
    write_json(folder / "data.json", {"pictures": counts(setup.index), "findings": found})
    manifest, split = setup.index.manifest, folder / SPLIT
    if manifest and manifest.is_file() and not (begun and split.exists()):
        write_bytes(split, manifest.read_bytes())


def train(
    config: Config, workdir: Path, *, started: float, stopping: Stopping | None = None, own: "Own | None" = None
) -> None:
    """Runs everything that a Config says, into a run folder; see Trainer for `stopping`."""
    from jaxcats import job
    from jaxcats.core import mesh
    from jaxcats.data.findings import findings, summary
    from jaxcats.inputs import Evaluator, decoding
    from jaxcats.runs import Trainer

    seconds = {"imports": time.perf_counter() - started}
    at = time.perf_counter()
    begun = has_checkpoint(workdir)
    setup = job.setup(config, own=own, run=workdir if begun else None)
    seconds["index"] = time.perf_counter() - at
    facts = about(setup)
    writes, found = distributed.first(), findings(setup.index)
    print("\n".join([f"Run folder: {workdir}", describe(setup), *summary(found)]))

    def initial() -> tuple[Any, Any]:
        before = time.perf_counter()
        params, stats, weights = distributed.together(lambda: job.initial_params(setup))
        if writes:
            write_json(workdir / "versions.json", facts | {"weights": weights})
        seconds["weights"] = time.perf_counter() - before
        return params, stats

    stopping = stopping or Stopping()
    stopping.check()
    with Trainer(setup, workdir, facts=facts, stopping=stopping) as trainer:
        fitted = trainer.run(initial, partial(keep_facts, workdir, setup, found, begun=begun))
    stopping.check()
    at = time.perf_counter()
    valid = setup.index.splits["valid"]
    logits = Evaluator(setup.model, valid, feats=fitted.valid_features, **decoding(setup))(
        fitted.params, fitted.batch_stats
    )
    seconds |= fitted.seconds | {"evaluate": time.perf_counter() - at}
    if not writes:
        return
    if mesh.several():
        fitted = dataclasses.replace(fitted, params=mesh.here(fitted.params), batch_stats=mesh.here(fitted.batch_stats))
        mesh.work_alone()
    best = config.checkpoint.use == "best"
    run = Run(
        folder=workdir,
        config=config,
        model=setup.model,
        preprocess=setup.preprocess,
        classes=setup.index.classes,
        state=fitted,
        precomputed=list(config.phases.values())[-1].precompute,
        augment=list(config.phases.values())[-1].augment,
        checkpoint={"use": config.checkpoint.use, "step": fitted.step, "state": fitted.identity}
        | {"valid_used_for": BEST_EPOCH if best else []}
        | {name: facts[name] for name in ("own",) if name in facts},
        fingerprint=facts["fingerprint"],
    )
    more = {"features": fitted.counts, "bad_files": len(setup.index.bad)}
    if own and own.metrics:
        more["own_metrics"] = own.measure(logits, valid.labels)
    leave(run, valid, logits, seconds, more, started=started)


def leave(
    run: Any, valid: Any, logits: Any, seconds: dict[str, float], facts: dict[str, Any], *, started: float
) -> None:
    """Writes what a finished training leaves in its run folder, and says where."""
    config, folder = run.config, run.folder

    def measured() -> dict[str, float]:
        total = time.perf_counter() - started
        all_of_it = seconds | {"other": total - sum(seconds.values()), "total": total}
        return {k: round(v, 3) for k, v in all_of_it.items()}

    found, calibration = write_results(
        folder,
        valid,
        classes=run.classes,
        logits=logits,
        facts=facts | {"checkpoint": run.checkpoint, "seconds": measured()},
        max_error=config.max_error,
        chose=CHOSE if run.checkpoint["valid_used_for"] else "",
    )
    if config.export:
        from jaxcats.exporting import write_run

        at = time.perf_counter()
        try:
            write_run(run, found, calibration)
        except (
            UserError
        ) as e:  # a registered backbone may do what no artefact can hold: the training stands all the same
            print(f"Not exported: {e}", file=sys.stderr)
        seconds["export"] = time.perf_counter() - at
    if config.report:
        from jaxcats.presentation import present

        at = time.perf_counter()
        present(folder, run, valid, logits, found)
        seconds["report"] = time.perf_counter() - at
    write_json(folder / "metrics.json", found | {"seconds": measured()})
    print(summary(measured(), facts["features"]))
    written = [
        "metrics.json",
        "predictions.csv",
        *["model/"] * (folder / "model").is_dir(),
        *["report.html"] * config.report,
    ]
    print(f"Results: {folder}/{', '.join(written)}; again: {as_typed('evaluate')} --run {folder}")


def summary(seconds: dict[str, float], counts: dict[str, int]) -> str:
    """Where the time went, in a line."""
    parts = [f"{k} {v:.1f} s" for k, v in seconds.items() if v >= 0.05 and k != "total"]
    warm = (
        f" ({counts['reused']:,} feature{'s' * (counts['reused'] > 1)} from the cache)" if counts.get("reused") else ""
    )
    return f"{seconds['total']:.1f} s in all{warm}: {', '.join(parts)}"


def command(
    *,
    loss_fn: Callable | None = None,
    augment: Callable | None = None,
    metrics: Callable | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """`python -m jaxcats.train` as the main of a script of your own: with its functions, and the networks it registers.

    Args:
        loss_fn: see jaxcats.own.Own.
        augment: likewise.
        metrics: likewise.
        argv: flags, as of the command; None: the script's.

    Returns:
        The exit code.
    """
    from jaxcats.own import Own

    return run_command(partial(main, own=Own(loss_fn, augment, metrics)), argv)


def main(argv: Sequence[str], *, own: "Own | None" = None) -> None:
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
    quiet_tensorflow()
    stopping, folder = Stopping(), None
    try:
        with stopping.listen(several=distributed.wanted(config.distributed)):
            folder = begin(config, options)
            train(config, folder, started=started, stopping=stopping, own=own)
    except KeyboardInterrupt as stopped:
        if folder:
            script = as_typed("train") if own is None else shlex.join(["python", *sys.argv[:1]])
            what = "To go on from the last checkpoint" if has_checkpoint(folder) else "To start again"
            print(f"{what}: {script} --resume {shlex.join(['--workdir', str(folder)])}", file=sys.stderr)
        code = getattr(stopped, "code", 130)
        if code == 130 and distributed.joined():  # Ctrl-C; SIGTERM has been agreed on with the others
            distributed.leave(str(stopped) or "stopped by the keyboard.", code)
        raise
    finally:
        if folder:
            release(folder)


def begin(config: Config, options: dict[str, Any]) -> Path:
    """Joins other processes, if there are any, and opens the run folder."""
    distributed.start(config.distributed)
    if distributed.many() and not options["workdir"]:
        raise UserError("--workdir: name the run folder where several processes train; it must be the same for all.")
    distributed.agree(
        "The settings or the versions", json.dumps([shared(config), options["resume"], versions()["jax"]])
    )
    opened = distributed.by_first(
        lambda: open_run(config, options["config"], workdir=options["workdir"], resume=options["resume"])
    )
    distributed.hush()
    from jaxcats.compiling import keep_heap

    keep_heap()
    return opened or Path(options["workdir"])


if __name__ == "__main__":
    sys.exit(run_command(main))
