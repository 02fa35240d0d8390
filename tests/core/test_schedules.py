"""Every schedule at every step against its formula, written out in NumPy."""

import numpy as np
import pytest

from jaxcats.core import schedules

STEPS, PEAK = 40, 0.5


def curve(schedule, steps=STEPS):
    return np.array([float(schedule(np.int32(t))) for t in range(steps + 1)])


def between(a, b, x):
    return a + (b - a) * (1 - np.cos(np.pi * x)) / 2


FORMULAS = {
    "constant": lambda t: PEAK,
    "cosine": lambda t: PEAK / 2 * (1 + np.cos(np.pi * t / STEPS)),
    "warmup_cosine": lambda t: PEAK * t / 4 if t < 4 else PEAK / 2 * (1 + np.cos(np.pi * (t - 4) / 36)),
    "one_cycle": lambda t: between(PEAK / 25, PEAK, t / 10) if t <= 10 else between(PEAK, PEAK / 1e5, (t - 10) / 30),
    "exponential": lambda t: PEAK * 0.01 ** (t / STEPS),
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_schedule_equals_its_formula_at_every_step(kind):
    wanted = [FORMULAS[kind](t) for t in range(STEPS + 1)]
    np.testing.assert_allclose(curve(schedules.make(kind, PEAK, steps=STEPS)), wanted, rtol=1e-4, atol=1e-6)


def test_sgdr_restarts_and_warms_up_in_its_first_cycle_only():
    lengths = [10, 20, 40]
    found = curve(schedules.make("sgdr", PEAK, steps=70, cycles=lengths), 69)
    wanted = []
    for n in lengths:
        wanted += [PEAK / 2 * (1 + np.cos(np.pi * t / n)) for t in range(n)]
    wanted[0] = PEAK / 100  # a twentieth of 10 steps: the first one
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert found[10] == found[30] == np.float32(PEAK)
    long = curve(schedules.sgdr(PEAK, [31]), 30)
    assert (long[:2] == np.float32(PEAK / 100)).all()  # iterations below 31 / 20
    np.testing.assert_allclose(long[2], PEAK / 2 * (1 + np.cos(np.pi * 2 / 31)), rtol=1e-5)
    assert curve(schedules.sgdr(PEAK, [31], warm=False), 30)[0] == np.float32(PEAK)


def test_one_cycle_takes_its_warmup_and_start_from_its_arguments():
    found = curve(schedules.make("one_cycle", PEAK, steps=STEPS, warmup=0.5, div=5.0))
    np.testing.assert_allclose([found[0], found[20], found[40]], [PEAK / 5, PEAK, PEAK / 1e5], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 31, 94])
@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.3, 0.99, 1.0])
def test_one_cycle_turns_where_it_should_even_between_two_steps(steps, warmup):
    """fastai's formula in the share of the phase that is over, t / steps."""

    def wanted(t):
        x = t / steps
        if x < warmup:
            return between(PEAK / 25, PEAK, x / warmup)
        return between(PEAK, PEAK / 1e5, (x - warmup) / (1 - warmup)) if warmup < 1 else PEAK

    found = curve(schedules.make("one_cycle", PEAK, steps=steps, warmup=warmup), steps - 1)
    np.testing.assert_allclose(found, [wanted(t) for t in range(steps)], rtol=1e-4, atol=1e-6)


def test_one_cycle_momentum_falls_while_the_rate_rises():
    found = curve(schedules.one_cycle_momentum((0.95, 0.85, 0.9), STEPS))
    wanted = [between(0.95, 0.85, t / 10) if t <= 10 else between(0.85, 0.9, (t - 10) / 30) for t in range(STEPS + 1)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_range_test_rate_is_geometric():
    found = curve(schedules.exponential(1e-7, 10.0, 100), 100)
    np.testing.assert_allclose(found, [1e-7 * 1e8 ** (i / 100) for i in range(101)], rtol=2e-5)


def test_a_group_at_rate_zero_stays_there():
    assert not curve(schedules.make("exponential", 0.0, steps=STEPS)).any()


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="one_cycle"):
        schedules.make("one-cycle", 0.1, steps=10)
