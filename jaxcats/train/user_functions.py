"""Functions of a researcher's own in a run: what no configuration can hold."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.common.config import Config
from jaxcats.common.errors import UserError


@dataclass(frozen=True)
class UserFunctions:
    """Functions in place of this package's, or beside them; None: none.

    Attributes:
        loss_fn: `(logits float32 [B, C], labels int32 [B]) -> losses [B]` in JAX, what training and lr_find minimise. The
            validation loss stays the cross-entropy, so that runs can be compared.
        augment: `(image float32 [S, S, 3] from 0 to 255, key) -> image`, of the same shape, in JAX: what training does to a
            image after the phase's `augment`. The key is a function of (seed, epoch, image). It has no effect on phases
            with precompute.
        metrics: `(logits float32 [N, C], labels int32 [N]) -> {name: number}` in NumPy, of all validation images after each epoch.
    """

    loss_fn: Callable | None = None
    augment: Callable | None = None
    metrics: Callable | None = None

    def names(self, config: Config) -> dict[str, dict[str, str]]:
        """By phase, the functions that decide the result: {"head": {"loss_fn": "focal.loss"}}; phases without any are left out."""
        found = {}
        for name, phase in config.phases.items():
            used = {"loss_fn": self.loss_fn, "augment": None if phase.precompute else self.augment}
            if any(used.values()):
                found[name] = {part: function_name(function) for part, function in used.items() if function}
        return found

    def check(self, config: Config, *, classes: int, size: int) -> None:
        """UserError for a function that can't be used, before anything is computed; what it raises itself stays as it is."""
        import jax

        for part in ("loss_fn", "augment", "metrics"):
            function = getattr(self, part)
            if function is not None and not callable(function):
                raise UserError(f"{part}: {function!r} can't be used; expected a function.")
        if self.loss_fn:
            smoothed = next((name for name, p in config.phases.items() if p.label_smoothing), None)
            if smoothed is not None:
                raise UserError(
                    f"phases.{smoothed}.label_smoothing: has no effect with {function_name(self.loss_fn)}; set it to 0."
                )
            shapes = jax.ShapeDtypeStruct((2, classes), np.float32), jax.ShapeDtypeStruct((2,), np.int32)
            got = jax.eval_shape(self.loss_fn, *shapes)
            _same_shape("loss_fn", self.loss_fn, got, (2,), "a loss for each of the 2 images")
        if self.augment:
            if all(p.precompute for p in config.phases.values()):
                raise UserError(
                    f"augment: {function_name(self.augment)} has no effect, as every phase has precompute: true (features are "
                    f"computed once); set it to false where images are to be changed."
                )
            image = jax.ShapeDtypeStruct((size, size, 3), np.float32)
            got = jax.eval_shape(self.augment, image, jax.eval_shape(lambda: jax.random.key(0)))
            _same_shape("augment", self.augment, got, image.shape, "an image of the size it was given")
        if self.metrics:  # a slip in it should not cost an epoch
            labels = np.arange(4 * classes, dtype=np.int32) % classes
            logits = np.random.default_rng(0).standard_normal((len(labels), classes), np.float32)
            self.measure(logits, labels)

    def measure(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
        """What `metrics` says, by name; None for what is not a number."""
        if self.metrics is None:
            return {}
        found = self.metrics(logits, labels)
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise UserError(
                f"metrics: {function_name(self.metrics)} gives {found!r}; expected a dictionary, name to number."
            )
        numbers = {}
        for name, value in found.items():
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise UserError(
                    f"metrics: {function_name(self.metrics)} gives {value!r} for '{name}'; expected a number."
                ) from None
            numbers[name] = number if math.isfinite(number) else None
        return numbers


def function_name(function: Any) -> str:
    """Where a function is from: FILE.NAME, and of a functools.partial its arguments too."""
    if isinstance(function, functools.partial):
        given = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in sorted(function.keywords.items()))]
        return f"{function_name(function.func)}({', '.join(given)})"
    function = function if hasattr(function, "__qualname__") else type(function)
    module = function.__module__
    if module == "__main__" and hasattr(function, "__code__"):
        module = Path(function.__code__.co_filename).stem
    return f"{module}.{function.__qualname__}"


def describe_functions(names: Mapping[str, Mapping[str, str]]) -> str:
    """`UserFunctions.names` in words; 'none' for none."""
    return (
        ", ".join(f"{phase}: {part} {name}" for phase, used in names.items() for part, name in used.items()) or "none"
    )


def check_same_functions(names: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """UserError where a resumed run's functions are not those that it was started with, by their names."""
    if names != kept:
        raise UserError(
            f"--resume: the run was started with other functions of its own ({describe_functions(kept)}; now {describe_functions(names)}), which no "
            f"configuration holds. Resume with the script that started it, or train into another --workdir."
        )


def _same_shape(part: str, function: Callable, got: Any, expected: tuple[int, ...], meaning: str) -> None:
    shape = getattr(got, "shape", None)
    if shape != expected:
        what = f"an array of shape {shape}" if shape is not None else f"a {type(got).__name__}"
        raise UserError(f"{part}: {function_name(function)} gives {what}; expected {meaning}, shape {expected}.")
