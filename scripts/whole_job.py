"""Measures the whole lesson for benchmark.py: the train command in its own process, with an empty and with a filled cache."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measurements import CONFIGS, ROOT, summary


def photo_folder(root: Path, n: int, into: Path) -> Path:
    """Fills a folder with n links to the images of train/ and valid/ (or of root), evenly over the classes.

    If n is larger than the number of images, the rest are copies with four bytes after the end of the image, because the
    features of equal files are computed only once.
    """
    parts = [root / p for p in ("train", "valid") if (root / p).is_dir()] or [root]
    files = sorted(p for part in parts for p in part.rglob("*.jpg"))
    for i in range(n):
        turn, file = divmod(i, len(files)) if n > len(files) else (0, i * len(files) // n)
        source = files[file]
        target = into / source.relative_to(root).with_name(f"{turn}_{source.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if turn:
            target.write_bytes(source.read_bytes() + turn.to_bytes(4, "big"))
        else:
            target.symlink_to(source.resolve())
    return into


def train_once(a: argparse.Namespace, root: Path, workdir: Path, cache: Path) -> dict[str, Any]:
    """Runs the train command; returns the seconds of the process and of each phase, its peak memory and its errors."""
    config = ROOT / "configs" / CONFIGS[a.backbone]
    command = [sys.executable, "-m", "jaxcats.train", "--config", str(config), "--data.root", str(root)]
    command += ["--workdir", str(workdir), "--report", "false", "--export", "false", "--precision", a.dtype]
    command += ["--data.size", str(a.size)] if a.size else []
    command += ["--model.pretrained", "false"] if a.random_weights else []
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with open(workdir.parent / f"{workdir.name}.log", "w+") as log:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"JAXCATS_CACHE": str(cache)})
        _, status, usage = os.wait4(child.pid, 0)
        wall, child.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
        log.seek(0)
        if child.returncode:
            sys.exit(f"{shlex.join(command)}\n{log.read()[-2000:]}")
    metrics = json.loads((workdir / "metrics.json").read_text())
    results = {key: metrics[key] for key in ("seconds", "errors", "n")}
    return {"wall_seconds": round(wall, 2), "peak_memory_bytes": usage.ru_maxrss * 1024, **results}


def run_job(a: argparse.Namespace) -> dict[str, Any]:
    """Runs the whole lesson cold, with nothing cached, and then warm, with everything cached."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, root = Path(temporary), Path(a.root)
        if a.limit:
            root = photo_folder(root, a.limit, folder / "photos")
        images = sum(1 for part in ("train", "valid") for _ in (root / part).rglob("*.jpg"))
        cache, out = Path(a.cache) if a.cache else folder / "cache", {}
        resumed = cache.is_dir() and any(cache.iterdir())
        if resumed and a.state != "warm":
            sys.exit(f"--cache {cache}: not empty, so no run on it is cold; add --state warm, or name another.")
        if not resumed:
            out["cold"] = train_once(a, root, folder / "cold", cache)
        if a.state != "cold":
            warm_runs = [train_once(a, root, folder / f"warm{i}", cache) for i in range(a.rounds)]
            out["warm"] = sorted(warm_runs, key=lambda r: r["wall_seconds"])[(a.rounds - 1) // 2]
        shown = out["warm" if a.state == "warm" else "cold"]
        rate = summary([images / shown["wall_seconds"]])
        memory = {"wall_seconds": shown["wall_seconds"], "peak_memory_bytes": shown["peak_memory_bytes"]}
        return {"images_per_second": rate, "images": images, **memory, **out}
