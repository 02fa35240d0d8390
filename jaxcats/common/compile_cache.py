"""Compiling and memory: `jit` with the CPU's compiler options, the persistent compilation cache, and glibc's allocator."""

import contextlib
import ctypes
import glob
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax

from jaxcats.common.io import cache_folder

# Since jaxlib 0.10 XLA on CPU gives matrix products and convolutions to YNNPACK. Its convolutions are slower than the
# Eigen ones that it replaced: without it whole networks run 1.2 to 1.3 times as fast on AVX-512 cores.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def jit(fun: Callable, *, convolutions: bool = True, **options: Any) -> Callable:
    """`jax.jit(fun, **options)` with the compiler options for the default device, if `fun` has convolutions."""
    xla_options = compiler_options(jax.default_backend()) if convolutions else None
    return jax.jit(fun, compiler_options=xla_options, **options)


@cache
def compiler_options(platform: str) -> dict[str, str] | None:
    """XLA's options for programs with convolutions on `platform`; None for the defaults.

    A jaxlib that does not know an option refuses to compile, so a tiny program is compiled first.
    """
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS).lower(0.0).compile()
    except Exception:  # its type differs between versions of jaxlib
        return None
    return _CPU_OPTIONS


def keep_freed_memory() -> None:
    """Makes glibc's allocator keep the memory that this process frees; does nothing with other allocators.

    By default each large array is mapped anew and its pages are faulted in one by one, which takes a third of a train
    step's time. All threads share one arena, because only the main arena works without mapping.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)


def enable_compilation_cache(cache: Path | None = None) -> None:
    """Turns on the persistent compilation cache in a cache folder (default: the user's), if it can be written."""
    folder = (cache or cache_folder()) / "xla"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        _remove_damaged_programs(folder)
    # On a full disk JAX would warn once for each program, with a line of its source.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")


def _remove_damaged_programs(folder: Path) -> None:
    """From now on, removes a cached program that JAX can't read, so that it is compiled and written again.

    A killed process or a full disk can leave half a program. JAX writes programs in place and never replaces them, so
    it would warn about this one in every run.
    """
    show = warnings.showwarning
    if getattr(show, "folder", None) == folder:
        return

    def remove_or_show(message: Any, *args: Any, **options: Any) -> None:
        damaged = re.match("Error reading persistent compilation cache entry for '([^'/]+)'", str(message))
        if not damaged:
            show(message, *args, **options)
            return
        with contextlib.suppress(OSError):  # in a shared cache the file may belong to somebody else
            for path in folder.glob(f"{glob.escape(damaged[1])}-*cache"):
                path.unlink()

    remove_or_show.folder = folder  # type: ignore[attr-defined]
    warnings.showwarning = remove_or_show
