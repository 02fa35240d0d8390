"""The torch networks that ours must equal, with seeded weights; needs torch, torchvision, efficientnet_lite_pytorch."""

import sys
import types

import numpy as np
import torch
from seeded import seeded_state

try:
    import torchvision
except RuntimeError:
    # Beside a CPU-only torch, the usual torchvision finds its compiled operators missing while it registers their
    # shapes. The networks use none of them.
    for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    import torchvision

from efficientnet_lite_pytorch import EfficientNet

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "efficientnet_lite0")


def build(name: str, *, size: tuple[int, int], state: dict[str, np.ndarray] | str = "") -> torch.nn.Module:
    """The network for images of `size` with 1000 classes, with the given, torch's own "random", or seeded weights."""
    if name == "efficientnet_lite0":
        net = EfficientNet.from_name("efficientnet-lite0", image_size=list(size), drop_connect_rate=0.0)
    else:
        net = getattr(torchvision.models, name)()
    if state != "random":
        state = state or seeded_state({name: tuple(tensor.shape) for name, tensor in net.state_dict().items()})
        missing, unexpected = net.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
        assert not unexpected
        assert all("num_batches_tracked" in name for name in missing)
    return net.eval()


def to_torch(images: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(images.transpose(0, 3, 1, 2), dtype=dtype)


def blocks(net: torch.nn.Module) -> list[torch.nn.Module]:
    """The stem's BatchNorm, then every residual block, then (EfficientNet) the last BatchNorm: as `block_outputs`."""
    if isinstance(net, EfficientNet):
        return [net._bn0, *net._blocks, net._bn1]
    return [net.bn1, *(block for number in range(1, 5) for block in getattr(net, f"layer{number}"))]


def run(net: torch.nn.Module, images: torch.Tensor) -> tuple[list[np.ndarray], np.ndarray]:
    """Each block's output (NHWC) and the logits."""
    outputs, hooks = [], []
    for block in blocks(net):
        hooks.append(block.register_forward_hook(lambda _, __, output: outputs.append(output.clone())))
    with torch.no_grad():
        logits = net(images)
    for hook in hooks:
        hook.remove()
    return [output.detach().numpy().transpose(0, 2, 3, 1) for output in outputs], logits.numpy()


def count_norms(net: torch.nn.Module) -> dict[str, int]:
    """Filled by the next forward pass: over how many numbers each BatchNorm averages, by the name of its variance."""
    counts = {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):

            def count(_, inputs, name=name):
                counts[f"{name}.running_var"] = inputs[0].numel() // inputs[0].shape[1]

            module.register_forward_pre_hook(count)
    return counts
