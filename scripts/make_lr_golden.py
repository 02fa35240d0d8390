"""Writes tests/golden/lr_find.json: what fastai's rules suggest on ten recorded range tests, or the error that they raise.

Run it when a curve is added. The tests only read the file:

    pip install fastai
    python scripts/make_lr_golden.py [--out FILE]
"""

import argparse
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fastai
import numpy as np
import torch
from fastai.callback.schedule import minimum, slide, steep, valley
from fastai.learner import AvgSmoothLoss

OUT = Path(__file__).resolve().parents[1] / "tests" / "golden" / "lr_find.json"
START, END = 1e-7, 10.0


def curves() -> dict[str, list[float]]:
    """Raw losses by iteration of a test from 1e-7 to 10; x is the base-10 logarithm of the rate."""
    rng = np.random.default_rng(0)
    x = np.log10(START) + np.log10(END / START) * np.arange(100) / 100
    down = 0.72 / (1 + np.exp(4 * (x + 2.8)))  # falls around 1e-3
    up = np.exp(6 * (x + 0.9))  # and rises beyond 0.1
    noise = rng.normal(0, 0.05, 100)
    bowl = 0.05 + down + 0.2 * up
    found = {
        "noisy valley": bowl + 0.1 + noise * (0.3 + down),
        "smooth bowl": bowl,
        "late divergence": 0.1 + down + np.where(x > -0.2, 60 * (x + 0.2), 0) + noise,
        "nan tail": np.where(np.arange(100) < 74, 0.1 + down + 0.3 * noise, np.nan),
        "inf tail": np.where(np.arange(100) < 80, 0.1 + down + 0.3 * noise, np.inf),
        "flat": np.full(100, 0.6931472),
        "monotone up": 0.7 + 0.02 * np.arange(100),
        "monotone down": 6.9 - 0.05 * np.arange(100),
        "too short": (bowl + 0.2 * noise)[::5],
        "two valleys": bowl + 0.15 + 0.5 * np.exp(-((x + 2) ** 2) / 0.03) + 0.2 * noise,
    }
    return {name: [float(np.float32(v)) for v in values] for name, values in found.items()}


def record(raw: list[float], *, stops: bool) -> tuple[list[float], list[float], str]:
    """Rates, smoothed losses and why the test ended, as fastai's LRFinder and Recorder keep them."""
    average, rates, smoothed, best = AvgSmoothLoss(), [], [], math.inf
    for i, loss in enumerate(raw):
        average.accumulate(SimpleNamespace(loss=torch.tensor(loss)))
        rates.append(START * (END / START) ** (i / len(raw)))
        smoothed.append(float(average.value))
        best = min(best, smoothed[-1])
        if smoothed[-1] > 4 * best and stops:
            return rates, smoothed, "diverged"
    return rates, smoothed, "end"


def suggest(rule: Callable, rates: list[float], smoothed: list[float], asked: int) -> dict[str, float | str]:
    """What fastai's Learner.lr_find suggests by one rule: it drops points at both ends, then applies the rule."""
    lrs, losses = torch.tensor(rates[asked // 10 : -5]), torch.tensor(smoothed[asked // 10 : -5])
    nans = torch.nonzero(torch.isnan(losses.view(-1)))
    if len(nans):
        lrs, losses = lrs[: min(nans)], losses[: min(nans)]
    try:
        return {"lr": rule(lrs, losses, asked)[0]}
    except Exception as error:
        return {"raised": type(error).__name__}


def plain(values: list[float]) -> list[float | str | None]:
    """JSON has no numbers for NaN and infinity, so they become null and "inf"."""
    return [None if math.isnan(v) else "inf" if math.isinf(v) else v for v in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    found = {}
    for name, raw in curves().items():
        # fastai stops at an infinite loss unless told not to (stop_div); its rules are shown a record that went on.
        rates, smoothed, stopped = record(raw, stops=name != "inf tail")
        if name == "inf tail":
            smoothed = [math.inf if math.isnan(v) else v for v in smoothed]
        found[name] = {
            "iterations": len(raw),
            "stopped": stopped,
            "lrs": rates,
            "losses": plain(raw[: len(rates)]),
            "smoothed": plain(smoothed),
            "fastai": {r.__name__: suggest(r, rates, smoothed, len(raw)) for r in (valley, steep, minimum, slide)},
        }
    versions = {"fastai": fastai.__version__, "torch": torch.__version__, "numpy": np.__version__}
    lines = [f"{json.dumps(name)}: {json.dumps(curve)}" for name, curve in found.items()]
    out.write_text(
        f'{{"versions": {json.dumps(versions)},\n"curves": {{\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8"
    )
    for name, curve in found.items():
        print(name, curve["stopped"], len(curve["lrs"]), curve["fastai"])


if __name__ == "__main__":
    main()
