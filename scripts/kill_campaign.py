"""Kills trainings (SIGKILL) at random moments, resumes them, and compares the results with an undisturbed training:

    python scripts/kill_campaign.py [--runs 50] [--seed 0] [--backbone efficientnet_lite0] [--out out.json]

Each run has its own folder and cache, and trains on drawn images. The script chooses a random stage (start, index,
features, training, checkpoint, evaluation, report) and a random moment in it, and kills the run. It kills half of the
runs a second time while they resume. Then the run resumes to its end, and its results must be those of the undisturbed
run: the same bytes in model.safetensors, predictions.csv and config.yaml, the same losses in metrics.jsonl, the same
numbers in metrics.json, and the same files in the run folder and in the cache. The exit code is 1 if any run differs.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo_images import draw

CONFIG = """
data: {{root: {root}, size: {size}}}
model: {{backbone: {backbone}, pretrained: {pretrained}, head: linear}}
checkpoint: {{every_steps: 2}}
phases:
  head: {{epochs: 3, lr: 0.01, precompute: true, batch_size: 16}}
  all: {{epochs: 3, lr: 0.01, freeze: nothing, bn: train, augment: side_on, batch_size: 16}}
"""
STAGES = ("start", "index", "features", "training", "checkpoint", "evaluation", "report")
PROGRAM = "import sys; {extra}from jaxcats.common.cli import run_command; from jaxcats.train.__main__ import main; sys.exit(run_command(main))"
SECONDS_AT_MOST = 300


def stage(run: Path, cache: Path) -> str:
    """The stage of a run, as its folder and its cache show it."""
    checkpoints = run / "checkpoints"
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []
    if any("tmp" in name for name in names) and not (run / "predictions.csv").exists():
        return "checkpoint"
    if (run / "predictions.csv").exists():
        return "report"
    if not (run / "config.yaml").exists():
        return "start"
    if not (run / "data.json").exists():
        return "index"
    if not any(cache.glob("features/*/*.safetensors")):
        return "features"
    last = max((int(name) for name in names if name.isdigit()), default=0)
    return "evaluation" if last and last == _last_step(run) else "training"


def _last_step(run: Path) -> int:
    try:
        return json.loads((run.parent / "last.json").read_text())
    except FileNotFoundError:
        return 0


class Run:
    """A run folder with its own cache."""

    def __init__(self, place: Path, name: str, program: str):
        self.folder, self.cache, self.program = place / name, place / f"{name}-cache", program
        self.config = place / "config.yaml"
        # Compiled programs are shared, so that a run takes seconds.
        self.cache.mkdir()
        (place / "xla").mkdir(exist_ok=True)
        (self.cache / "xla").symlink_to(place / "xla")

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-c", self.program, "--config", self.config, "--workdir", self.folder, "--resume"]
        # Otherwise a compiled program's key has the cache folder's path in it, and nothing is shared.
        env = os.environ | {"JAXCATS_CACHE": str(self.cache), "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none"}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        return subprocess.Popen([str(w) for w in command], env=env, start_new_session=True, **pipe)

    def finish(self) -> str:
        """Runs to the end; returns what was printed."""
        child = self.start()
        said = child.communicate(timeout=SECONDS_AT_MOST)[0]
        if child.returncode:
            raise SystemExit(f"{self.folder}: exit code {child.returncode}\n{said}")
        return said

    def watched(self) -> dict[str, float]:
        """Runs to the end; returns the seconds in each stage."""
        child, seconds, before = self.start(), collections.Counter(), time.perf_counter()
        while child.poll() is None:
            time.sleep(0.005)
            now = time.perf_counter()
            seconds[stage(self.folder, self.cache)] += now - before
            before = now
        if child.returncode:
            raise SystemExit(child.communicate()[0])
        return dict(seconds)

    def killed(self, wanted: str, wait: float) -> str | None:
        """Starts the run and kills it `wait` seconds after it has reached a stage.

        Returns:
            The stage at which it was killed; None if it had ended before.
        """
        child, deadline = self.start(), time.monotonic() + SECONDS_AT_MOST
        while STAGES.index(stage(self.folder, self.cache)) < STAGES.index(wanted) and child.poll() is None:
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.folder}: not at {wanted} after {SECONDS_AT_MOST} s")
            time.sleep(0.002)
        time.sleep(wait)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        said = child.communicate()[0]
        if child.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"{self.folder}: exit code {child.returncode}\n{said}")
        return stage(self.folder, self.cache) if child.returncode else None

    def outcome(self) -> dict[str, object]:
        """Everything that must be the same as in the undisturbed run."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        metrics = json.loads((self.folder / "metrics.json").read_text())
        bits = ["model/model.safetensors", "predictions.csv", "config.yaml", "bad_files.json"]
        return {
            "bytes": {n: hashlib.sha256((self.folder / n).read_bytes()).hexdigest() for n in bits},
            "losses": [(r["step"], r["loss"]) for r in rows if "loss" in r],
            "metrics": {k: v for k, v in metrics.items() if k not in ("seconds", "features")},
            "run files": files(self.folder),
            "cache files": [n for n in files(self.cache) if not n.startswith("index/")],
        }


