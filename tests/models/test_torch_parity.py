"""Live parity with torch: every network from every kind of file, a training step, and real weights on real photos."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps
from safetensors.numpy import save_file

pytest.importorskip("torch")
pytest.importorskip("efficientnet_lite_pytorch")

import ours
import seeded
import torch
import torch_reference as reference

from jaxcats import models

pytestmark = pytest.mark.slow

CATS, DOGS = range(281, 286), range(151, 269)  # of ImageNet's classes


def random_net(name: str, size: tuple[int, int]) -> torch.nn.Module:
    """Torch's network with torch's own random weights, and BatchNorm averages from a pass over random images."""
    torch.manual_seed(0)
    net = reference.build(name, size=size, state="random")
    with torch.no_grad():
        net.train()(torch.randn(4, 3, *size))
    return net.eval()


def save(net: torch.nn.Module, folder: Path, kind: str) -> Path:
    path = folder / ("net.safetensors" if kind == "safetensors" else "net.pth")
    if kind == "safetensors":
        save_file({name: value.numpy() for name, value in net.state_dict().items()}, path)
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("name", reference.NAMES)
def test_networks_equal_torch_from_every_kind_of_file(name, tmp_path):
    size = (128, 96)
    net = random_net(name, size)
    model = models.create(name, 1000, head="classifier")
    images = seeded.images((2, *size, 3))
    want, want_logits = reference.run(net, reference.to_torch(images))

    @jax.jit
    def run(params, batch_stats, images):
        logits, _ = model.apply(params, batch_stats, images, train=False)
        return ours.block_outputs(model, params, batch_stats, images), logits

    for kind in ("safetensors", "zip", "legacy"):
        params, batch_stats = models.load_pretrained(model, save(net, tmp_path, kind))
        outputs, logits = run(params, batch_stats, images)
        assert len(outputs) == len(want)
        worst = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(outputs, want, strict=True)]
        worst.append(np.abs(logits - want_logits).max() / np.abs(want_logits).max())
        print(f"{name} from {kind}: largest relative difference {max(worst):.1e} over {len(worst)} layers")
        assert max(worst) < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_one_training_step_moves_everything_as_torch(name, tmp_path):
    """All weights and averages, in float64; the variances after undoing torch's n / (n - 1), which Flax leaves out."""
    net = random_net(name, seeded.STEP_SHAPE[1:3])
    model = models.create(name, 1000, head="classifier")
    params, batch_stats = models.load_pretrained(model, save(net, tmp_path, "zip"))
    loss, *trees = ours.training_step(model, params, batch_stats)
    before, after = models.to_state_dict(model, params, batch_stats), models.to_state_dict(model, *trees)

    net = net.double().train()
    counts = reference.count_norms(net)
    logits = net(reference.to_torch(seeded.images(seeded.STEP_SHAPE), torch.float64))
    want_loss = torch.nn.functional.cross_entropy(logits, torch.tensor(seeded.STEP_LABELS))
    want_loss.backward()
    torch.optim.SGD(net.parameters(), lr=seeded.STEP_LR, momentum=0.9).step()

    assert float(loss) == pytest.approx(want_loss.item(), rel=1e-6)
    for key, value in net.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        want, change = value.numpy() - before[key], after[key] - before[key]
        if key.endswith("running_var"):
            biased = 1 - 1 / counts[key]
            want = want * biased - 0.1 * before[key] * (1 - biased)  # .9 old + .1 new, less old, with new biased
        assert np.abs(change - want).max() <= 1e-5 * np.abs(want).max(), key


def photos() -> list[Path]:
    folder = os.environ.get("JAXCATS_PHOTOS")
    if not folder:
        pytest.skip(
            "set JAXCATS_PHOTOS to a folder of real photos, such as dogscats with its valid/cats and valid/dogs"
        )
    found = [sorted(path for path in Path(folder, "valid", kind).iterdir())[:16] for kind in ("cats", "dogs")]
    return [path for pair in zip(*found, strict=True) for path in pair]


def test_lite0_with_its_real_weights_gives_the_references_logits_on_real_photos():
    size = 224
    model = models.create("efficientnet_lite0", 1000, head="classifier")
    pixels = [
        ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.Resampling.BICUBIC) for path in photos()
    ]
    images = np.stack([np.asarray(image) for image in pixels]).astype(np.float32) / 255
    images = ((images - model.preprocess.mean) / model.preprocess.std).astype(np.float32)
    file = models.find_weights("efficientnet_lite0")
    params, batch_stats = models.load_pretrained(model, file)
    logits, _ = jax.jit(lambda *args: model.apply(*args, train=False))(params, batch_stats, images)

    state = {name: value.numpy() for name, value in torch.load(file.path, weights_only=True).items()}
    net = reference.build("efficientnet_lite0", size=(size, size), state=state)
    with torch.no_grad():
        want = net(reference.to_torch(images)).numpy()
    difference = np.abs(logits - want).max()
    print(f"efficientnet_lite0, {len(images)} photos: largest difference of logits {difference:.1e}")
    assert difference < 1e-3
    # The labels alternate cat, dog: that most are recognised shows that weights and normalisation belong together.
    right = [guess in (DOGS if number % 2 else CATS) for number, guess in enumerate(np.argmax(logits, 1))]
    assert np.mean(right) > 0.8
