"""Hashes of what a run computed, to compare two commits of jaxcats: equal lines mean equal bits.

    python scripts/same_bits.py runs/NAME [--model FOLDER --images IMAGE ...]

Prints one line each for predictions.csv and the state of the evaluated checkpoint, and with --images one for the
probabilities that the exported classifier gives for these images. Hashes are equal only on the same machine and versions.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import jaxcats
from jaxcats.common.cli import run_command


def prediction_hash(folder: Path, images: Sequence[Path]) -> str:
    """The SHA-256 of the probabilities of an exported classifier, as float32 [N, C]."""
    predictions = jaxcats.load(folder).predict(images)
    probabilities = np.array([prediction.probabilities for prediction in predictions], np.float32)
    return hashlib.sha256(probabilities.tobytes()).hexdigest()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--model", type=Path, help="an exported classifier (default: RUN/model)")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="image files for the classifier")
    args = parser.parse_args(argv)
    metrics = json.loads((args.run / "metrics.json").read_text(encoding="utf-8"))
    print("predictions.csv", hashlib.sha256((args.run / "predictions.csv").read_bytes()).hexdigest())
    print("checkpoint", metrics["checkpoint"]["state"])
    if args.images:
        print("classifier", prediction_hash(args.model or args.run / "model", args.images))


if __name__ == "__main__":
    sys.exit(run_command(main))
