"""Networks with pure functions: create, register, find_weights, load_pretrained.

    model = models.create("resnet34", num_classes=2)
    params, batch_stats = models.load_pretrained(model)
    logits, _ = model.apply(params, batch_stats, images, train=False)

Only this folder imports Linen. A network is a backbone (images to a feature map), a pooling, and a head.
"""

from jaxcats.models.model import Model, create, find_weights, load_pretrained, shapes, to_state_dict
from jaxcats.models.pretrained import WeightFile, WeightSource
from jaxcats.models.registry import Backbone, names, register

__all__ = [
    "Backbone",
    "Model",
    "WeightFile",
    "WeightSource",
    "create",
    "find_weights",
    "load_pretrained",
    "names",
    "register",
    "shapes",
    "to_state_dict",
]
