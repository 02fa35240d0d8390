"""Measures each part of jaxcats beside PyTorch, and writes BENCHMARKS.md.

    python scripts/benchmark_table.py --root data/dogscats --peer-python venv-torch/bin/python

Each row is two calls of benchmark.py: one beside the best PyTorch setting that was found and one beside what most people
write. Both programs run in turns (A B A B), so that a busy machine slows both alike. The file --lines keeps the
measurements; --only measures some rows again and --render none. The part of BENCHMARKS.md from "## Log" on is written by
hand and stays. It takes about 40 minutes on a CPU.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LOG = "\n## Log\n"
TUNED = "--channels-last --keep-heap"
# name -> (ours, key, peer's script with its best options, with usual ones, peer's key, less is better)
ROWS: dict[str, tuple[str, str, str, str, str, bool]] = {}
for network, title in (("efficientnet_lite0", "EfficientNet-Lite0"), ("resnet34", "ResNet34")):
    run = f"torch_throughput.py --arch {network}"
    ROWS[f"{title}, frozen features, 224 px, batch 32"] = (
        f"features --backbone {network}",
        "images_per_second.median",
        f"{run} --mode features {TUNED} --compile --freeze-graph",
        f"{run} --mode features --stock-padding",
        "features_img_s.median",
        False,
    )
    ROWS[f"{title}, train step, 224 px, batch 32"] = (
        f"step --backbone {network}",
        "images_per_second.median",
        f"{run} --mode train {TUNED}",
        f"{run} --mode train --stock-padding",
        "train_img_s.median",
        False,
    )
ROWS |= {
    "Decoding: JPEG files to 224 px batches": (
        "decode --root {root}/train --limit 1000",
        "images_per_second.best",
        "torch_decode.py --root {root}/train --limit 1000 --workers 2",
        "torch_decode.py --root {root}/train --limit 1000 --workers 0",
        "best_img_s",
        False,
    ),
    "Head fit on cached features, 3 epochs of 2,000": (
        "head --rounds 8",
        "images_per_second.median",
        "torch_head.py --mode fit --opt sgd --keep-heap --rounds 8",
        "torch_head.py --mode fit --opt sgd --rounds 8",
        "fit_img_s.median",
        False,
    ),
    "lr_find, 100 iterations on cached features": (
        "lr_find --rounds 8",
        "images_per_second.median",
        "torch_head.py --mode lr_find --opt sgd --keep-heap --rounds 8",
        "torch_head.py --mode lr_find --opt sgd --rounds 8",
        "lr_find_img_s.median",
        False,
    ),
    "Whole job, cold: 3,000 photos, 3 epochs (whole process)": (
        "job --root {root} --state cold",
        "wall_seconds",
        "torch_precompute_job.py --root {root} --opt sgd --keep-heap",
        "torch_precompute_job.py --root {root} --opt sgd --workers 0",
        "wall_seconds",
        True,
    ),
    "Whole job, warm: the same again (whole process)": (
        "job --root {root} --state warm --cache {scratch}/cache --rounds 3",
        "wall_seconds",
        "torch_precompute_job.py --root {root} --opt sgd --keep-heap --features-cache {scratch}/features.pt",
        "torch_precompute_job.py --root {root} --opt sgd --workers 0",
        "wall_seconds",
        True,
    ),
}


def run(command: str) -> dict[str, Any]:
    """Runs a command; returns its last line, parsed. A failure of the command ends this script."""
    print(command, file=sys.stderr)
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, a: argparse.Namespace) -> dict[str, Any]:
    """Measures one row: jaxcats beside the best and beside the usual PyTorch."""
    ours, key, best, usual, peer_key, less = ROWS[name]
    places = {"root": a.root, "scratch": a.scratch}
    command = f"{sys.executable} {HERE / 'benchmark.py'} {ours.format(**places)} --key {key} --peer-key {peer_key}"
    command += " --less" if less else ""
    row: dict[str, Any] = {"row": name, "key": key, "peer_key": peer_key, "less": less}
    for kind, peer, pairs in (("best", best, a.pairs), ("usual", usual, 1)):
        theirs = f"{a.peer_python} {HERE / 'peers'}/{peer.format(**places)}"
        if "{scratch}" in peer or "{scratch}" in ours:  # a first run that is not measured fills the caches
            run(f"{sys.executable} {HERE / 'benchmark.py'} {ours.format(**places)}")
            run(theirs)
        row[kind] = run(f"{command} --pairs {pairs} --peer {shlex.quote(theirs)}")
        row[kind]["commands"] = [f"benchmark.py {ours}", f"peers/{peer}"]
    return row


def number(line: dict[str, Any], key: str) -> float:
    for part in key.split("."):
        line = line[part]
    return float(line)  # type: ignore[arg-type]


def render(lines: list[dict[str, Any]], ceiling: dict[str, Any]) -> str:
    """The text of BENCHMARKS.md down to the log."""
    versions = ceiling["versions"]
    first = [
        "# Benchmarks",
        "",
        "jaxcats beside PyTorch on the same machine in the same call, in turns. Above 1: jaxcats is faster. *Best*: the",
        "fastest PyTorch setting found (channels_last, torch.compile with frozen weights, malloc that keeps its memory,",
        "worker processes); *usual*: as most people write it. The ratios are medians of pairs; single ratios in brackets.",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, float32; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("python", "jax", "flax"))
        + f"; PyTorch {peer_version(lines)}.",
        "",
        "| | jaxcats | best PyTorch | ratio to best | usual PyTorch | ratio to usual |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        unit = "s" if line["less"] else "img/s"
        cells = [f"{number(line['best'], line['key']):,.4g} {unit}"]
        for kind in ("best", "usual"):
            ratios = ", ".join(f"{r:.2f}" for r in line[kind]["ratios"])
            cells += [
                f"{number(line[kind]['peer'], line['peer_key']):,.4g} {unit}",
                f"**{line[kind]['ratio']:.2f}**" + (f" ({ratios})" if kind == "best" else ""),
            ]
        first.append(f"| {line['row']} | " + " | ".join(cells) + " |")
    products = ", ".join(f"{k} {v:,}" for k, v in ceiling["gflop_per_second"].items() if k != "best")
    moved = ceiling["copy_gb_read_and_written_per_second"]
    first += [
        "",
        "## The machine's own limits",
        "",
        f"- Matrix product, float32, GFLOP/s: {products}.",
        f"- Memory, GB/s read and written: {', '.join(f'{k} {v}' for k, v in moved.items())}.",
        *(
            [f"- Pillow alone, files/s: {ceiling['images_per_second']['best']:,}."]
            if "images_per_second" in ceiling
            else []
        ),
        "",
        "## Commands",
        "",
        "All of it: `python scripts/benchmark_table.py --root PHOTOS --peer-python PYTHON_WITH_TORCH`. Row by row, in scripts/:",
        "",
    ]
    for line in lines:
        ours, best = line["best"]["commands"]
        first.append(f"- {line['row']}: `{ours}`; best `{best}`; usual `{line['usual']['commands'][1]}`.")
    return "\n".join(first) + "\n"


def peer_version(lines: list[dict[str, Any]]) -> str:
    return next((line["best"]["peer"]["torch"] for line in lines if "torch" in line["best"]["peer"]), "?")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="photos: train/ and valid/, a folder per class")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has PyTorch")
    parser.add_argument("--pairs", type=int, default=3, help="with the best PyTorch; one with the usual")
    parser.add_argument("--only", help="rows whose name holds this")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--scratch", default="/tmp/jaxcats-benchmark", help="folder of the warm jobs' caches")
    parser.add_argument("--lines", type=Path, default=Path("benchmark_lines.json"), help="what was measured")
    parser.add_argument("--out", type=Path, default=HERE.parent / "BENCHMARKS.md")
    a = parser.parse_args()
    kept = json.loads(a.lines.read_text()) if a.lines.exists() else {}
    Path(a.scratch).mkdir(parents=True, exist_ok=True)
    if not a.render:
        if not a.only:
            kept["ceiling"] = run(f"{sys.executable} {HERE / 'benchmark.py'} ceiling --root {a.root}/train --limit 500")
        for name in ROWS:
            if not a.only or a.only in name:
                kept[name] = measure(name, a)
                a.lines.write_text(json.dumps(kept, indent=1))
    _, log, written = (a.out.read_text() if a.out.exists() else "").partition(LOG)  # by hand, and kept
    a.out.write_text(render([kept[name] for name in ROWS if name in kept], kept["ceiling"]) + log + written)


if __name__ == "__main__":
    main()
