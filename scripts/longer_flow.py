"""The lesson's longer flow on a folder of photos, each step with its errors, interval and seconds:

    python scripts/longer_flow.py --root PHOTOS [--backbone efficientnet_lite0] [--cycles 1] [--out runs/longer_flow]

lr_find and the valley's rate; fit(rate, 3) on features; precompute off, side_on, cycles of one epoch; every layer at
three rates; TTA after each of the last two. On two CPU cores all layers learn at a few photos a second: --cycles says how
many the unfrozen part has (the lesson's 3 with cycle_mult 2 are 7 epochs).
"""

import argparse
import json
import time
from pathlib import Path

import jaxcats as jc
from jaxcats.common import stats
from jaxcats.train.lr_finder import write_lr_find


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", required=True)
    p.add_argument("--backbone", default="efficientnet_lite0")
    p.add_argument("--augmented", type=int, default=3, help="epochs of the head with augmentation")
    p.add_argument("--cycles", type=int, default=1, help="cycles of all layers, each twice as long as the one before")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("runs/longer_flow"))
    args = p.parse_args()
    data = jc.ImageClassifierData.from_paths(args.root, size=224, seed=args.seed)
    learn = jc.Learner.pretrained(args.backbone, data, precompute=True, workdir=args.out)
    rows, started = [], time.perf_counter()

    def note(name: str, log_probs=None) -> None:
        nonlocal started
        errors, n = learn.errors(log_probs)
        y = data.val_y
        loss = -float((learn.predict() if log_probs is None else log_probs)[range(n), y].mean())
        interval = stats.wilson_interval(n - errors, n)
        seconds = time.perf_counter() - started
        rows.append(
            {"step": name, "errors": errors, "n": n, "interval": interval, "log_loss": loss, "seconds": seconds}
        )
        print(f"{name:<48} {jc.sentence(errors, n)}, log loss {loss:.4f}, {seconds:.0f} s", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "steps.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        started = time.perf_counter()

    found = learn.lr_find()
    print(found)
    write_lr_find(args.out, found)
    rate = found.suggestion()
    learn.fit(rate, 3)
    note(f"features, fit({rate:.2g}, 3)")
    learn.precompute, data.augment = False, "side_on"
    learn.fit(rate, args.augmented, cycle_len=1)
    note(f"side_on, fit({rate:.2g}, {args.augmented}, cycle_len=1)")
    note("  with TTA(4)", learn.TTA(4))
    learn.save("head")
    learn.unfreeze()
    rates = (rate / 100, rate / 10, rate)
    learn.fit(rates, args.cycles, cycle_len=1, cycle_mult=2)
    note(f"all layers at {', '.join(f'{r:.1g}' for r in rates)}, {args.cycles} cycle(s)")
    note("  with TTA(4)", learn.TTA(4))
    learn.save("all")


if __name__ == "__main__":
    main()
