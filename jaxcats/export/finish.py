"""What a finished training leaves in its run folder: predictions, metrics, the artefact and the report."""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np

from jaxcats.common.cli import command_line
from jaxcats.common.errors import UserError
from jaxcats.common.io import write_json
from jaxcats.core import mesh
from jaxcats.evaluate.predictions import CHOSE, write_results
from jaxcats.evaluate.run import BEST_EPOCH, Run
from jaxcats.train.experiment import Experiment
from jaxcats.train.loop import TrainingResult


def finish_training(
    setup: Experiment,
    fitted: TrainingResult,
    *,
    workdir: Path,
    logits: np.ndarray,
    facts: dict,
    seconds: dict[str, float],
    started: float,
) -> None:
    """Writes predictions.csv, metrics.json, model/ and report.html of a training, by the primary process, and prints where.

    Args:
        setup: what was trained.
        fitted: what training left.
        workdir: the run folder.
        logits: float32 [N, C] of the validation images.
        facts: see train.__main__.about.
        seconds: where the time went so far; grows.
        started: time.perf_counter() at the start of the command.
    """
    config, valid = setup.config, setup.index.splits["valid"]
    if mesh.has_many_devices():
        fitted = dataclasses.replace(
            fitted, params=mesh.to_local(fitted.params), batch_stats=mesh.to_local(fitted.batch_stats)
        )
        mesh.use_first_device_only()
    last = list(config.phases.values())[-1]
    run = Run(
        folder=workdir,
        config=config,
        model=setup.model,
        preprocess=setup.preprocess,
        classes=setup.index.classes,
        state=fitted,
        precomputed=last.precompute,
        augment=last.augment,
        checkpoint={"use": config.checkpoint.use, "step": fitted.step, "state": fitted.identity}
        | {"valid_used_for": BEST_EPOCH if config.checkpoint.use == "best" else []}
        | {name: facts[name] for name in ("own",) if name in facts},
        fingerprint=facts["fingerprint"],
    )
    more = {"features": fitted.counts, "bad_files": len(setup.index.bad)}
    if setup.own.metrics:
        more["own_metrics"] = setup.own.measure(logits, valid.labels)

    def measured() -> dict[str, float]:
        total = time.perf_counter() - started
        all_of_it = seconds | {"other": total - sum(seconds.values()), "total": total}
        return {k: round(v, 3) for k, v in all_of_it.items()}

    found, calibration = write_results(
        workdir,
        valid,
        classes=run.classes,
        logits=logits,
        facts=more | {"checkpoint": run.checkpoint, "seconds": measured()},
        max_error=config.max_error,
        chose=CHOSE if run.checkpoint["valid_used_for"] else "",
    )
    if config.export:
        from jaxcats.export.program import write_run

        at = time.perf_counter()
        try:
            write_run(run, found, calibration)
        except UserError as e:  # A registered backbone may do what no artefact can hold; the training is kept.
            print(f"Not exported: {e}", file=sys.stderr)
        seconds["export"] = time.perf_counter() - at
    if config.report:
        from jaxcats.evaluate.report import write_evaluation

        at = time.perf_counter()
        write_evaluation(workdir, run, valid, logits, found)
        seconds["report"] = time.perf_counter() - at
    write_json(workdir / "metrics.json", found | {"seconds": measured()})
    print(time_summary(measured(), fitted.counts))
    written = ["metrics.json", "predictions.csv"]
    if (workdir / "model").is_dir():
        written.append("model/")
    if config.report:
        written.append("report.html")
    print(f"Results: {workdir}/{', '.join(written)}; again: {command_line('evaluate')} --run {workdir}")


def time_summary(seconds: dict[str, float], counts: dict[str, int]) -> str:
    """Where the time went, in a line."""
    parts = [f"{k} {v:.1f} s" for k, v in seconds.items() if v >= 0.05 and k != "total"]
    reused = counts.get("reused")
    warm = f" ({reused:,} feature{'s' * (reused > 1)} from the cache)" if reused else ""
    return f"{seconds['total']:.1f} s in all{warm}: {', '.join(parts)}"
