"""The class heat map: where a network looked when it said what it said."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxcats.models import Model


def grad_cam(model: "Model", params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """How much each place of the last feature map speaks for a class: float32 [N,h,w], from 0 to 1 in each picture.

    Grad-CAM (Selvaraju et al., arXiv:1610.02391): the feature map's channels, each weighted with the mean gradient of
    the class's logit, are added up, and what speaks against the class is cut off. It works for any backbone and head,
    because it needs no more than the logit's gradient. A picture where nothing speaks for the class gives zeros. In a
    model that computes in bfloat16 only the feature map is as coarse as that; the gradient and the sum are float32.

    Args:
        model: from `models.create`.
        params: its parameters.
        batch_stats: likewise.
        images: float32 [N,H,W,3], normalised as `model.preprocess` says.
        labels: int [N], the class to ask about in each picture: the predicted one, or any other.
    """
    feature_map = model.feature_map(params, batch_stats, images)

    def score(feature_map: jax.Array) -> jax.Array:
        logits = model.apply_map(params, batch_stats, feature_map)
        # A picture's logits depend on that picture alone, so one gradient of the sum is every picture's own.
        return jnp.take_along_axis(logits, labels[:, None], axis=-1).sum()

    weights = jax.grad(score)(feature_map).mean((1, 2), keepdims=True)
    heat = jax.nn.relu((weights * feature_map).sum(-1))
    most = heat.max((1, 2), keepdims=True)
    return jnp.where(most > 0, heat / jnp.where(most > 0, most, 1), 0)
