"""Networks with pure functions: create, register, find_weights, load_pretrained.

    model = models.create("resnet34", num_classes=2)
    params, batch_stats = models.load_pretrained(model)
    logits, _ = model.apply(params, batch_stats, images, train=False)

Only this folder knows Linen. A network is a backbone (images to a feature map), a pooling, and a head.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcats.common.errors import UserError
from jaxcats.data.images import Preprocess
from jaxcats.models import pretrained, registry
from jaxcats.models.head import HEADS, LessonHead, LinearHead, pool
from jaxcats.models.pretrained import WeightFile, WeightSource
from jaxcats.models.registry import Backbone, names, register

__all__ = [
    "Backbone",
    "Model",
    "WeightFile",
    "WeightSource",
    "create",
    "find_weights",
    "load_pretrained",
    "names",
    "register",
    "shapes",
    "to_state_dict",
]

Head = Literal["lesson", "linear", "classifier"]
Dtype = Literal["float32", "bfloat16"]
Part = Literal["backbone", "head"]
Tree = dict[str, Any]


def create(
    name: str,
    num_classes: int,
    *,
    head: Head = "lesson",
    dtype: Dtype = "float32",
    channels: int = 3,
    weights: str | os.PathLike | None = None,
) -> "Model":
    """Describe a network; nothing is computed or loaded until its functions are called.

    Args:
        name: resnet18, resnet34, resnet50, resnet101, resnet152, efficientnet_lite0, or a registered name.
        num_classes: outputs of the head.
        head: "lesson" (fast.ai's: concat pool, 512 units), "linear", or "classifier" (the network as published).
        dtype: what convolutions compute in; parameters, BatchNorm and the head stay in float32.
        channels: of the images, for code of your own: all that reads images in this package makes them RGB. Published
            weights are fitted to it, and `preprocess` has a mean and a deviation for each.
        weights: which weights it will get, as for `find_weights`: a known name brings its own `preprocess`.

    Raises:
        UserError: an unknown name, head or dtype, no classes or channels, or another network's weights.
    """
    backbone = registry.get(name)
    if head not in HEADS:
        raise UserError(f"head: {registry.unknown(head, HEADS)}")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype: {registry.unknown(dtype, ('float32', 'bfloat16'))}")
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}; expected 1 or more")
    if channels < 1:
        raise UserError(f"channels is {channels}; expected 1 or more")
    source = pretrained.known_source(registry.sources(name, weights), weights)
    preprocess = _of_channels(source.preprocess if source else backbone.preprocess, channels)
    size = backbone.channels * (2 if head == "lesson" else 1)
    facts: dict[str, Any] = {"preprocess": preprocess, "feature_size": size, "stride": backbone.stride}
    return Model(name, num_classes, head, dtype, channels=channels, **facts)


def _of_channels(preprocess: Preprocess, channels: int) -> Preprocess:
    """With a mean and a deviation for each channel: one has their averages, others have the three in turn, as the weights."""
    if channels == 3:
        return preprocess
    mean, std = (
        (sum(three) / 3,) if channels == 1 else tuple(three[i % 3] for i in range(channels))
        for three in (preprocess.mean, preprocess.std)
    )
    return dataclasses.replace(preprocess, mean=mean, std=std)


@dataclass(frozen=True)
class Model:
    """A network as pure functions of params and batch_stats; hashable, so it can be a static argument of jit.

    params and batch_stats are nested dicts of float32 arrays, {"backbone": ..., "head": ...}; a part without
    BatchNorm has {} in batch_stats. Images are float32 [N,H,W,channels], normalised as `preprocess` says; logits are
    float32 [N,C].
    """

    name: str
    num_classes: int
    head: Head = "lesson"
    dtype: Dtype = "float32"
    preprocess: Preprocess = field(kw_only=True)
    feature_size: int = field(kw_only=True)
    stride: int = field(kw_only=True)
    channels: int = field(default=3, kw_only=True)

    @property
    def min_size(self) -> int:
        """The smallest side of an image, in pixels."""
        return self.stride

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Random (params, batch_stats): Kaiming-normal (fan out) convolutions, BatchNorm 1 and 0, the head's own."""
        backbone_key, head_key = jax.random.split(key)
        shape = (1, self.stride, self.stride, self.channels)
        body = _init(_module(self, "backbone"), shape, backbone_key)
        head = self.init_head(head_key)
        return {"backbone": body[0], "head": head[0]}, {"backbone": body[1], "head": head[1]}

    def init_head(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Random params and batch_stats of the head alone."""
        return _init(_module(self, "head"), (1, self.feature_size), key)

    def apply(
        self,
        params: Tree,
        batch_stats: Tree,
        images: jax.Array,
        *,
        train: bool,
        bn_train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Tree]:
        """Logits [N,C] and the new batch_stats.

        Args:
            params: as from `init` or `load_pretrained`.
            batch_stats: likewise.
            images: float32 [N,H,W,3], normalised.
            train: the head's dropout is on and its BatchNorm uses, and averages, the batch's statistics.
            bn_train: the backbone's BatchNorms do so too; otherwise they use their stored averages.
            key: for dropout; needed when `train` and the head has any.
        """
        feature_map, body_stats = self._feature_map(params, batch_stats, images, bn_train=bn_train)
        features = pool(feature_map, head=self.head)
        stats = {**batch_stats, "backbone": body_stats}
        return self.apply_head(params, stats, features, train=train, key=key)

    def apply_head(
        self, params: Tree, batch_stats: Tree, features: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        """The head alone, on features [N,F]: logits [N,C] and the new batch_stats, the backbone's passed through."""
        module = _module(self, "head")
        if train and key is None and (self.head == "lesson" or module.dropout):
            raise ValueError("apply with train=True needs a key: the head has dropout")
        logits, stats = module.apply(
            {"params": params["head"], "batch_stats": batch_stats["head"]},
            features.astype(jnp.float32),
            train=train,
            rngs={"dropout": key} if train and key is not None else None,
            mutable=["batch_stats"],
        )
        return logits, {**batch_stats, "head": stats.get("batch_stats", {})}

    def feature_map(self, params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        """The backbone's last feature map, float32 [N,h,w,C], BatchNorm on its stored averages."""
        return self._feature_map(params, batch_stats, images, bn_train=False)[0].astype(jnp.float32)

    def features(self, params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        """What the head takes: the pooled feature map, float32 [N,F], BatchNorm on its stored averages."""
        return pool(self._feature_map(params, batch_stats, images, bn_train=False)[0], head=self.head)

    def apply_map(self, params: Tree, batch_stats: Tree, feature_map: jax.Array) -> jax.Array:
        """Logits float32 [N,C] of a feature map [N,h,w,C] as `feature_map` gives it: pooling and head, evaluating."""
        return self.apply_head(params, batch_stats, pool(feature_map, head=self.head), train=False)[0]

    def activations(self, params: Tree, batch_stats: Tree, images: jax.Array) -> dict[str, jax.Array]:
        """What the backbone's parts put out, float32 [N,h,w,C] by name, BatchNorm on its stored averages.

        The parts are the stem, every residual or inverted block ("layer2/block1") and what follows them, in the order
        they are computed (under jit: by name, as JAX sorts dictionaries); of another backbone, its top-level modules.
        A block's output is what the next block sees; the stem's and the tail's are those of their BatchNorm, before
        the ReLU.
        """
        places: list[tuple[str, ...]] = []

        def wanted(module: nn.Module, method: str) -> bool:
            path = module.path
            part = len(path) == 1 or (len(path) == 2 and path[1].startswith("block"))
            if part and method == "__call__":
                places.append(path)
                return True
            return False

        variables = {"params": params["backbone"], "batch_stats": batch_stats["backbone"]}
        backbone = _module(self, "backbone")
        _, state = backbone.apply(
            variables, images, train=False, capture_intermediates=wanted, mutable=["intermediates"]
        )
        of_blocks = {path[0] for path in places if len(path) == 2}
        outputs = {}
        for path in places:
            if len(path) == 2 or path[0] not in of_blocks:
                part: Any = state["intermediates"]
                for name in path:
                    part = part[name]
                outputs["/".join(path)] = part["__call__"][-1].astype(jnp.float32)
        return outputs

    def _feature_map(self, params, batch_stats, images, *, bn_train: bool):
        if images.ndim != 4 or images.shape[3] != self.channels or min(images.shape[1:3]) < self.min_size:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected [N,H,W,{self.channels}] with sides of at least "
                f"{self.min_size}"
            )
        variables = {"params": params["backbone"], "batch_stats": batch_stats["backbone"]}
        # Mutable either way, so that the result always has the stored averages in it, changed or not.
        result, stats = _module(self, "backbone").apply(variables, images, train=bn_train, mutable=["batch_stats"])
        return result, stats.get("batch_stats", {})

    def groups(self, params: Tree) -> Tree:
        """The layer group of every parameter, as the same tree with 0 (early backbone), 1 (late backbone), 2 (head)."""
        first = registry.get(self.name).first_group

        def group(path, _):
            part, *rest = (entry.key for entry in path)
            return 2 if part == "head" else 0 if rest[0] in first else 1

        return jax.tree_util.tree_map_with_path(group, params)


def _module(model: Model, part: Part) -> nn.Module:
    backbone = registry.get(model.name)
    if part == "backbone":
        return backbone.build(jnp.dtype(model.dtype))
    if model.head == "lesson":
        return LessonHead(model.num_classes)
    return LinearHead(model.num_classes, backbone.dropout if model.head == "classifier" else 0.0)


# Compiled as one program: sooner done than one program per shape, and JAX can keep it between runs.
@partial(jax.jit, static_argnums=(0, 1))
def _init(module: nn.Module, input_shape: tuple[int, ...], key: jax.Array) -> tuple[Tree, Tree]:
    variables: Any = module.lazy_init(key, jax.ShapeDtypeStruct(input_shape, jnp.float32), train=False)
    return variables["params"], variables.get("batch_stats", {})


def shapes(model: Model) -> tuple[Tree, Tree]:
    """The shapes of (params, batch_stats), as jax.ShapeDtypeStructs; costs no memory."""
    return _shapes(model, registry.get(model.name))


@cache
def _shapes(model: Model, backbone: Backbone) -> tuple[Tree, Tree]:
    return jax.eval_shape(model.init, jax.random.key(0))


def find_weights(name: str, source: str | os.PathLike | None = None) -> WeightFile:
    """Find a backbone's weight file, fetching it if need be, and hash it.

    Args:
        name: the backbone's.
        source: the name of weights for it ("resnet50.a1_in1k"), a path to a .safetensors, .pth, .pt or .npz file,
            "hf:owner/repo/file", "package:module/file", or None for the backbone's own.

    Raises:
        UserError: no such file, no network, or not the published file (by its hash, where that is known).
    """
    return pretrained.find(registry.sources(name, source), source, backbone=name)


def load_pretrained(
    model: Model, source: str | os.PathLike | WeightFile | None = None, *, key: jax.Array | None = None
) -> tuple[Tree, Tree]:
    """(params, batch_stats) with the weights of a file; raises UserError listing every tensor that doesn't fit.

    With head "classifier" all comes from the file. With another head the file's classifier is left out, and the head
    is initialised from `key` (default jax.random.key(0)) as `model.init(key)` would.

    Args:
        model: from `create`.
        source: as for `find_weights`, or a WeightFile that it returned.
        key: for the head.
    """
    file = source if isinstance(source, WeightFile) else find_weights(model.name, source)
    return _from_tensors(model, pretrained.read_tensors(file.path), key=key, origin=str(file.path))


def _from_tensors(model: Model, tensors: dict[str, np.ndarray], *, key, origin: str) -> tuple[Tree, Tree]:
    trees, published = list(shapes(model)), model.head == "classifier"
    if not published:
        trees = [{"backbone": tree["backbone"]} for tree in trees]
    origin = f"{origin} as {model.name}"
    tensors = pretrained.with_channels(tensors, model.channels)
    params, batch_stats = pretrained.from_state_dict(tensors, trees, origin=origin, **_naming(model))
    if not published:
        _, head_key = jax.random.split(jax.random.key(0) if key is None else key)
        params["head"], batch_stats["head"] = model.init_head(head_key)
    return params, {"backbone": {}, "head": {}, **batch_stats}


def to_state_dict(model: Model, params: Tree, batch_stats: Tree) -> dict[str, np.ndarray]:
    """The inverse of loading: arrays under torch's names, in torch's layout; the head only if it is the classifier."""
    trees = [params, batch_stats]
    if model.head != "classifier":
        trees = [{"backbone": tree["backbone"]} for tree in trees]
    return pretrained.to_state_dict(trees, **_naming(model))


def _naming(model: Model) -> dict[str, Any]:
    backbone = registry.get(model.name)
    return {"torch_module": backbone.torch_module, "classifier": backbone.classifier}
