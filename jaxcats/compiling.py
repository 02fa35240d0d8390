"""`jit` with the compiler's options for convolutional networks on CPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax

# XLA on CPU gives matrix products and convolutions to YNNPACK since jaxlib 0.10. Its convolutions are slower than the
# Eigen ones that it replaces: whole networks run 1.2 to 1.3 times as fast without it on AVX-512 cores.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def jit(fun: Callable, **options: Any) -> Callable:
    """`jax.jit(fun, **options)`, compiled for the default device with the options that suit it."""
    return jax.jit(fun, compiler_options=compiler_options(jax.default_backend()), **options)


@cache
def compiler_options(platform: str) -> dict[str, str] | None:
    """XLA's options for programs with convolutions on `platform`; None for its defaults.

    A jaxlib that does not know an option refuses to compile, so a tiny program asks first.
    """
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS).lower(0.0).compile()
    except Exception:  # which one differs between versions of jaxlib
        return None
    return _CPU_OPTIONS
