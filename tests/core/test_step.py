"""The pure step: what learns, what doesn't, and what the numbers are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcats.core import optim, scan, schedules
from jaxcats.core import state as state_module
from jaxcats.core.step import cross_entropy, make_eval_step, make_train_step, normalise, smoothed_cross_entropy

KEY = jax.random.key(0)


def apply_fn(params, batch_stats, x, *, train, bn_train=False, key=None):
    """Two dense layers; counts its training calls in batch_stats, as BatchNorm would."""
    hidden = jnp.tanh(x @ params["backbone"]["w"] + params["backbone"]["b"])
    return hidden @ params["head"]["w"], {"seen": batch_stats["seen"] + (1.0 if bn_train else 0.0)}


def params_of(seed=0):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    backbone = {"w": jax.random.normal(a, (4, 8)), "b": jax.random.normal(b, (8,))}
    return {"backbone": backbone, "head": {"w": jax.random.normal(c, (8, 3))}}


GROUPS = {"backbone": {"w": 0, "b": 1}, "head": {"w": 2}}


def batch_of(n=6, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "features": rng.normal(size=(n, 4)).astype(np.float32),
        "label": rng.integers(0, 3, n).astype(np.int32),
        "mask": np.ones(n, bool),
        "index": np.arange(n, dtype=np.int32),
    }


def setup(freeze="nothing", lrs=(0.1, 0.1, 0.1), kind="sgd", **kwargs):
    trainable = optim.trainable_mask(GROUPS, freeze)
    tx = optim.make_tx(kind, schedules=[schedules.constant(lr) for lr in lrs], groups=GROUPS, **kwargs)
    step = make_train_step(apply_fn=apply_fn, tx=tx, trainable=trainable, preprocess=lambda x: x, key=KEY)
    return step, state_module.create(params_of(), {"seen": jnp.zeros(())}, tx, trainable=trainable)


def test_step_equals_the_formula_of_sgd_with_momentum():
    step, state = setup(lrs=(0.1, 0.2, 0.3))
    batch = batch_of()

    def loss(p):
        logits, _ = apply_fn(p, {"seen": 0.0}, batch["features"], train=True)
        return cross_entropy(logits, batch["label"]).mean()

    params, velocity = params_of(), jax.tree.map(jnp.zeros_like, params_of())
    for _ in range(3):
        grads = jax.grad(loss)(params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        rates = jax.tree.map(lambda g: (0.1, 0.2, 0.3)[g], GROUPS)
        params = jax.tree.map(lambda p, v, r: p - r * v, params, velocity, rates)
        state, _ = step(state, batch)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert int(state.step) == 3


@pytest.mark.parametrize(("freeze", "learns"), [("nothing", "wbh"), ("first", "bh"), ("backbone", "h")])
def test_frozen_leaves_keep_their_bits_and_have_no_optimizer_state(freeze, learns):
    step, state = setup(freeze, kind="adamw", weight_decay=0.1)
    after, _ = jax.jit(step)(state, batch_of())
    same = {
        "w": np.array_equal(after.params["backbone"]["w"], state.params["backbone"]["w"]),
        "b": np.array_equal(after.params["backbone"]["b"], state.params["backbone"]["b"]),
        "h": np.array_equal(after.params["head"]["w"], state.params["head"]["w"]),
    }
    assert {k for k, unchanged in same.items() if not unchanged} == set(learns)
    moments = [x for x in jax.tree.leaves(state.opt_state) if jnp.ndim(x)]
    assert len(moments) == 2 * len(learns)  # Adam keeps two per learning leaf


def test_weight_decay_spares_vectors():
    params = params_of()
    tx = optim.make_tx("adamw", schedules=[schedules.constant(1.0)] * 3, groups=GROUPS, weight_decay=0.1)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["w"], -0.1 * params["head"]["w"], rtol=1e-6)
    assert not np.any(updates["backbone"]["b"])


def test_masked_rows_count_for_nothing():
    evaluate = make_eval_step(apply_fn=apply_fn, preprocess=lambda x: x)
    params, whole = params_of(), batch_of(6)
    padded = {k: np.concatenate([v, v[:2]]) for k, v in whole.items()} | {"mask": np.arange(8) < 6}
    _, a = evaluate(params, {"seen": 0.0}, whole)
    _, b = evaluate(params, {"seen": 0.0}, padded)
    assert int(b["n"]) == 6
    assert int(a["correct"]) == int(b["correct"])
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)


def test_normalise_is_the_usual_formula():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    want = (pixels / 255.0 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalise(mean, std)(jnp.asarray(pixels)), want, atol=2e-6)


def test_stream_and_scan_agree_and_scan_equals_itself_from_the_middle():
    step, state = setup()
    arrays = {k: jnp.asarray(v) for k, v in batch_of(20).items()}
    order = scan.epoch_order(20, batch_size=4, seed=1, epoch=0)
    batches = ({k: v[rows] for k, v in arrays.items()} for rows in order)
    for streamed, _ in scan.stream_epoch(jax.jit(step), state, batches):  # noqa: B007
        pass
    scanner = jax.jit(scan.make_scan(step))
    chunks = list(scan.scan_epoch(scanner, state, arrays, order=order, chunk=2))
    scanned = chunks[-1][0]
    for a, b in zip(jax.tree.leaves(streamed), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    resumed = list(scan.scan_epoch(scanner, chunks[0][0], arrays, order=order[2:], chunk=2))[-1][0]
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_array_equal(a, b)


def test_order_is_a_permutation_that_changes_with_epoch_and_seed():
    order = scan.epoch_order(10, batch_size=3, seed=0, epoch=0)
    assert order.shape == (3, 3)
    assert len(set(order.ravel().tolist())) == 9
    assert np.array_equal(order, scan.epoch_order(10, batch_size=3, seed=0, epoch=0))
    assert not np.array_equal(order, scan.epoch_order(10, batch_size=3, seed=0, epoch=1))
    assert not np.array_equal(order, scan.epoch_order(10, batch_size=3, seed=1, epoch=0))
    assert scan.epoch_order(5, batch_size=64, seed=0, epoch=0).shape == (1, 5)


def test_gradient_of_the_frozen_part_is_not_computed():
    step, state = setup("backbone")
    text = str(jax.make_jaxpr(step)(state, batch_of()))
    unfrozen, free = setup("nothing")
    assert text.count("dot_general") < str(jax.make_jaxpr(unfrozen)(free, batch_of())).count("dot_general")


@pytest.mark.parametrize(
    ("kind", "decay"), [("sgd", 0.0), ("sgd", 0.1), ("adam", 0.0), ("adam", 0.1), ("adamw", 0.0), ("adamw", 0.1)]
)
def test_three_steps_of_each_optimizer_equal_its_formula(kind, decay):
    """In NumPy's double precision; decay is added to the gradient (sgd, adam) or to the update (adamw), of matrices only."""
    lrs, momentum = (0.01, 0.02, 0.03), 0.8
    rates = [schedules.constant(lr) for lr in lrs]
    tx = optim.make_tx(kind, schedules=rates, groups=GROUPS, momentum=momentum, weight_decay=decay)
    params = params_of()
    opt_state = tx.init(params)
    values = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]
    groups, leaves = jax.tree.leaves(GROUPS), jax.tree.structure(params)
    first, second = [np.zeros_like(p) for p in values], [np.zeros_like(p) for p in values]
    rng = np.random.default_rng(0)
    for t in (1, 2, 3):
        grads = [rng.normal(size=p.shape).astype(np.float32) for p in values]
        updates, opt_state = tx.update(jax.tree.unflatten(leaves, grads), opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for i, p in enumerate(values):
            pull = decay * p if p.ndim > 1 else 0.0
            g = grads[i] + (0.0 if kind == "adamw" else pull)
            if kind == "sgd":
                first[i] = momentum * first[i] + g
                update = first[i]
            else:
                first[i] = momentum * first[i] + (1 - momentum) * g
                second[i] = 0.999 * second[i] + 0.001 * g**2
                update = first[i] / (1 - momentum**t) / (np.sqrt(second[i] / (1 - 0.999**t)) + 1e-8)
                update = update + (pull if kind == "adamw" else 0.0)
            values[i] = p - lrs[groups[i]] * update
        for found, wanted in zip(jax.tree.leaves(params), values, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_label_smoothing_equals_its_formula():
    logits, labels = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32), np.array([0, 1, 2, 0, 1, 2])
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    wanted = -(0.9 * logs[np.arange(6), labels] + 0.1 * logs.mean(1))
    np.testing.assert_allclose(smoothed_cross_entropy(0.1)(logits, labels), wanted, rtol=1e-5)
    assert smoothed_cross_entropy(0.0) is cross_entropy


def test_clipping_scales_the_gradient_of_all_learning_leaves_together():
    params = params_of()
    grads = jax.tree.map(lambda p: 3.0 * jnp.ones_like(p), params)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    for clip, scale in ((norm / 4, 0.25), (norm * 2, 1.0)):
        tx = optim.make_tx("sgd", schedules=[schedules.constant(1.0)] * 3, groups=GROUPS, clip=clip)
        updates, _ = tx.update(grads, tx.init(params), params)
        for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(u, -scale * g, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_momentum_may_follow_a_schedule(kind):
    """Two steps of a constant gradient: the second update shows the momentum of the second step."""
    params, ones = {"head": {"w": jnp.zeros((2, 2))}}, {"head": {"w": jnp.ones((2, 2))}}
    moms = schedules.one_cycle_momentum((0.9, 0.5, 0.9), 4)
    tx = optim.make_tx(
        kind, schedules=[schedules.constant(1.0)] * 3, groups={"head": {"w": 2}}, momentum=lambda t: moms(t)
    )
    state = tx.init(params)
    first, state = tx.update(ones, state, params)
    second, _ = tx.update({"head": {"w": 2 * jnp.ones((2, 2))}}, state, params)
    m = 0.5  # after the first quarter of four steps
    if kind == "sgd":
        wanted = -(1 * m + 2)
    else:
        b1, b2 = (0.1 * m + (1 - m) * 2) / (1 - m**2), (0.001 * 0.999 * 1 + 0.001 * 4) / (1 - 0.999**2)
        wanted = -b1 / np.sqrt(b2)
    np.testing.assert_allclose(second["head"]["w"], wanted * np.ones((2, 2)), rtol=1e-4)
    np.testing.assert_allclose(first["head"]["w"], -np.ones((2, 2)), rtol=1e-4)


def test_four_parts_of_sixteen_equal_one_batch_of_sixty_four():
    def stepped(parts):
        trainable = optim.trainable_mask(GROUPS, "nothing")
        tx = optim.make_tx("sgd", schedules=[schedules.constant(0.1)] * 3, groups=GROUPS)
        step = make_train_step(
            apply_fn=apply_fn, tx=tx, trainable=trainable, preprocess=lambda x: x, key=KEY, accumulate=parts
        )
        state = state_module.create(params_of(), {"seen": jnp.zeros(())}, tx, trainable=trainable)
        batch = batch_of(64) | {"mask": np.arange(64) != 5}
        for _ in range(3):
            state, sums = jax.jit(step)(state, batch)
        return state, sums

    (one, sums), (four, parts) = stepped(1), stepped(4)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert int(sums["n"]) == int(parts["n"]) == 63
    assert int(sums["correct"]) == int(parts["correct"])
    np.testing.assert_allclose(sums["loss"], parts["loss"], rtol=1e-5)
