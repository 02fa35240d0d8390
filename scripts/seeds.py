"""One configuration under several seeds, each in a process of its own: errors of n, their median, and the seconds.

    python scripts/seeds.py --config configs/dogscats_lite0.yaml --root data/dogscats [--seeds 0 1 2 3 4]

Run folders go to a temporary folder; features are cached, so only the first run is cold.
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
            found = json.loads((workdir / "metrics.json").read_text())
            errors.append(found["errors"])
            counts = found["features"]
            print(
                f"seed {seed}: {found['errors']} errors of {found['n']:,}, log loss {found['log_loss']:.4f}, "
                f"{seconds:.1f} s the whole process ({counts.get('computed', 0):,} features computed)",
                flush=True,
            )
    print(f"median of {len(errors)} seeds: {statistics.median(errors):g} errors")


if __name__ == "__main__":
    main()
