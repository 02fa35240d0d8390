"""The lesson's longer flow on a folder of photos, each step with its errors, interval and seconds:

    python scripts/longer_flow.py --root PHOTOS [--backbone efficientnet_lite0] [--cycles 1] [--out runs/longer_flow]

The steps are: lr_find and the rate of the valley rule; fit(rate, 3) on precomputed features; cycles of one epoch with
the augmentation side_on; all layers at three rates. TTA follows each of the last two. All layers train at a few photos a
second on two CPU cores, so --cycles sets the number of cycles for them (the lesson has 3 with cycle_mult 2: 7 epochs).
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
    p.add_argument("--lr", type=float, help="learning rate (default: what lr_find suggests)")
    p.add_argument("--augmented", type=int, default=3, help="epochs of the head with augmentation")
    p.add_argument("--cycles", type=int, default=1, help="cycles of all layers, each twice as long as the one before")
    p.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("runs/longer_flow"))
    args = p.parse_args()
    data = jc.ImageClassifierData.from_paths(args.root, size=args.size, seed=args.seed)
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

    range_test = learn.lr_find()
    print(range_test)
    write_lr_find(args.out, range_test)
    rate = args.lr or range_test.suggestion()
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
