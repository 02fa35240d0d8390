"""Measures one part of jaxcats and prints one JSON line; with --peer, in turns with another program (A B A B).

    python scripts/benchmark.py features --backbone efficientnet_lite0 --batch 32
    python scripts/benchmark.py step --backbone resnet34 --devices 2
    python scripts/benchmark.py decode --root data/dogscats/train --scale 300,3000,30000
    python scripts/benchmark.py job --root data/dogscats
    python scripts/benchmark.py features --peer "python scripts/peers/torch_throughput.py --mode features" \\
        --peer-key features_img_s.median

The parts are:

    step       a train step of all layers on random images
    features   the forward pass of the frozen backbone on random images, or with --root on files
    decode     image files to uint8 batches
    head       three epochs of the lesson's head on random features
    lr_find    100 iterations of the range test on random features
    job        the whole lesson, cold and warm
    ceiling    the limits of the machine: a matrix product, a copy, and with --root the JPEG decoder alone

Without --root no part needs TensorFlow or jsonargparse.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measurements import CONFIGS, device, versions
from measurements import RUNS as PARTS
from whole_job import photo_folder, run_job

RUNS = {**PARTS, "job": run_job}


def child(command: list[str]) -> dict[str, Any]:
    """Runs a command; returns the last JSON line that it prints, with the seconds of the whole process."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        sys.exit(f"{shlex.join(command)}: exit code {done.returncode}\n{(done.stderr or done.stdout)[-2000:]}")
    return {"wall_seconds": round(seconds, 2)} | json.loads(lines[-1])


def value_of(line: dict[str, Any], key: str) -> float:
    """The number at a dotted key."""
    value: Any = line
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            sys.exit(f"no {key!r} in {json.dumps(line)}")
        value = value[part]
    return float(value)


def in_turns(p: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Runs this measurement and the peer in turns; returns the median line of each and the ratios of the pairs.

    A ratio above 1 means that jaxcats is faster.
    """
    if not p.peer_key:
        sys.exit("--peer: needs --peer-key, the dotted place of the number in the peer's JSON line.")
    ours, theirs, ratios = [], [], []
    for _ in range(p.pairs):
        ours.append(child([sys.executable, __file__, *rest]))
        theirs.append(child(shlex.split(p.peer)))
        a, b = value_of(ours[-1], p.key), value_of(theirs[-1], p.peer_key)
        ratios.append(b / a if p.less else a / b)

    def median(lines: list[dict[str, Any]], key: str) -> dict[str, Any]:
        return sorted(lines, key=lambda line: value_of(line, key))[(len(lines) - 1) // 2]

    rounded = {"ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios]}
    return median(ours, p.key) | {"peer": median(theirs, p.peer_key), "peer_command": p.peer} | rounded


def in_sizes(p: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Measures each number of images in its own process."""
    root = parse(rest).root
    if not root:
        sys.exit("--scale: needs --root, the photos that the larger folders are made of.")
    lines = []
    for n in map(int, p.scale.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            photos = photo_folder(Path(root), n, Path(folder))
            lines.append(child([sys.executable, __file__, *rest, "--root", str(photos)]))  # the last --root counts
    shown = ("images", "images_per_second", "peak_memory_bytes", "wall_seconds", "cold", "warm")
    return lines[-1] | {"scale": [{k: line[k] for k in shown if k in line} for line in lines]}


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--peer and --scale run this script in processes of their own.",
        parents=[outer_options()],
    )
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("--backbone", choices=CONFIGS, default="efficientnet_lite0")
    parser.add_argument("--batch", type=int, help="default: 32, and 64 for head, lr_find and decode")
    parser.add_argument("--size", type=int, help="side in pixels (default: the backbone's); ceiling: of the product")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the arithmetic")
    parser.add_argument("--rounds", type=int, default=4, help="measured; more come first to compile (job: warm runs)")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long a round is")
    parser.add_argument("--devices", type=int, default=1, help="step and features; on a CPU they are simulated")
    parser.add_argument("--root", help="folder of photos")
    parser.add_argument("--limit", type=int, help="images of --root, spread evenly; head, lr_find: rows (2000)")
    parser.add_argument("--state", choices=["both", "cold", "warm"], default="both", help="job: what is run and shown")
    parser.add_argument("--cache", help="job: cache folder, kept; with --state warm one that a run has filled")
    parser.add_argument("--random-weights", action="store_true", help="job: where the weights can't be had")
    a = parser.parse_args(argv)
    if a.what in ("decode", "job") and not a.root:
        parser.error(f"{a.what} needs --root")
    if min(a.rounds, a.devices) < 1:
        parser.error("--rounds and --devices must be at least 1")
    a.batch = a.batch or (64 if a.what in ("head", "lr_find", "decode") else 32)
    return a


def outer_options() -> argparse.ArgumentParser:
    """The options for measurements that run in child processes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("in processes of their own")
    group.add_argument("--scale", help="numbers of images, with commas between (features, decode, job)")
    group.add_argument("--peer", metavar="COMMAND", help="run it in turns with this measurement")
    group.add_argument("--pairs", type=int, default=3)
    group.add_argument("--key", default="images_per_second.median", help="of our line; wall_seconds: whole process")
    group.add_argument("--peer-key", help="of the peer's last line, features_img_s.median say")
    group.add_argument("--less", action="store_true", help="the numbers are seconds: less is better")
    return parser


def main() -> None:
    """The command."""
    load = os.getloadavg()[0]
    if "-h" not in sys.argv and "--help" not in sys.argv:
        p, rest = outer_options().parse_known_args()
        parse(rest)  # so that a mistake is reported before anything runs
        if p.peer or p.scale:
            print(json.dumps(in_turns(p, rest) if p.peer else in_sizes(p, rest)))
            return
    a = parse(sys.argv[1:])
    if a.devices > 1:
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={a.devices}"
        )
    results = RUNS[a.what](a)
    name, peak = device()
    facts = {"what": a.what, "backbone": a.backbone, "batch": a.batch, "size": a.size, "dtype": a.dtype, "device": name}
    facts |= {"devices": a.devices, "images_per_second": None, "compile_seconds": None, "peak_memory_bytes": peak}
    print(json.dumps(facts | results | {"versions": versions(), "load_before": round(load, 2)}))


if __name__ == "__main__":
    main()
