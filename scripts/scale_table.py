"""Measures how cost grows with images, pixels, batch and devices, and writes the last section of BENCHMARKS.md.

    python scripts/scale_table.py --root PHOTOS

It takes about half an hour on a CPU. The file --lines keeps the measurements; what is in it is not measured again.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCALE = "\n## Scale\n"
SHORT = "--backbone efficientnet_lite0 --seconds 3 --rounds 3"
SIZES, BATCHES, DEVICES = (64, 128, 224, 384), (16, 32, 64, 128, 256), (1, 2, 4)


def commands(root: Path) -> list[str]:
    """The arguments of benchmark.py for each measurement."""
    arguments = [f"{what} {SHORT} --size {size}" for size in SIZES for what in ("features", "step")]
    arguments += [
        f"{what} {SHORT} --batch {b}" for what in ("features", "step") for b in BATCHES if b < 256 or what != "step"
    ]
    arguments += [f"{what} {SHORT} --devices {n}" for n in DEVICES for what in ("features", "step")]
    train = shlex.quote(str(root / "train"))
    arguments.append(f"decode --root {train} --rounds 1 --scale 300,3000,30000")
    arguments.append(f"features --backbone efficientnet_lite0 --rounds 1 --root {train} --scale 300,3000")
    return arguments


def measure(command: str) -> list[dict[str, Any]]:
    """Runs benchmark.py and returns the JSON lines that it prints."""
    done = subprocess.run(
        [sys.executable, str(HERE / "benchmark.py"), *shlex.split(command)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"benchmark.py {command}\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def rate(line: dict[str, Any]) -> str:
    return f"{line['images_per_second']['median']:,.0f} img/s, {line['peak_memory_bytes'] / 2**30:.1f} GiB"


def render(lines: dict[str, list[dict[str, Any]]]) -> str:
    """The section of BENCHMARKS.md, from the measured lines by command."""

    def row(option: str, values: tuple[int, ...], what: str) -> list[str]:
        measured = (lines.get(f"{what} {SHORT} --{option} {v}") for v in values)
        return [rate(x[0]) if x else "" for x in measured]

    def both(option: str, values: tuple[int, ...], head: str) -> str:
        columns = zip(values, row(option, values, "features"), row(option, values, "step"), strict=True)
        return table([head, "features", "train step"], [[str(v), f, s] for v, f, s in columns])

    images = [
        [f"{line['images']:,}", measured[0]["what"], rate(line)]
        for command, measured in lines.items()
        if "--scale" in command
        for line in measured[0]["scale"]
    ]
    parts = [
        f"EfficientNet-Lite0, float32, 224 px and batch 32 unless said; images a second and the process's peak memory.\n"
        "All of it: `python scripts/scale_table.py --root PHOTOS`; row by row `benchmark.py features` or `step` with "
        f"`{SHORT}` and the option named. Simulated devices share the same two cores, so the table of devices shows only what is lost.\n",
        both("size", SIZES, "`--size`, px"),
        both("batch", BATCHES, "`--batch`"),
        both("devices", DEVICES, "`--devices`"),
        table(["images (`--scale`)", "what", ""], images),
    ]
    return SCALE + "\n" + "\n".join(parts)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="photos: train/ and valid/, a folder per class")
    parser.add_argument(
        "--lines", type=Path, default=Path("scale_lines.json"), help="the file that keeps the measurements"
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "BENCHMARKS.md")
    a = parser.parse_args()
    lines = json.loads(a.lines.read_text()) if a.lines.exists() else {}
    for command in commands(a.root):
        if command not in lines:
            print(f"benchmark.py {command}", flush=True)
            lines[command] = measure(command)
            a.lines.write_text(json.dumps(lines, indent=1))
    text = a.out.read_text(encoding="utf-8").partition(SCALE)[0].rstrip("\n")
    a.out.write_text(text + "\n" + render({c: lines[c] for c in commands(a.root)}), encoding="utf-8")


if __name__ == "__main__":
    main()
