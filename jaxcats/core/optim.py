"""The optimizer of a phase: a learning rate for each layer group, weight decay, clipping, and which leaves are frozen."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxcats.core.schedules import Schedule

FIRST_TRAINED = {"nothing": 0, "first": 1, "backbone": 2}


def trainable_mask(groups: Any, freeze: Literal["backbone", "first", "nothing"]) -> Any:
    """Tree of bools: True where the layer group (tree of ints 0, 1, 2) is not frozen."""
    return jax.tree.map(lambda g: g >= FIRST_TRAINED[freeze], groups)


def scale_by_group(schedules: Sequence[Schedule], groups: Any) -> optax.GradientTransformation:
    """Multiplies each update by minus the learning rate of its layer group; `groups` is a tree of ints like params."""

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        lrs = [jnp.asarray(s(state.count), jnp.float32) for s in schedules]
        # JAX does not count a frozen leaf (None) as a leaf of `updates`, so the groups are looked up by path.
        by_path = dict(jax.tree_util.tree_leaves_with_path(groups))
        scaled = jax.tree_util.tree_map_with_path(lambda path, u: -lrs[by_path[path]] * u, updates)
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def decays(params: Any) -> Any:
    """Tree of bools: True for leaves of rank two or more; biases and BatchNorm parameters are vectors and never decay."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def make_tx(
    kind: Literal["sgd", "adam", "adamw"],
    *,
    schedules: Sequence[Schedule],
    groups: Any,
    momentum: float | Schedule = 0.9,
    weight_decay: float = 0.0,
    clip: float = 0.0,
) -> optax.GradientTransformation:
    """The optimizer of a phase.

    Args:
        kind: sgd with heavy-ball momentum (no Nesterov), adam (b2 .999, eps 1e-8) or adamw.
        schedules: one per layer group.
        groups: tree of ints like params: the layer group of each leaf.
        momentum: of sgd, or b1 of adam and adamw; a number, or a schedule.
        weight_decay: added to the gradient (sgd, adam) as torch.optim does, or to the update (adamw).
        clip: greatest norm of the gradient over all trainable leaves; 0: no limit.
    """
    decay = [optax.add_decayed_weights(weight_decay, mask=decays)] if weight_decay else []
    core = _momentum(kind, momentum)
    parts = [core, *decay] if kind == "adamw" else [*decay, core]
    clipping = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*clipping, *parts, scale_by_group(schedules, groups))


def _momentum(kind: str, momentum: float | Schedule) -> optax.GradientTransformation:
    if not callable(momentum):
        return optax.trace(decay=momentum) if kind == "sgd" else optax.scale_by_adam(b1=momentum)
    if kind == "sgd":
        return optax.inject_hyperparams(optax.trace, static_args=("nesterov", "accumulator_dtype"))(decay=momentum)
    fixed = ("b2", "eps", "eps_root", "mu_dtype", "nesterov")
    return optax.inject_hyperparams(optax.scale_by_adam, static_args=fixed)(b1=momentum)
