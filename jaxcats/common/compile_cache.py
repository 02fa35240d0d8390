"""What convolutional networks need of the compiler and of the memory allocator on a CPU."""

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


def keep_freed_memory() -> None:
    """Has glibc's allocator keep the memory that this process frees; where there is another allocator, does nothing.

    By default each large array is mapped anew and its pages are faulted in one by one, which takes a third of a train
    step's time. One arena for all threads, since only the main one can do without mapping.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)


def enable_compilation_cache(cache: Path | None = None) -> None:
    """Turns on the persistent compilation cache in a cache folder (by default the user's), where it can be written."""
    folder = (cache or cache_folder()) / "xla"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        _mend_compiled(folder)
    # On a full disk it would say so once for each program, with a line of JAX's source.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")


def _mend_compiled(folder: Path) -> None:
    """From here on a cached program that can't be read is removed without a word, and so compiled and written anew.

    A killed process or a full disk may leave half of one: JAX writes it in place, never replaces it, and would warn of
    it in every run.
    """
    show = warnings.showwarning

    def hook(message: Any, *args: Any, **more: Any) -> None:
        damaged = re.match("Error reading persistent compilation cache entry for '([^'/]+)'", str(message))
        if not damaged:
            show(message, *args, **more)
            return
        for entry in folder.glob(f"{glob.escape(damaged[1])}-*cache"):
            with contextlib.suppress(OSError):  # of a cache that is shared and not ours to mend
                entry.unlink()

    if getattr(show, "folder", None) != folder:
        hook.folder = folder  # type: ignore[attr-defined]
        warnings.showwarning = hook
