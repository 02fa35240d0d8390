"""Values of a Config that no run can have; each error names the key, the value and what was expected."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxcats.config import GROUPS, Config, Phase, field_types
from jaxcats.data.label_rule import check_labels
from jaxcats.errors import UserError


def validate(config: Config) -> Config:
    """The same Config, or UserError for values that no run can have."""

    def need(ok: bool, key: str, value: Any, expected: str) -> None:
        if not ok:
            raise UserError(f"{key}: {value!r} can't be used; expected {expected}.")

    _check_types(config, "", need)
    d = config.data
    need(
        d.size is None or 32 <= d.size <= 2048,
        "data.size",
        d.size,
        "32 to 2048 pixels (the backbones halve the picture five times)",
    )
    need(d.valid_fraction is None or 0 < d.valid_fraction < 1, "data.valid_fraction", d.valid_fraction, "0 < x < 1")
    need(d.test_fraction is None or 0 < d.test_fraction < 1, "data.test_fraction", d.test_fraction, "0 < x < 1")
    need(
        d.test_fraction is None or d.valid_fraction is not None,
        "data.test_fraction",
        d.test_fraction,
        "data.valid_fraction beside it",
    )
    check_labels(d.labels, d.group)
    need(d.workers is None or d.workers >= 1, "data.workers", d.workers, "at least 1")
    need(config.chunk_steps >= 1, "chunk_steps", config.chunk_steps, "at least 1")
    need(config.feature_batch >= 1, "feature_batch", config.feature_batch, "at least 1")
    need(config.checkpoint.every_steps >= 0, "checkpoint.every_steps", config.checkpoint.every_steps, "0 or more")
    need(config.checkpoint.every_epochs >= 1, "checkpoint.every_epochs", config.checkpoint.every_epochs, "at least 1")
    for name, seed in (("seed", config.seed), ("data.split_seed", config.data.split_seed)):
        need(0 <= seed < 2**31, name, seed, "0 to 2147483647")
    need(0 < config.max_error < 1, "max_error", config.max_error, "0 < x < 1")
    for name, p in config.phases.items():
        _validate_phase(p, f"phases.{name}", need)
    return config


KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}


def _check_types(section: Any, prefix: str, need: Callable[[bool, str, Any, str], None]) -> None:
    """Every field of a dataclass and of those in it: the command line checks its words, Python code could pass anything."""
    for name, kind in field_types(type(section)).items():
        value, key = getattr(section, name), prefix + name
        if dataclasses.is_dataclass(value):
            _check_types(value, f"{key}.", need)
        elif isinstance(value, Mapping):
            for each, phase in value.items():
                _check_types(phase, f"{key}.{each}.", need)
        else:
            options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
            options = [o for option in options for o in (typing.get_args(option) if _union(option) else [option])]
            need(any(_is(value, option) for option in options), key, value, " or ".join(map(_words, options)))


def _union(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Union


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and all(_is(x, float) for x in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return ", ".join(typing.get_args(kind))
    return "a list of numbers" if typing.get_origin(kind) is tuple else KINDS[kind]


def _validate_phase(p: Phase, key: str, need: Callable[[bool, str, Any, str], None]) -> None:
    if p.lr != "auto":
        need(len(p.lrs) == GROUPS, f"{key}.lr", p.lr, "one number, or three: early layers, late layers, head; or auto")
        need(all(math.isfinite(x) and x >= 0 for x in p.lrs) and max(p.lrs) > 0, f"{key}.lr", p.lr, "a number above 0")
    several = isinstance(p.momentum, (tuple, list))
    momenta = p.momentum if isinstance(p.momentum, (tuple, list)) else (p.momentum,)
    need(all(0 <= x < 1 for x in momenta), f"{key}.momentum", p.momentum, "0 <= x < 1")
    if several:
        need(len(momenta) == 3, f"{key}.momentum", p.momentum, "one number, or three: start, peak rate, end")
        need(p.schedule == "one_cycle", f"{key}.momentum", p.momentum, "one number, unless schedule is one_cycle")
    need(p.epochs >= 1, f"{key}.epochs", p.epochs, "at least 1")
    need(p.batch_size >= 2, f"{key}.batch_size", p.batch_size, "at least 2 (the head's BatchNorm needs two)")
    need(p.accumulate >= 1, f"{key}.accumulate", p.accumulate, "at least 1")
    parts = f"a divisor of batch_size, {p.batch_size}, that leaves two pictures in a part"
    need(
        p.batch_size % p.accumulate == 0 and p.batch_size // p.accumulate >= 2,
        f"{key}.accumulate",
        p.accumulate,
        parts,
    )
    for field_name in ("weight_decay", "clip"):
        need(0 <= getattr(p, field_name) < math.inf, f"{key}.{field_name}", getattr(p, field_name), "0 or more")
    need(0 <= p.label_smoothing < 1, f"{key}.label_smoothing", p.label_smoothing, "0 <= x < 1")
    need(p.cycle_len >= 1, f"{key}.cycle_len", p.cycle_len, "at least 1")
    need(p.cycle_mult >= 1, f"{key}.cycle_mult", p.cycle_mult, "at least 1")
    need(p.warmup is None or 0 <= p.warmup <= 1, f"{key}.warmup", p.warmup, "0 <= x <= 1")
    need(1 <= p.div < math.inf, f"{key}.div", p.div, "at least 1")
    if p.precompute:
        need(p.freeze == "backbone", f"{key}.freeze", p.freeze, "backbone with precompute: true")
        need(p.bn == "frozen", f"{key}.bn", p.bn, "frozen with precompute: true")
        why = "none with precompute: true (features are computed once, so augmentation has no effect)"
        need(p.augment == "none", f"{key}.augment", p.augment, why)


def check_tta(n: int, weight: float | None) -> None:
    """UserError for a number of changed versions, or a weight of the plain answer, that can't be."""
    if not isinstance(n, int) or n < 0:
        raise UserError(f"tta: {n!r} can't be used; expected 0 or more changed versions of each picture.")
    if weight is not None and not (n and 0 <= weight <= 1):
        raise UserError(
            f"tta_weight: {weight} can't be used; expected 0 to 1, the plain answer's share, and tta above 0."
        )
