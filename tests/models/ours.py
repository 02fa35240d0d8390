"""What our networks compute, in the same terms as torch_reference.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import seeded

from jaxcats.models import efficientnet_lite, resnet
from jaxcats.models.conv import ConvNorm


def block_outputs(model, params, batch_stats, images):
    """Outputs of the stem's BatchNorm, of every residual block and of the tail, in the order they are computed."""

    def wanted(module, _):
        return isinstance(module, resnet.Block | efficientnet_lite.Block) or (
            isinstance(module, ConvNorm) and module.name in ("stem", "tail")
        )

    variables = {"params": params["backbone"], "batch_stats": batch_stats["backbone"]}
    module = model.backbone_module()
    _, state = module.apply(variables, images, train=False, capture_intermediates=wanted, mutable=["intermediates"])
    parts = state["intermediates"]
    names = sorted(parts, key=lambda name: (name != "stem", name == "tail", name))
    outputs = []
    for name in names:
        rows = parts[name]
        outputs += (
            rows["__call__"]
            if "__call__" in rows
            else [rows[key]["__call__"][0] for key in sorted(rows, key=lambda key: (len(key), key))]
        )
    return outputs


def training_step(model, params, batch_stats):
    """Loss, params and batch_stats, in float64, after one SGD step as seeded.STEP_* say, all BatchNorms training."""
    model = dataclasses.replace(model, dtype="float64")
    tx = optax.sgd(seeded.STEP_LR, momentum=0.9)

    @jax.jit
    def step(params, batch_stats, images):
        def loss_fn(params):
            logits, new = model.apply(params, batch_stats, images, train=True, bn_train=True)
            labels = jnp.array(seeded.STEP_LABELS)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return loss, optax.apply_updates(params, updates), new

    with jax.enable_x64(True):
        wide = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree) for tree in (params, batch_stats)]
        results = step(*wide, np.asarray(seeded.images(seeded.STEP_SHAPE), np.float64))
        return jax.tree.map(np.asarray, results)
