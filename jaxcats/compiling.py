"""What convolutional networks need of the compiler and of the memory allocator on a CPU."""

import contextlib
import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import jax

# XLA on CPU gives matrix products and convolutions to YNNPACK since jaxlib 0.10. Its convolutions are slower than the
# Eigen ones that it replaces: whole networks run 1.2 to 1.3 times as fast without it on AVX-512 cores.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def jit(fun: Callable, *, convolutions: bool = True, **options: Any) -> Callable:
    """`jax.jit(fun, **options)`, compiled with what suits the default device, with or without convolutions in it."""
    chosen = compiler_options(jax.default_backend()) if convolutions else None
    return jax.jit(fun, compiler_options=chosen, **options)


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


def keep_heap() -> None:
    """Has glibc's allocator keep the memory that this process frees; where there is another allocator, does nothing.

    By default each large array is mapped anew and its pages are faulted in one by one, which takes a third of a train
    step's time. One arena for all threads, since only the main one can do without mapping.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)
