"""Pure train and evaluation steps, made by factories with explicit arguments.

A train step is `(state, batch) -> (state, metrics)`. Nothing here jits; the drivers do. A batch holds "label" int32 [B],
"mask" bool [B], "index" int32 [B], and either "image" uint8 [B, H, W, 3] or "features" float32 [B, F].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcats.core.state import TrainState, merge, select

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def normalise(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[jax.Array], jax.Array]:
    """A function from uint8 pixels [..., C] to float32, `(x / 255 - mean) / std` per channel; ValueError for another C."""
    scale = jnp.asarray([1 / (255 * s) for s in std], jnp.float32)
    shift = jnp.asarray([-m / s for m, s in zip(mean, std, strict=True)], jnp.float32)

    def normalised(images: jax.Array) -> jax.Array:
        if images.shape[-1] != len(mean):  # Otherwise one channel would silently be broadcast to three.
            raise ValueError(f"images have shape {images.shape}; expected {len(mean)} channels, as the mean has")
        return images.astype(jnp.float32) * scale + shift

    return normalised


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each example: logits float32 [B, C], labels int32 [B] -> float32 [B], in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def smoothed_cross_entropy(alpha: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`cross_entropy` against targets `(1 - alpha) onehot + alpha / C` (label smoothing; Szegedy et al., arXiv:1512.00567)."""

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), alpha)
        return optax.softmax_cross_entropy(logits, targets)

    return loss if alpha else cross_entropy


def _inputs(batch: Batch, preprocess: Callable) -> jax.Array:
    return batch["features"] if "features" in batch else preprocess(batch["image"])


def _sums(logits: jax.Array, losses: jax.Array, batch: Batch) -> Metrics:
    mask = batch["mask"]
    right = (logits.argmax(-1) == batch["label"]) & mask
    return {"loss": jnp.where(mask, losses, 0).sum(), "correct": right.sum(), "n": mask.sum()}


def make_train_step(
    *,
    apply_fn: Callable,
    tx: optax.GradientTransformation,
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
    trainable: Any,
    preprocess: Callable[[jax.Array], jax.Array],
    augment: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    key: jax.Array,
    epoch_of: Callable[[jax.Array], jax.Array] = lambda step: jnp.zeros_like(step),
    bn_train: bool = False,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure training step.

    Args:
        apply_fn: `(params, batch_stats, inputs, *, train, bn_train, key) -> (logits, new_batch_stats)`.
        tx: optimizer of the trainable leaves.
        loss_fn: `(logits, labels) -> losses [B]`.
        trainable: tree of bools like params. Leaves with False get no gradient, no update and no optimizer state.
        preprocess: images, 0 to 255 -> the network's input.
        augment: `(images uint8, epoch, index [B]) -> images`, before `preprocess`.
        key: base of all randomness; dropout uses `fold_in(key, step)`, folded with the number of the part in `accumulate`.
        epoch_of: step -> epoch, both int32 scalars; for `augment`.
        bn_train: whether the backbone's BatchNorms use and update statistics of the batch.
        accumulate: number of equal parts in which the batch goes through the network, one after the other; their gradients
            are added up. It saves memory and gives the same update, except for BatchNorms on batch statistics.

    Returns:
        `(state, batch) -> (state, {"loss", "correct", "n"})`; the metrics are sums over the batch, from before the update.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        chosen = select(state.params, trainable)
        frozen = select(state.params, jax.tree.map(lambda t: not t, trainable))
        total = jnp.maximum(batch["mask"].sum(), 1)

        def gradients(stats, part: Batch, key: jax.Array):
            if augment is not None and "image" in part:
                part = part | {"image": augment(part["image"], epoch_of(state.step), part["index"])}

            def loss_of(chosen):
                logits, new = apply_fn(
                    merge(chosen, frozen), stats, _inputs(part, preprocess), train=True, bn_train=bn_train, key=key
                )
                metrics = _sums(logits, loss_fn(logits, part["label"]), part)
                return metrics["loss"] / total, (new, metrics)

            return jax.grad(loss_of, has_aux=True)(chosen)

        key_now = jax.random.fold_in(key, state.step)
        if accumulate == 1:
            grads, (stats, metrics) = gradients(state.batch_stats, batch, key_now)
        else:
            grads, (stats, metrics) = _accumulated(gradients, state.batch_stats, chosen, batch, key_now, accumulate)
        updates, opt_state = tx.update(grads, state.opt_state, chosen)
        params = merge(optax.apply_updates(chosen, updates), frozen)
        return TrainState(state.step + 1, params, stats, opt_state), metrics

    return train_step


def _accumulated(gradients: Callable, stats: Any, chosen: Any, batch: Batch, key: jax.Array, parts: int):
    """The gradients and metrics of the whole batch, from `parts` equal parts one after the other."""
    split = {k: v.reshape(parts, -1, *v.shape[1:]) for k, v in batch.items()}

    def body(carry, part):
        sofar, stats = carry
        number, rows = part
        grads, (stats, metrics) = gradients(stats, rows, jax.random.fold_in(key, number))
        return (jax.tree.map(jnp.add, sofar, grads), stats), metrics

    start = (jax.tree.map(jnp.zeros_like, chosen), stats)
    (grads, stats), metrics = jax.lax.scan(body, start, (jnp.arange(parts), split))
    return grads, (stats, jax.tree.map(lambda m: m.sum(0), metrics))


def make_eval_step(
    *,
    apply_fn: Callable,
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
    preprocess: Callable[[jax.Array], jax.Array],
) -> Callable[[Any, Any, Batch], tuple[jax.Array, Metrics]]:
    """A pure evaluation step `(params, batch_stats, batch) -> (logits [B, C], sums)`; masked rows do not count."""

    def eval_step(params, batch_stats, batch: Batch) -> tuple[jax.Array, Metrics]:
        logits, _ = apply_fn(params, batch_stats, _inputs(batch, preprocess), train=False)
        return logits, _sums(logits, loss_fn(logits, batch["label"]), batch)

    return eval_step
