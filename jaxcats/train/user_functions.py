"""Functions of the user in a run: a loss, an augmentation, metrics; what no configuration file can hold."""

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
    """Functions that replace this package's or add to them; None: not given.

    Attributes:
        loss_fn: `(logits float32 [B, C], labels int32 [B]) -> losses [B]` in JAX; training and lr_find minimise it. The
            validation loss remains the cross-entropy, so that runs can be compared.
        augment: `(image float32 [S, S, 3] from 0 to 255, key) -> image` of the same shape, in JAX; applied to a training
            image after the preset of the phase. The key depends on (seed, epoch, image) alone. It has no effect on phases
            with precompute.
        metrics: `(logits float32 [N, C], labels int32 [N]) -> {name: number}` in NumPy; called with all validation images
            after each epoch.
    """

    loss_fn: Callable | None = None
    augment: Callable | None = None
    metrics: Callable | None = None

    def names(self, config: Config) -> dict[str, dict[str, str]]:
        """The functions that decide the result, by phase: {"head": {"loss_fn": "focal.loss"}}; phases without any are left out."""
        names = {}
        for phase_name, phase in config.phases.items():
            functions = {"loss_fn": self.loss_fn, "augment": None if phase.precompute else self.augment}
            names[phase_name] = {part: function_name(function) for part, function in functions.items() if function}
        return {phase_name: used for phase_name, used in names.items() if used}

    def check(self, config: Config, *, classes: int, size: int) -> None:
        """Raises UserError for a function that cannot be used; an error of the function itself is not caught.

        Args:
            config: of the run.
            classes: C.
            size: S, the side of the images in pixels.
        """
        import jax

        for part, function in vars(self).items():
            if function is not None and not callable(function):
                raise UserError(f"{part}: {function!r} can't be used; expected a function.")
        if self.loss_fn:
            for name, phase in config.phases.items():
                if phase.label_smoothing:
                    raise UserError(f"phases.{name}.label_smoothing: has no effect with a loss_fn; set it to 0.")
            logits, labels = jax.ShapeDtypeStruct((2, classes), np.float32), jax.ShapeDtypeStruct((2,), np.int32)
            losses = jax.eval_shape(self.loss_fn, logits, labels)
            _check_shape("loss_fn", self.loss_fn, losses, "a loss for each of the 2 images", (2,))
        if self.augment:
            name = function_name(self.augment)
            if all(p.precompute for p in config.phases.values()):
                raise UserError(
                    f"augment: {name} has no effect, because every phase has precompute: true; set it to false."
                )
            image = jax.ShapeDtypeStruct((size, size, 3), np.float32)
            changed = jax.eval_shape(self.augment, image, jax.eval_shape(lambda: jax.random.key(0)))
            _check_shape("augment", self.augment, changed, "an image of the size it was given", image.shape)
        if self.metrics:  # A mistake that is found now does not cost an epoch.
            labels = np.arange(4 * classes, dtype=np.int32) % classes
            self.measure(np.random.default_rng(0).standard_normal((len(labels), classes), np.float32), labels)

    def measure(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
        """The numbers that `metrics` returns, by name; None for what is not finite."""
        if self.metrics is None:
            return {}
        values = self.metrics(logits, labels)
        try:
            numbers = {str(name): float(value) for name, value in values.items()}
        except (AttributeError, TypeError, ValueError):
            name = function_name(self.metrics)
            raise UserError(f"metrics: {name} returns {values!r}; expected a dictionary, name to number.") from None
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def function_name(function: Any) -> str:
    """Where a function comes from, FILE.NAME; of a functools.partial with its arguments."""
    if isinstance(function, functools.partial):
        arguments = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in sorted(function.keywords.items()))]
        return f"{function_name(function.func)}({', '.join(arguments)})"
    function = function if hasattr(function, "__qualname__") else type(function)
    module = function.__module__
    if module == "__main__" and hasattr(function, "__code__"):
        module = Path(function.__code__.co_filename).stem
    return f"{module}.{function.__qualname__}"


def describe_functions(names: Mapping[str, Mapping[str, str]]) -> str:
    """`UserFunctions.names` as a text; 'none' if there are none."""
    parts = [f"{phase}: {part} {name}" for phase, used in names.items() for part, name in used.items()]
    return ", ".join(parts) or "none"


def check_same_functions(names: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises UserError where the functions of a resumed run have other names than those that it was started with."""
    if names != saved:
        raise UserError(
            f"--resume: the run was started with other user functions ({describe_functions(saved)}; now "
            f"{describe_functions(names)}). Resume with the script that started it, or train into another --workdir."
        )


def _check_shape(part: str, function: Callable, value: Any, meaning: str, shape: tuple[int, ...]) -> None:
    if getattr(value, "shape", None) != shape:
        raise UserError(f"{part}: {function_name(function)} returns {value}; expected {meaning}, shape {shape}.")
