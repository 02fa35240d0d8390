"""The exported program of an artefact: what it may hold, and its first run, in a process of its own.

A program is data that a compiler in C++ reads, and a damaged or hostile one can bring the process down that reads it.
So a program that this machine has not met is read, compiled and run once by a child process with bounded memory and
time; its hash is then kept in the cache folder. This keeps accidents and crude attacks away. It is no sandbox: the child
runs with the user's rights, and JAX says that only trusted programs should be run.
"""

import contextlib
import glob
import hashlib
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import numpy as np

from jaxcats.compiling import jit
from jaxcats.data.files import cache_folder
from jaxcats.storage.atomic import write_bytes

RULES = 1  # raise it when the rules below get stricter: every program is then tried again
SECONDS = 120
MEMORY = 8 << 30  # bytes that the first run may have
LARGEST = 1 << 28  # elements of one array, for one picture

# Arithmetic on arrays and what batch sizes and platforms need; no loops, no randomness, no talk with the outside.
_OPERATIONS = """
    abs add and atan2 bitcast_convert broadcast_in_dim case cbrt ceil clamp compare concatenate constant convert
    convolution cosine divide dot_general dynamic_broadcast_in_dim dynamic_conv dynamic_gather dynamic_iota dynamic_pad
    dynamic_reshape dynamic_slice dynamic_update_slice exponential exponential_minus_one floor gather get_dimension_size
    iota is_finite log log_plus_one logistic maximum minimum multiply negate not or pad power real_dynamic_slice reduce
    reduce_precision reduce_window remainder reshape return reverse round_nearest_afz round_nearest_even rsqrt select sign
    sine slice sqrt subtract tan tanh transpose xor
"""
OPERATIONS = frozenset(_OPERATIONS.split())
FRAME = frozenset({"builtin.module", "func.func", "func.call", "func.return"})
CALLS = frozenset({"shape_assertion"})  # the export's own check of the batch size


def check(program: bytes) -> Any:
    """The jax.export.Exported of a program that holds nothing but arithmetic; ValueError with the reason otherwise.

    Only for programs of this process's own making or after `first_run`.
    """
    from jax.interpreters.mlir import make_ir_context
    from jaxlib.mlir import ir

    exported = jax.export.deserialize(bytearray(program))
    if exported.ordered_effects or exported.unordered_effects or exported.nr_devices != 1:
        raise ValueError("a program with side effects, or for several devices")

    reasons: list[str] = []

    def visit(operation: Any) -> Any:  # an exception in here would lose its type
        reasons.extend(_objections(operation))
        return ir.WalkResult.INTERRUPT if reasons else ir.WalkResult.ADVANCE

    with make_ir_context():
        ir.Module.parse(exported.mlir_module()).operation.walk(visit)
    if reasons:
        raise ValueError(reasons[0])
    return exported


def _objections(operation: Any) -> Iterator[str]:
    dialect, _, name = operation.name.partition(".")
    if name == "custom_call":
        target = str(operation.attributes["call_target_name"]).strip('"')
        if target not in CALLS:
            yield f"it calls {target!r}, which is outside the program"
    elif operation.name not in FRAME and dialect != "chlo" and not (dialect == "stablehlo" and name in OPERATIONS):
        yield f"it holds the operation {operation.name}, which no classifier needs"
    for result in operation.results:
        shape = re.fullmatch(r"tensor<((?:[\d?]+x)*)\w+>", str(result.type))
        if not shape:
            yield f"it makes a {str(result.type)[:40]!r}, where arrays were expected"
        elif math.prod(int(n) for n in re.findall(r"\d+", shape[1])) > LARGEST:
            yield f"it makes an array of shape {shape[1][:-1]}, which is too large"


def compile_for(exported: Any, tensors: Any, batch: int) -> Any:
    """The program compiled for so many pictures; ValueError where it wants memory out of all proportion."""
    images = exported.in_avals[-1]
    side = images.shape[1]
    compiled = jit(exported.call).lower(tensors, jax.ShapeDtypeStruct((batch, *images.shape[1:]), np.uint8)).compile()
    need: Any = compiled.memory_analysis()
    weights = sum(4 * x.size for x in jax.tree.leaves(tensors))
    allowed = (1 << 30) + 4 * weights + batch * side * side * 3 * 1024  # a network has some 100 bytes a pixel at work
    if need is not None and need.temp_size_in_bytes + need.output_size_in_bytes > allowed:
        raise ValueError(f"it wants {need.temp_size_in_bytes >> 20:,} MiB for {batch} pictures of {side} pixels")
    return compiled


def keep_compiled(cache: Path | None = None) -> None:
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


def _mark(program: bytes):
    versions = f"{RULES} {jax.__version__} {jaxlib.version.__version__} "
    return cache_folder() / "programs" / hashlib.sha256(versions.encode() + program).hexdigest()


def remember(program: bytes) -> None:
    """Notes that a program is known to be harmless; the next load starts without a first run."""
    with contextlib.suppress(OSError):
        _mark(program).parent.mkdir(parents=True, exist_ok=True)
        _mark(program).touch()


def keep(key: str, program: bytes) -> None:
    """Keeps a program that was checked and remembered, under a key of all that decides it, in the cache folder."""
    with contextlib.suppress(OSError):
        write_bytes(cache_folder() / "programs" / f"{key}.stablehlo", hashlib.sha256(program).digest() + program)


def kept(key: str) -> bytes | None:
    """A program kept under this key, whole and remembered as harmless; else None."""
    try:
        content = (cache_folder() / "programs" / f"{key}.stablehlo").read_bytes()
    except OSError:
        return None
    digest, program = content[:32], content[32:]
    whole = hashlib.sha256(program).digest() == digest and _mark(program).exists()
    return program if whole else None


def first_run(program: bytes) -> None:
    """Tries a program that this machine has not met, in a child process; ValueError with the reason if it fails."""
    if _mark(program).exists():
        return
    # The child finds modules where this process does, and nowhere else.
    places = os.pathsep.join(place for place in sys.path if place)
    child = [sys.executable, "-P", "-m", "jaxcats.storage.program"]
    environment = os.environ | {"PYTHONPATH": places}
    try:
        done = subprocess.run(child, input=program, capture_output=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise ValueError(f"its first run was not done after {SECONDS} s") from None
    if done.stdout.strip().endswith(b"fine"):
        return remember(program)
    said = (done.stdout.strip() or done.stderr.strip()).decode(errors="replace").splitlines()
    why = said[-1][:200] if said and done.returncode >= 0 else f"exit code {done.returncode}"
    raise ValueError(f"its first run failed ({why})")


def _main() -> None:
    """The child: a program on stdin, 'fine' or the reason on stdout."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    jax.config.update("jax_platforms", "cpu")
    keep_compiled()
    try:
        exported = check(sys.stdin.buffer.read())
        tensors, images = jax.tree.unflatten(
            exported.in_tree,
            [np.zeros([d if isinstance(d, int) else 1 for d in a.shape], a.dtype) for a in exported.in_avals],
        )[0]
        out = compile_for(exported, tensors, 1)(tensors, images)
        jax.block_until_ready(out)
        print("fine")
    except MemoryError:
        print(f"it wants more than {MEMORY >> 30} GiB")
    except Exception as error:
        print((str(error).splitlines() or [""])[0] or type(error).__name__)


if __name__ == "__main__":
    _main()
