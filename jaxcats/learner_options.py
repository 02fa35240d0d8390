"""What a call of a Learner asks for, as a Phase: learning rates as fastai writes them, options by name."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxcats.config import Phase
from jaxcats.errors import UserError, nearest
from jaxcats.own import Own

LR = float | Sequence[float] | slice | Literal["auto"]


def own_of(options: Mapping[str, Any]) -> tuple[Own, dict[str, Any]]:
    """(functions of the user's own, the other options) of a call: `augment` may be a function or a preset's name."""
    own = {k: v for k, v in options.items() if k in ("loss_fn", "metrics") or (k == "augment" and callable(v))}
    return Own(**own), {k: v for k, v in options.items() if k not in own}


def phase_of(fixed: Mapping[str, Any], options: Mapping[str, Any], now: Mapping[str, Any]) -> Phase:
    """The Phase of a call; its values are checked later, with the whole configuration.

    Args:
        fixed: fields that the call itself decides.
        options: fields that the user gave by name.
        now: what holds otherwise; augment only where features aren't precomputed.

    Raises:
        UserError: an option that is not there, or that the call decides.
    """
    known = [f.name for f in dataclasses.fields(Phase) if f.name not in fixed]
    for name in options:
        if name in fixed:
            raise UserError(f"{name}: this call sets it itself, to {fixed[name]!r}.")
        if name not in known:
            raise UserError(f"There is no option '{name}'.{nearest(name, known)} Options: {', '.join(known)}.")
    chosen = {k: v.item() if isinstance(v, np.generic) else v for k, v in {**now, **options, **fixed}.items()}
    if "lr" in chosen:
        chosen["lr"] = spread(chosen["lr"])
    if chosen["precompute"] and "augment" not in options:
        chosen["augment"] = "none"
    return Phase(**chosen)


def spread(lr: LR) -> float | tuple[float, ...] | Literal["auto"]:
    """A learning rate as a configuration has it; slice(a, b) is geometric from a to b, slice(b) is b/10, b/10, b."""
    if isinstance(lr, slice):
        if lr.stop is None or lr.step is not None:
            raise UserError(f"lr: {lr} can't be used; expected slice(a, b) or slice(b).")
        if lr.start is None:
            return (lr.stop / 10, lr.stop / 10, lr.stop)
        if not 0 < lr.start <= lr.stop:
            raise UserError(f"lr: {lr} can't be used; expected 0 < a <= b.")
        return tuple(float(x) for x in np.geomspace(lr.start, lr.stop, 3))
    if isinstance(lr, (Sequence, np.ndarray)) and not isinstance(lr, str):
        return tuple(float(x) for x in lr)
    return float(lr) if isinstance(lr, (int, float, np.number)) else lr
