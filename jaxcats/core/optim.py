"""Schedules, learning rates per layer group, weight decay where it belongs, and what is frozen."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Schedule = optax.Schedule
FIRST_TRAINED = {"nothing": 0, "first": 1, "backbone": 2}


def trainable_mask(groups: Any, freeze: Literal["backbone", "first", "nothing"]) -> Any:
    """Tree of bools: True where the layer group (tree of ints 0, 1, 2) is not frozen."""
    return jax.tree.map(lambda g: g >= FIRST_TRAINED[freeze], groups)


def make_schedule(kind: Literal["constant", "cosine", "one_cycle"], peak_lr: float, steps: int) -> Schedule:
    """Learning rate by step, counted from 0 at the start of the phase.

    Args:
        kind: constant; cosine from the peak to 0; one_cycle: peak/25 up to the peak over the first quarter and down to
            peak/1e5 over the rest, both by cosine (as fastai's one-cycle; Smith, arXiv:1803.09820).
        peak_lr: the greatest learning rate.
        steps: length of the phase in steps.
    """
    if kind == "constant":
        return optax.constant_schedule(peak_lr)
    if kind == "cosine":
        return optax.cosine_decay_schedule(peak_lr, steps)
    return optax.cosine_onecycle_schedule(steps, peak_lr, pct_start=0.25, div_factor=25, final_div_factor=1e5 / 25)


def scale_by_group(schedules: Sequence[Schedule], groups: Any) -> optax.GradientTransformation:
    """Multiplies each update by minus the learning rate of its layer group; `groups` is a tree of ints like params."""

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        lrs = [jnp.asarray(s(state.count), jnp.float32) for s in schedules]
        # None (a frozen leaf) is no leaf of `updates`, so the groups are looked up by path.
        by_path = dict(jax.tree_util.tree_leaves_with_path(groups))
        scaled = jax.tree_util.tree_map_with_path(lambda path, u: -lrs[by_path[path]] * u, updates)
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def decays(params: Any) -> Any:
    """Tree of bools: True for weights of rank two and more; biases and BatchNorm are vectors and never decay."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def make_tx(
    kind: Literal["sgd", "adam", "adamw"],
    *,
    schedules: Sequence[Schedule],
    groups: Any,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """The optimizer of a phase.

    Args:
        kind: sgd with heavy-ball momentum (no Nesterov), adam (b1 .9, b2 .999, eps 1e-8) or adamw.
        schedules: one per layer group.
        groups: tree of ints like params: the layer group of each leaf.
        momentum: of sgd.
        weight_decay: added to the gradient (sgd, adam) as torch.optim does, or to the update (adamw).
    """
    decay = [optax.add_decayed_weights(weight_decay, mask=decays)] if weight_decay else []
    core = optax.trace(decay=momentum) if kind == "sgd" else optax.scale_by_adam()
    parts = [core, *decay] if kind == "adamw" else [*decay, core]
    return optax.chain(*parts, scale_by_group(schedules, groups))
