"""The training state, arrays only, and its division into trainable and frozen leaves."""

import dataclasses
import hashlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "batch_stats", "opt_state"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a train step changes.

    Attributes:
        step: int32 scalar; steps taken since the start of the run, over all phases.
        params: {"backbone": ..., "head": ...}, nested dicts of float32 arrays.
        batch_stats: the same two keys; running averages of BatchNorm.
        opt_state: the optimizer's state, for the trainable leaves only.
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree


def select(tree: Tree, mask: Tree) -> Tree:
    """The leaves where `mask` is True, and None elsewhere, which JAX does not count as a leaf."""
    return jax.tree.map(lambda x, keep: x if keep else None, tree, mask)


def merge(chosen: Tree, rest: Tree) -> Tree:
    """The whole tree from two halves made by `select`."""
    return jax.tree.map(lambda a, b: b if a is None else a, chosen, rest, is_leaf=lambda x: x is None)


def create(params: Tree, batch_stats: Tree, tx, *, trainable: Tree, step: int = 0) -> TrainState:
    """A state with a fresh optimizer state for the leaves where `trainable` (a tree of bools like `params`) is True."""
    return TrainState(jnp.asarray(step, jnp.int32), params, batch_stats, tx.init(select(params, trainable)))


@jax.jit
def copy(tree: Tree) -> Tree:
    """The same values in new buffers, so that the old ones may be donated; one program for the whole tree."""
    return jax.tree.map(jnp.copy, tree)


def tree_hash(state: Any) -> str:
    """SHA-256 of the names, types, shapes and bytes of the arrays of a tree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()
