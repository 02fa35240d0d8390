"""Every network against torch's, computed by scripts/make_golden.py from the same seeded weights (no torch here)."""

from pathlib import Path

import jax
import numpy as np
import ours
import pytest
import seeded

from jaxcats import models

GOLDEN = Path(__file__).parents[1] / "golden" / "networks.npz"
PARAMETERS = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "efficientnet_lite0": 4_652_008}
DEEP = {"resnet101": 44_549_160, "resnet152": 60_192_808}
MESSAGE = "no longer torch's numbers; if tests/models/seeded.py was changed on purpose, run scripts/make_golden.py"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as archive:
        return dict(archive)


def load_seeded(model, tmp_path):
    path = tmp_path / "seeded.npz"
    np.savez(path, **seeded.seeded_state(seeded.torch_shapes(model)))
    return models.load_pretrained(model, path)


@pytest.mark.parametrize("name", [*PARAMETERS, *(pytest.param(name, marks=pytest.mark.slow) for name in DEEP)])
def test_equals_torch_block_by_block(name, golden, tmp_path):
    model = models.create(name, 1000, head="classifier")
    params, batch_stats = load_seeded(model, tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == (PARAMETERS | DEEP)[name]

    @jax.jit
    def run(params, batch_stats, images):
        logits, _ = model.apply(params, batch_stats, images, train=False)
        return ours.block_outputs(model, params, batch_stats, images), logits

    outputs, logits = run(params, batch_stats, seeded.images())
    largest = golden[f"{name}/largest"]
    assert len(outputs) == len(largest)
    found = seeded.summary(outputs)
    for kind in ("mean", "std", "largest", "samples"):
        off = np.abs(found[kind] - golden[f"{name}/{kind}"])
        relative = (off.T / largest).max()
        assert relative < 1e-5, f"{kind}: {relative}: {MESSAGE}"
    want = golden[f"{name}/logits"]
    assert np.abs(logits - want).max() < 1e-5 * np.abs(want).max(), MESSAGE


def test_one_training_step_moves_weights_and_statistics_as_torch(golden, tmp_path):
    """Running variances are compared with the biased batch variance in them, which is what Flax averages.

    In float64: BatchNorm on few numbers magnifies rounding, and a ReLU that flips changes a gradient for good.
    """
    model = models.create("resnet18", 1000, head="classifier")
    trees = load_seeded(model, tmp_path)
    before = models.to_state_dict(model, *trees)
    loss, *trees = ours.training_step(model, *trees)
    after = models.to_state_dict(model, *trees)
    assert loss == pytest.approx(float(golden["step/loss"]), rel=1e-6)
    for name in seeded.STEP_TENSORS:
        want, change = golden[f"step/{name}"], seeded.sample(after[name] - before[name])
        assert np.abs(change - want).max() < 1e-5 * np.abs(want).max(), f"{name}: {MESSAGE}"
