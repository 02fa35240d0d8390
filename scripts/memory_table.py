"""Measures how the peak memory of the train command grows with the number of images.

    python scripts/memory_table.py --root PHOTOS [--images 3000 30000] [--size 64] [--backbone efficientnet_lite0]

It trains with precomputed features and with a stream of augmented images. A folder larger than the dataset gets copies
with a few bytes after the end of the image, because the features of equal files are computed only once. Each run has its
own cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from whole_job import photo_folder

CONFIG = """
report: false
export: false
data: {{root: {root}, size: {size}}}
model: {{backbone: {backbone}}}
phases:
  head: {{epochs: 1, lr: 0.01, {options}}}
"""
KINDS = {"precompute": "precompute: true", "stream": "augment: side_on"}


def peak(folder: Path, config: str) -> tuple[int, float]:
    """Runs the train command with a configuration; returns its peak resident bytes and its seconds."""
    folder.mkdir()
    (folder / "c.yaml").write_text(config)
    command = [sys.executable, "-m", "jaxcats.train", "--config", folder / "c.yaml", "--workdir", folder / "run"]
    before = time.perf_counter()
    with open(folder / "log", "w+") as log:
        child = subprocess.Popen(
            [str(c) for c in command], stdout=log, stderr=log, env=os.environ | {"JAXCATS_CACHE": str(folder / "cache")}
        )
        _, status, usage = os.wait4(child.pid, 0)
        log.seek(0)
        if status:
            sys.exit(log.read()[-2000:])
    return usage.ru_maxrss * 1024, time.perf_counter() - before


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", type=Path, required=True, help="a folder of images with train/ and valid/")
    p.add_argument("--images", type=int, nargs="+", default=[3000, 30000])
    p.add_argument("--size", type=int, default=64)
    p.add_argument("--backbone", default="efficientnet_lite0")
    a = p.parse_args()
    peaks: dict[str, list[int]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for n in a.images:
            root = photo_folder(a.root, n, place / f"photos{n}")
            for kind, options in KINDS.items():
                run = place / f"{kind}{n}"
                config = CONFIG.format(root=root, size=a.size, backbone=a.backbone, options=options)
                memory, seconds = peak(run, config)
                peaks[kind].append(memory)
                index = sum(f.stat().st_size for f in (run / "cache" / "index").iterdir()) / n
                print(
                    f"{n:,} images, {kind}: {memory / 2**20:,.0f} MiB at most, {seconds:.0f} s; "
                    f"index file {index:.0f} bytes an image",
                    flush=True,
                )
    few, many = min(a.images), max(a.images)
    for kind, values in peaks.items():
        grown = max(values) - values[a.images.index(few)]
        print(f"{kind}: {grown / max(many - few, 1):,.0f} bytes more for each further image")


if __name__ == "__main__":
    main()
