"""Trains one configuration with several seeds, each in its own process, and prints the errors and seconds of each.

    python scripts/seeds.py --config configs/dogscats_lite0.yaml --root data/dogscats [--seeds 0 1 2 3 4]

The run folders are temporary. Features are cached, so only the first run computes them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            workdir = Path(folder) / str(seed)
            command = [sys.executable, "-m", "jaxcats.train", "--config", args.config, "--data.root", args.root]
            command += ["--report", "false", "--export", "false"]
            before = time.perf_counter()
            subprocess.run(
                [*command, "--seed", str(seed), "--workdir", str(workdir)], check=True, stdout=subprocess.DEVNULL
            )
            seconds = time.perf_counter() - before
            metrics = json.loads((workdir / "metrics.json").read_text())
            errors.append(metrics["errors"])
            counts = metrics["features"]
            print(
                f"seed {seed}: {metrics['errors']} errors of {metrics['n']:,}, log loss {metrics['log_loss']:.4f}, "
                f"{seconds:.1f} s the whole process ({counts.get('computed', 0):,} features computed)",
                flush=True,
            )
    print(f"median of {len(errors)} seeds: {statistics.median(errors):g} errors")


if __name__ == "__main__":
    main()