def files(folder: Path) -> list[str]:
    """The names of all files below a folder, without those that have random parts (of Orbax and TensorBoard)."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [n for n in names if "/d/" not in n and "process_0" not in n and not n.startswith("tensorboard/")]


def difference(found: object, wanted: object) -> object:
    """What to print when two results differ."""
    if isinstance(found, list) and isinstance(wanted, list) and all(isinstance(n, str) for n in found + wanted):
        return {"more": sorted(set(found) - set(wanted)), "fewer": sorted(set(wanted) - set(found))}
    return found, wanted


def campaign(place: Path, *, runs: int, seed: int, program: str) -> dict[str, object]:
    """Does the undisturbed run and then `runs` disturbed ones; returns the number of kills by stage and the differences."""
    warming = Run(
        place, "warming", program
    )  # compiles, so that the stages of the next run are as long as those of the others
    warming.finish()
    steps = [int(p.name) for p in (warming.folder / "checkpoints").iterdir() if p.name.isdigit()]
    (place / "last.json").write_text(json.dumps(max(steps)))
    whole = Run(place, "whole", program)
    seconds = whole.watched()
    wanted = whole.outcome()
    print("seconds in each stage, undisturbed:", {s: round(seconds.get(s, 0), 2) for s in STAGES}, flush=True)
    struck, wrong = collections.Counter(), {}
    dice = random.Random(seed)
    for number in range(runs):
        stages, tries = [], 0
        while not stages:  # a run that ended before its kill was not disturbed; try again
            tries += 1
            run = Run(place, f"run{number}.{tries}", program)
            for _ in range(dice.choice((1, 2))):
                at = dice.choice(STAGES)
                stages += filter(None, [run.killed(at, dice.uniform(0, max(seconds.get(at, 0), 0.05)))])
        struck.update(stages)
        said = run.finish()
        found = run.outcome()
        differs = [k for k in wanted if found[k] != wanted[k]]
        if differs:
            wrong[number] = {k: difference(found[k], wanted[k]) for k in differs} | {"killed at": stages}
        resumed = (
            "Resuming" if "Resuming at" in said else "evaluated again" if "Finished already" in said else "started"
        )
        print(
            f"run {number}: killed in {' and '.join(stages)}; {resumed}; {', '.join(differs) or 'the same'}", flush=True
        )
    return {"runs": runs, "kills": dict(struck), "same": runs - len(wrong), "wrong": wrong}


def main() -> None:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=int, default=50)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--backbone", default="efficientnet_lite0")
    p.add_argument("--random", action="store_true", help="a network of random weights")
    p.add_argument("--size", type=int, default=64)
    p.add_argument("--images", type=int, default=96, help="for training; half as many for validation")
    p.add_argument("--import", dest="module", help="a module that registers the backbone")
    p.add_argument("--out", type=Path, help="a JSON file for the result")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        root = draw(place / "photos", n_train=args.images, n_valid=args.images // 2)
        settings = {"backbone": args.backbone, "pretrained": str(not args.random).lower(), "size": args.size}
        (place / "config.yaml").write_text(CONFIG.format(root=root, **settings))
        program = PROGRAM.format(extra=f"import {args.module}; " if args.module else "")
        result = campaign(place, runs=args.runs, seed=args.seed, program=program)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['same']} of {result['runs']} runs ended like the undisturbed one; kills: {result['kills']}")
    if result["wrong"]:
        print(json.dumps(result["wrong"], indent=1)[:4000])
        sys.exit(1)


if __name__ == "__main__":
    main()
