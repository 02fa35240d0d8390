"""The end of a training: writes predictions.csv, metrics.json, model/ and report.html into the run folder.

train/__main__.py loads this module by name, because train/ may not import export/ (docs/architecture.md).
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.common.cli import command_line
from jaxcats.common.errors import UserError
from jaxcats.common.io import write_json
from jaxcats.core import mesh
from jaxcats.evaluate.predictions import write_results
from jaxcats.evaluate.run import Run
from jaxcats.train.experiment import Experiment
from jaxcats.train.loop import TrainingResult


def finish_training(
    experiment: Experiment,
    result: TrainingResult,
    *,
    workdir: Path,
    logits: np.ndarray,
    facts: dict[str, Any],
    seconds: dict[str, float],
    started: float,
) -> None:
    """Writes predictions.csv, metrics.json, model/ and report.html, and prints where they are. Only the primary process calls it.

    Args:
        experiment: what was trained.
        result: the result of the training.
        workdir: the run folder.
        logits: float32 [N, C] of the validation images.
        facts: see train.__main__.run_facts.
        seconds: the time that each part has taken so far; "export" and "report" are added.
        started: time.perf_counter() at the start of the command.
    """
    config, valid = experiment.config, experiment.index.splits["valid"]
    if mesh.has_many_devices():
        params, batch_stats = mesh.to_local(result.params), mesh.to_local(result.batch_stats)
        result = dataclasses.replace(result, params=params, batch_stats=batch_stats)
        mesh.use_first_device_only()
    run = Run(
        folder=workdir,
        config=config,
        model=experiment.model,
        preprocess=experiment.preprocess,
        classes=experiment.index.classes,
        params=result.params,
        batch_stats=result.batch_stats,
        phase=list(config.phases.values())[-1],
        fingerprint=facts["fingerprint"],
        use=config.checkpoint.use,
        step=result.step,
        weights_hash=result.identity,
        best_epoch=config.checkpoint.use == "best",
        user_functions=facts.get("own"),
    )
    results: dict[str, Any] = {"features": result.feature_counts, "bad_files": len(experiment.index.bad)}
    if experiment.user_functions.metrics:
        results["own_metrics"] = experiment.user_functions.measure(logits, valid.labels)
    results |= {"checkpoint": run.checkpoint, "seconds": _with_total(seconds, started)}
    metrics, calibration = write_results(workdir, run, valid, logits, facts=results)
    if config.export:
        from jaxcats.export.program import write_run

        at = time.perf_counter()
        try:
            write_run(run, metrics, calibration)
        except UserError as error:  # a registered backbone may do what no artefact can hold; the training is kept
            print(f"Not exported: {error}", file=sys.stderr)
        seconds["export"] = time.perf_counter() - at
    if config.report:
        from jaxcats.evaluate.figures import EvaluatedSplit
        from jaxcats.evaluate.report import write_evaluation

        at = time.perf_counter()
        write_evaluation(workdir, EvaluatedSplit(run, valid, logits, metrics))
        seconds["report"] = time.perf_counter() - at
    total = _with_total(seconds, started)
    write_json(workdir / "metrics.json", metrics | {"seconds": total})
    print(time_summary(total, result.feature_counts))
    written = [
        name for name in ("metrics.json", "predictions.csv", "model", "report.html") if (workdir / name).exists()
    ]
    print(f"Results: {workdir}/{', '.join(written)}; to evaluate again: {command_line('evaluate')} --run {workdir}")


def _with_total(seconds: dict[str, float], started: float) -> dict[str, float]:
    """The seconds of each part, of everything else, and the total, rounded to milliseconds."""
    total = time.perf_counter() - started
    parts = seconds | {"other": total - sum(seconds.values()), "total": total}
    return {name: round(value, 3) for name, value in parts.items()}


def time_summary(seconds: dict[str, float], counts: dict[str, int]) -> str:
    """Describes in one line how long each part took."""
    parts = [f"{name} {value:.1f} s" for name, value in seconds.items() if value >= 0.05 and name != "total"]
    from_cache = f" ({counts['reused']:,} features from the cache)" if counts.get("reused") else ""
    return f"{seconds['total']:.1f} s in all{from_cache}: {', '.join(parts)}"
