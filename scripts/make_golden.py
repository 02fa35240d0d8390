"""Writes tests/golden/: what torch's networks compute from seeded weights, and small files written by torch.save.

Run it when tests/models/seeded.py or the list of networks changes. The tests only read these files:

    pip install torch torchvision efficientnet_lite_pytorch
    python scripts/make_golden.py [--out FOLDER]

Activations are computed in float64, so that any difference comes from jaxcats.
"""

import argparse
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]

import seeded  # noqa: E402
import torch  # noqa: E402
import torch_reference as reference  # noqa: E402


def activations() -> dict[str, np.ndarray]:
    """Per network: mean, deviation, largest size and eight values of each block's output, and the logits."""
    arrays = {}
    for name in reference.NAMES:
        net = reference.build(name, size=seeded.SHAPE[1:3]).double()
        outputs, logits = reference.run(net, reference.to_torch(seeded.images(), torch.float64))
        for kind, values in seeded.summary(outputs).items():
            arrays[f"{name}/{kind}"] = values
        arrays[f"{name}/logits"] = logits.astype(np.float32)
    return arrays


def training_step() -> dict[str, np.ndarray]:
    """ResNet18 after one SGD step on four images: loss, the change of sampled weights, BatchNorm's averages."""
    net = reference.build("resnet18", size=seeded.STEP_SHAPE[1:3]).double().train()
    before = {name: value.detach().clone() for name, value in net.state_dict().items()}
    images = reference.to_torch(seeded.images(seeded.STEP_SHAPE), torch.float64)
    counts = reference.count_norms(net)
    loss = torch.nn.functional.cross_entropy(net(images), torch.tensor(seeded.STEP_LABELS))
    loss.backward()
    torch.optim.SGD(net.parameters(), lr=seeded.STEP_LR, momentum=0.9).step()
    after = net.state_dict()
    arrays = {"step/loss": np.float64(loss.item())}
    for name in seeded.STEP_TENSORS:
        value = after[name].numpy()
        if name.endswith("running_var"):  # what Flax averages: the biased variance
            n, old = counts[name], 0.9 * before[name].numpy()
            value = old + (value - old) * (n - 1) / n
        arrays[f"step/{name}"] = seeded.sample(value - before[name].numpy())
    return arrays


def tensors() -> dict[str, torch.Tensor]:
    """A tensor of every kind that a file may hold."""
    rng = np.random.default_rng(3)
    base = torch.tensor(rng.normal(size=(6, 5)), dtype=torch.float32)
    return OrderedDict(
        float32=base,
        transposed=base.T,  # these three share a storage
        slice=base[2:5, 1::2],
        float64=torch.tensor(rng.normal(size=3)),
        float16=torch.tensor(rng.normal(size=3)).half(),
        bfloat16=torch.tensor(rng.normal(size=(2, 3))).bfloat16(),
        int64=torch.tensor([-(2**40), 5]),
        int32=torch.tensor([-7, 8], dtype=torch.int32),
        int16=torch.tensor([-7, 8], dtype=torch.int16),
        int8=torch.tensor([-7, 8], dtype=torch.int8),
        uint8=torch.tensor([7, 255], dtype=torch.uint8),
        bool=torch.tensor([True, False, True]),
        scalar=torch.tensor(42),
        parameter=torch.nn.Parameter(torch.tensor(rng.normal(size=4), dtype=torch.float32)),
        channels_last=base[:4, :4].reshape(1, 4, 2, 2).contiguous(memory_format=torch.channels_last),
    )


def files(folder: Path) -> None:
    """tensors_*.pth, their values in tensors.npz, and the weights of the tests' network of one layer in tiny_*.pth."""
    table = tensors()
    tiny = {name: torch.tensor(value) for name, value in seeded.seeded_state(seeded.TINY_SHAPES).items()}
    tiny["net.bn.num_batches_tracked"] = torch.tensor(3)
    for layout, is_zip in (("zip", True), ("legacy", False)):
        torch.save(table, folder / f"tensors_{layout}.pth", _use_new_zipfile_serialization=is_zip)
        torch.save(tiny, folder / f"tiny_{layout}.pth", _use_new_zipfile_serialization=is_zip)
    torch.save({"epoch": 3, "state_dict": table, "lr": 0.1}, folder / "tensors_nested.pth", pickle_protocol=4)
    torch.save(torch.nn.Linear(2, 2), folder / "module.pth")
    values = {name: value.detach().float() if name == "bfloat16" else value.detach() for name, value in table.items()}
    np.savez(folder / "tensors.npz", **{name: value.numpy() for name, value in values.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=GOLDEN)
    folder = parser.parse_args().out
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "networks.npz", **activations(), **training_step())
    files(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
