"""lr_find's scan: one compiled program, the caller's state untouched, frozen after its end, per-group ratios, seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import GROUPS, KEY, apply_fn, batch_of, params_of

from jaxcats.core import optim, scan, schedules
from jaxcats.core import state as state_module
from jaxcats.core.step import make_train_step

N = 40


def begin(*, start=1e-4, end=10.0, ratios=(0.1, 0.5, 1.0), count=None, iterations=N):
    rates = [schedules.exponential(start * r, end * r, iterations) for r in ratios]
    tx = optim.make_tx("sgd", schedules=rates, groups=GROUPS)
    trainable = optim.trainable_mask(GROUPS, "nothing")
    step = make_train_step(apply_fn=apply_fn, tx=tx, trainable=trainable, preprocess=lambda x: x, key=KEY)

    def counted(state, batch):
        if count is not None:
            count.append(1)
        return step(state, batch)

    return counted, state_module.create(params_of(), {"seen": jnp.zeros(())}, tx, trainable=trainable), step


def order_of(iterations=N, batch=5):
    return np.concatenate([scan.epoch_order(20, batch_size=batch, seed=0, epoch=e) for e in range(iterations // 4)])


ARRAYS = {k: jnp.asarray(v) for k, v in batch_of(20).items()}


def test_it_is_one_scan_and_the_step_is_traced_once():
    traces = []
    step, state, _ = begin(count=traces)
    run = scan.make_range_test(step, iterations=N)
    jaxpr = jax.make_jaxpr(run)(scan.begin_range_test(state), ARRAYS, order_of())
    assert len(traces) == 1
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert [e.params["length"] for e in scans] == [N]
    rest = {e.primitive.name for e in jaxpr.eqns} - {"scan"}
    assert not rest & {"dot_general", "while", "cond"}  # all of the work is inside


def test_the_caller_s_state_has_the_same_bits_afterwards():
    step, state, _ = begin()
    before = state_module.tree_hash(jax.device_get(state))
    jax.jit(scan.make_range_test(step, iterations=N))(scan.begin_range_test(state), ARRAYS, order_of())
    assert state_module.tree_hash(jax.device_get(state)) == before


def test_losses_are_those_of_the_step_called_by_hand_at_exponential_rates():
    step, state, plain = begin()
    _, (losses, averages) = jax.jit(scan.make_range_test(step, iterations=N))(
        scan.begin_range_test(state), ARRAYS, order_of()
    )
    one, by_hand = jax.jit(plain), []
    for rows in order_of():
        state, sums = one(state, {k: v[rows] for k, v in ARRAYS.items()})
        by_hand.append(float(sums["loss"] / sums["n"]))
    ran = np.isfinite(losses)
    assert ran.sum() > 20
    np.testing.assert_allclose(np.asarray(losses)[ran], np.array(by_hand)[ran], rtol=1e-4)
    average, smooth = 0.0, []
    for i, loss in enumerate(by_hand):
        average = 0.98 * average + 0.02 * loss
        smooth.append(average / (1 - 0.98 ** (i + 1)))
    np.testing.assert_allclose(np.asarray(averages)[ran], np.array(smooth)[ran], rtol=1e-4)


@pytest.mark.parametrize(("end", "reason"), [(1e5, 1), (1e38, 2)], ids=["diverged", "nan"])
def test_it_freezes_after_its_end_and_says_why(end, reason):
    step, state, _ = begin(end=end)
    if reason == 2:  # a loss that turns into a NaN before the average has grown fourfold

        def step(state, batch, inner=step):
            new, sums = inner(state, batch)
            return new, sums | {"loss": jnp.where(state.step >= 7, jnp.nan, sums["loss"])}

    run = jax.jit(scan.make_range_test(step, iterations=N))
    test, (losses, _) = run(scan.begin_range_test(state), ARRAYS, order_of())
    count = int(test.count)
    assert int(test.reason) == reason
    assert count < N
    assert np.isnan(losses[count:]).all()
    again, (more, _) = run(test, ARRAYS, order_of())
    assert np.isnan(more).all()
    assert state_module.tree_hash(jax.device_get(again)) == state_module.tree_hash(jax.device_get(test))
    if reason == 2:
        assert count == 8


def test_chunks_give_what_one_program_gives_and_an_overshoot_changes_nothing():
    step, state, _ = begin(end=0.1)
    order = order_of()
    whole = jax.jit(scan.make_range_test(step, iterations=N))
    test, (losses, _) = whole(scan.begin_range_test(state), ARRAYS, order)
    parts, at = [], scan.begin_range_test(state)
    for i in range(0, 48, 12):
        at, (loss, _) = whole(at, ARRAYS, order[np.arange(i, i + 12) % N])
        parts.append(loss)
    joined = np.concatenate(parts)
    np.testing.assert_allclose(joined[:N], losses, rtol=1e-5)
    assert np.isnan(joined[N:]).all()
    assert int(at.count) == int(test.count) == N


def test_layer_groups_keep_their_ratios():
    """With ratio 0.1 for the first group, its movement in the first step is a tenth of what ratio 1 gives."""
    moved = []
    for ratios in ((0.1, 1.0, 1.0), (1.0, 1.0, 1.0)):
        step, state, _ = begin(start=1e-3, end=1e-2, ratios=ratios)
        run = scan.make_range_test(step, iterations=N)
        test, _ = run(scan.begin_range_test(state), ARRAYS, order_of()[:1])
        moved.append(np.asarray(test.state.params["backbone"]["w"] - state.params["backbone"]["w"]))
    np.testing.assert_allclose(moved[0], moved[1] / 10, rtol=1e-3, atol=1e-7)


def test_under_vmap_each_seed_is_what_it_is_alone():
    step, state, _ = begin(end=1e3)
    run = scan.make_range_test(step, iterations=N)
    orders = np.stack([order_of(), order_of()[::-1]])
    together, (losses, _) = jax.vmap(run, in_axes=(None, None, 0))(scan.begin_range_test(state), ARRAYS, orders)
    for k in range(2):
        alone, (loss, _) = run(scan.begin_range_test(state), ARRAYS, orders[k])
        ran = np.isfinite(loss)
        assert int(together.count[k]) == int(alone.count)
        np.testing.assert_allclose(losses[k][ran], loss[ran], rtol=1e-3)
