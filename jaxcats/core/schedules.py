"""Schedules of learning rate and momentum: functions of an int32 step, counted from 0 at the start of the phase."""

import math
from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
import optax

Schedule = optax.Schedule


def constant(lr: float) -> Schedule:
    """The same rate at every step."""
    return optax.constant_schedule(lr)


def cosine(peak: float, steps: int) -> Schedule:
    """From the peak down to 0: `peak/2 (1 + cos(pi t / steps))`."""
    return optax.cosine_decay_schedule(peak, steps)


def warmup_cosine(peak: float, steps: int, *, warmup: float = 0.1) -> Schedule:
    """Linear from 0 to the peak over the share `warmup` of the steps, then down to 0 by cosine (Goyal et al., arXiv:1706.02677)."""
    rise = round(steps * warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), cosine(peak, max(steps - rise, 1))], [rise])


def sgdr(peak: float, lengths: Sequence[int], *, warm: bool = True) -> Schedule:
    """Cosine cycles with warm restarts (Loshchilov and Hutter, arXiv:1608.03983), as fastai 0.7's.

    Args:
        peak: rate at the start of every cycle.
        lengths: steps of each cycle.
        warm: the first twentieth of the first cycle runs at peak / 100; the cosine after it is not shifted.
    """
    wave = optax.join_schedules([cosine(peak, n) for n in lengths], list(accumulate(lengths))[:-1])
    quiet = math.ceil(lengths[0] / 20) if warm else 0
    return lambda step: jnp.where(jnp.asarray(step) < quiet, peak / 100, wave(step))


def one_cycle(peak: float, steps: int, *, warmup: float = 0.25, div: float = 25.0, final_div: float = 1e5) -> Schedule:
    """Up and down by cosine (Smith, arXiv:1803.09820; the numbers are fastai v2's).

    Args:
        peak: the greatest rate.
        steps: length in steps.
        warmup: share of the steps that go up.
        div: it starts at peak / div.
        final_div: it ends at peak / final_div.
    """
    return _there_and_back(peak / div, peak, peak / final_div, steps, warmup)


def one_cycle_momentum(momenta: tuple[float, float, float], steps: int, *, warmup: float = 0.25) -> Schedule:
    """The momentum of `one_cycle`: by cosine from the first to the second value while the rate rises, then to the third."""
    return _there_and_back(*momenta, steps, warmup)


def _there_and_back(start: float, middle: float, end: float, steps: int, share: float) -> Schedule:
    """By cosine from `start` to `middle` over a share of the steps, then to `end`; the turn may fall between two steps."""

    def wave(a: float, b: float, x: jax.Array) -> jax.Array:
        return a + (b - a) * (1 - jnp.cos(jnp.pi * jnp.clip(x, 0, 1))) / 2

    def schedule(step):
        at = step / steps
        up, down = wave(start, middle, at / (share or 1)), wave(middle, end, (at - share) / ((1 - share) or 1))
        return jnp.where(at < share, up, down)

    return schedule


def exponential(start: float, end: float, steps: int) -> Schedule:
    """`start (end / start)^(t / steps)`: a straight line on a logarithmic axis."""
    return lambda step: start * jnp.exp(math.log(end / start) * step / steps)


def make(
    kind: str,
    peak: float,
    *,
    steps: int,
    cycles: Sequence[int] = (),
    warmup: float | None = None,
    div: float = 25.0,
) -> Schedule:
    """A schedule by its name in the configuration.

    Args:
        kind: constant, cosine, warmup_cosine, sgdr, one_cycle or exponential (down to a hundredth of the peak).
        peak: the greatest rate.
        steps: length of the phase in steps.
        cycles: sgdr: steps of each cycle; they add up to `steps`.
        warmup: share of the steps in which the rate rises; None: a quarter (one_cycle), a tenth (warmup_cosine).
        div: one_cycle starts at peak / div.
    """
    if peak == 0 or kind == "constant":  # a layer group at rate 0
        return constant(peak)
    if kind == "exponential":
        return exponential(peak, peak / 100, steps)
    if kind == "sgdr":
        return sgdr(peak, cycles)
    if kind == "warmup_cosine":
        return warmup_cosine(peak, steps, warmup=0.1 if warmup is None else warmup)
    if kind == "one_cycle":
        return one_cycle(peak, steps, warmup=0.25 if warmup is None else warmup, div=div)
    if kind == "cosine":
        return cosine(peak, steps)
    raise ValueError(f"schedule: {kind!r} is not one of constant, cosine, warmup_cosine, sgdr, one_cycle, exponential")
