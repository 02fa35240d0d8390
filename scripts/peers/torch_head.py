"""The lesson's head on cached features, in plain PyTorch: three warm epochs, and lr_find of 100 iterations.

The features are random. An epoch trains on every row and evaluates half as many others, as a job does; lr_find grows the
rate from 1e-7 to 10 and stops as fastai does, when the average loss passes four times its best. Images per second count
the rows that were trained on. Prints one JSON line.
    python torch_head.py --rows 2000 --width 2560

Environment:
    python -m venv venv && . venv/bin/activate
    pip install torch==2.13.0
"""

import argparse
import json
import os
import statistics
import time

import torch
from _head import batches_of, evaluate, make_head, make_optimizer, train_batch
from _heap import keep_freed_memory


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--mode", choices=["both", "fit", "lr_find"], default="both")
    p.add_argument("--rows", type=int, default=2000)
    p.add_argument("--width", type=int, default=2560, help="features of a row")
    p.add_argument("--bs", type=int, default=64)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--iterations", type=int, default=100, help="of lr_find")
    p.add_argument("--opt", choices=["adam", "sgd"], default="sgd")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile the head")
    p.add_argument("--keep-heap", action="store_true", help="malloc keeps freed memory (see _heap): CPU only")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=0, help="0: torch's default")
    return p.parse_args()


def fit(a, head, data):
    """Trains three epochs; returns the number of rows that it trained on."""
    (x, y), (v, w) = data
    optimizer, rows = make_optimizer(a.opt, head.parameters(), 0.01), 0
    for _ in range(a.epochs):
        head.train()
        total = 0
        for chosen in batches_of(len(x), a.bs, x.device):
            total += train_batch(head, optimizer, x[chosen], y[chosen])
            rows += a.bs
        float(total)
        evaluate(head, v, w)
    return rows


def lr_find(a, head, data):
    """Does the range test; returns the number of rows that it trained on."""
    x, y = data[0]
    head.train()
    optimizer, best, average, done, order = make_optimizer(a.opt, head.parameters(), 1e-7), float("inf"), 0.0, 0, []
    for i in range(a.iterations):
        order = order or batches_of(len(x), a.bs, x.device)
        chosen = order.pop()
        optimizer.param_groups[0]["lr"] = 1e-7 * 1e8 ** (i / a.iterations)
        loss = float(train_batch(head, optimizer, x[chosen], y[chosen]))
        done += 1
        average = 0.98 * average + 0.02 * loss
        smooth = average / (1 - 0.98**done)
        best = min(best, smooth)
        if not smooth <= 4 * best:
            break
    return done * a.bs


def measure(run, a, data):
    """Measures the first round, which compiles, and the rounds after it, each with a fresh head."""
    head = make_head(a.width, 2, a.device)
    start = {k: v.clone() for k, v in head.state_dict().items()}
    fn = torch.compile(head) if a.compile else head
    sync = torch.cuda.synchronize if a.device == "cuda" else lambda: None
    seconds, rates, rows = [], [], 0
    for _ in range(a.rounds + 1):
        head.load_state_dict(start)
        sync()
        before = time.perf_counter()
        rows = run(a, fn, data)
        sync()
        seconds.append(time.perf_counter() - before)
        rates.append(rows / seconds[-1])
    return {
        "rows": rows,
        "first_s": round(seconds[0], 3),
        "seconds": round(statistics.median(seconds[1:]), 4),
        "best": round(max(rates[1:]), 1),
        "median": round(statistics.median(rates[1:]), 1),
    }


def main():
    load = os.getloadavg()[0]
    a = parse()
    if a.keep_heap:
        keep_freed_memory()
    if a.threads:
        torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    data = [
        (torch.randn(n, a.width, device=a.device), torch.randint(0, 2, (n,), device=a.device))
        for n in (a.rows, a.rows // 2)
    ]
    out = {k: getattr(a, k) for k in ("rows", "width", "bs", "opt", "device", "compile", "keep_heap")}
    if a.mode != "lr_find":
        out["fit_img_s"] = measure(fit, a, data)
    if a.mode != "fit":
        out["lr_find_img_s"] = measure(lr_find, a, data)
    out |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "load_before": round(load, 2)}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
