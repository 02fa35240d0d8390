"""`create` describes a network, and `Model` holds its pure functions; find_weights and load_pretrained fill it.

A network is a backbone (images to a feature map), a pooling, and a head.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxcats.common.errors import UserError
from jaxcats.data.images import Preprocess
from jaxcats.models import pretrained, registry
from jaxcats.models.head import HEADS, LessonHead, LinearHead, pool
from jaxcats.models.pretrained import WeightFile
from jaxcats.models.registry import Backbone

Head = Literal["lesson", "linear", "classifier"]
Dtype = Literal["float32", "bfloat16"]
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
        dtype: of the convolutions' arithmetic; parameters, BatchNorm and the head stay in float32.
        channels: of the images, for your own code: everything in this package that reads images makes them RGB.
            Published weights are converted to this number, and `preprocess` has a mean and a deviation for each.
        weights: the weights that it will get, as for `find_weights`: a known name brings its own `preprocess`.

    Raises:
        UserError: an unknown name, head or dtype, no classes or channels, or another network's weights.
    """
    backbone = registry.get(name)
    for key, value, choices in (("head", head, HEADS), ("dtype", dtype, get_args(Dtype))):
        if value not in choices:
            raise UserError(f"{key}: {registry.unknown(value, choices)}")
    if num_classes < 1 or channels < 1:
        raise UserError(f"num_classes is {num_classes} and channels is {channels}; expected 1 or more")
    source = pretrained.known_source(registry.sources(name, weights), weights) or backbone.source
    preprocess = source.preprocess if source else Preprocess()  # ImageNet's usual statistics
    if channels == 1:
        mean, std = (sum(preprocess.mean) / 3,), (sum(preprocess.std) / 3,)
    else:
        mean, std = (tuple(rgb[i % 3] for i in range(channels)) for rgb in (preprocess.mean, preprocess.std))
    preprocess = dataclasses.replace(preprocess, mean=mean, std=std)
    return Model(name, num_classes, head, dtype, channels=channels, preprocess=preprocess, backbone=backbone)


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
    channels: int = field(default=3, kw_only=True)
    preprocess: Preprocess = field(kw_only=True)
    backbone: Backbone = field(kw_only=True, repr=False)

    @property
    def feature_size(self) -> int:
        """F, the number of pooled features that the head takes."""
        return self.backbone.channels * (2 if self.head == "lesson" else 1)

    def backbone_module(self) -> nn.Module:
        """The Linen module of the backbone, called as module(images, train=...)."""
        return self.backbone.build(jnp.dtype(self.dtype))

    def head_module(self) -> LessonHead | LinearHead:
        """The Linen module of the head, called as module(features, train=...)."""
        if self.head == "lesson":
            return LessonHead(self.num_classes)
        return LinearHead(self.num_classes, self.backbone.dropout if self.head == "classifier" else 0.0)

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Random (params, batch_stats): Kaiming-normal (fan out) convolutions, BatchNorm 1 and 0, the head's own."""
        backbone_key, head_key = jax.random.split(key)
        shape = (1, self.backbone.stride, self.backbone.stride, self.channels)
        params, batch_stats = _init(self.backbone_module(), shape, backbone_key)
        head_params, head_stats = self.init_head(head_key)
        return {"backbone": params, "head": head_params}, {"backbone": batch_stats, "head": head_stats}

    def init_head(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Random params and batch_stats of the head alone."""
        return _init(self.head_module(), (1, self.feature_size), key)

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
            batch_stats: as from `init` or `load_pretrained`.
            images: float32 [N,H,W,channels], normalised.
            train: the head's dropout is on, and its BatchNorm uses the batch's statistics and updates its averages.
            bn_train: the backbone's BatchNorms do so too; otherwise they use their stored averages.
            key: for dropout; needed when `train` is true and the head has dropout.
        """
        feature_map, backbone_stats = self._feature_map(params, batch_stats, images, bn_train=bn_train)
        features = pool(feature_map, head=self.head)
        return self.apply_head(params, {**batch_stats, "backbone": backbone_stats}, features, train=train, key=key)

    def apply_head(
        self, params: Tree, batch_stats: Tree, features: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        """The head alone, on features [N,F]: logits [N,C] and the new batch_stats, with the backbone's unchanged."""
        module = self.head_module()
        if train and key is None and (isinstance(module, LessonHead) or module.dropout):
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
        """The backbone's last feature map, float32 [N,h,w,channels], BatchNorm on its stored averages."""
        return self._feature_map(params, batch_stats, images, bn_train=False)[0].astype(jnp.float32)

    def features(self, params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        """The head's input: the pooled feature map, float32 [N,F], BatchNorm on its stored averages."""
        return pool(self._feature_map(params, batch_stats, images, bn_train=False)[0], head=self.head)

    def apply_map(self, params: Tree, batch_stats: Tree, feature_map: jax.Array) -> jax.Array:
        """Logits float32 [N,C] of a feature map from `feature_map`: pooling and head, evaluating."""
        return self.apply_head(params, batch_stats, pool(feature_map, head=self.head), train=False)[0]

    def activations(self, params: Tree, batch_stats: Tree, images: jax.Array) -> dict[str, jax.Array]:
        """The outputs of the backbone's parts, float32 [N,h,w,channels] by name, BatchNorm on its stored averages.

        The parts are the stem, every residual or inverted block ("layer2/block1") and the tail, in the order in which
        they are computed (under jit: by name, as JAX sorts dictionaries); of a registered backbone, its top-level
        modules. A block's output is the next block's input; stem and tail give their BatchNorm's output, before ReLU.
        """

        def is_part(module: nn.Module, method: str) -> bool:
            path = module.path
            return method == "__call__" and (len(path) == 1 or (len(path) == 2 and path[1].startswith("block")))

        variables = {"params": params["backbone"], "batch_stats": batch_stats["backbone"]}
        options = {"capture_intermediates": is_part, "mutable": ["intermediates"]}
        _, state = self.backbone_module().apply(variables, images, train=False, **options)
        captured: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(state["intermediates"])
        outputs = {path[:-1]: calls[-1] for path, calls in captured.items()}
        stages = {path[0] for path in outputs if len(path) == 2}  # a stage's output is that of its last block
        parts = {"/".join(path): out for path, out in outputs.items() if len(path) == 2 or path[0] not in stages}
        return {name: out.astype(jnp.float32) for name, out in parts.items()}

    def groups(self, params: Tree) -> Tree:
        """The layer group of every parameter, as the same tree with 0 (early backbone), 1 (late backbone), 2 (head)."""

        def group(path, _):
            part, *modules = (entry.key for entry in path)
            return 2 if part == "head" else 0 if modules[0] in self.backbone.first_group else 1

        return jax.tree_util.tree_map_with_path(group, params)

    def _feature_map(self, params, batch_stats, images, *, bn_train: bool):
        smallest = self.backbone.stride
        if images.ndim != 4 or images.shape[3] != self.channels or min(images.shape[1:3]) < smallest:
            expected = f"[N,H,W,{self.channels}] with sides of at least {smallest}"
            raise ValueError(f"images have shape {images.shape}; expected {expected}")
        variables = {"params": params["backbone"], "batch_stats": batch_stats["backbone"]}
        # Mutable either way, so that the result always has the stored averages in it, changed or not.
        result, stats = self.backbone_module().apply(variables, images, train=bn_train, mutable=["batch_stats"])
        return result, stats.get("batch_stats", {})


# One compiled program is faster to make than one for each shape, and JAX can keep it between runs.
@partial(jax.jit, static_argnums=(0, 1))
def _init(module: nn.Module, input_shape: tuple[int, ...], key: jax.Array) -> tuple[Tree, Tree]:
    variables: Any = module.lazy_init(key, jax.ShapeDtypeStruct(input_shape, jnp.float32), train=False)
    return variables["params"], variables.get("batch_stats", {})


@cache
def shapes(model: Model) -> tuple[Tree, Tree]:
    """The shapes of (params, batch_stats), as jax.ShapeDtypeStructs; costs no memory."""
    return jax.eval_shape(model.init, jax.random.key(0))


def find_weights(name: str, source: str | os.PathLike | None = None) -> WeightFile:
    """Find a backbone's weight file, download it if need be, and check its hash.

    Args:
        name: the backbone's.
        source: the name of weights for it ("resnet50.a1_in1k"), a path to a .safetensors, .pth, .pt or .npz file,
            "hf:owner/repo/file", "package:module/file", or None for the backbone's default.

    Raises:
        UserError: no such file, or not the published file (by its hash, where that is known).
        RunError: no network, no room on the disk, or a hub that is out of order.
    """
    return pretrained.find(registry.sources(name, source), source, backbone=name)


def load_pretrained(
    model: Model, source: str | os.PathLike | WeightFile | None = None, *, key: jax.Array | None = None
) -> tuple[Tree, Tree]:
    """(params, batch_stats) with the weights of a file.

    With head "classifier" everything comes from the file. With another head the file's classifier is left out, and
    the head is initialised from `key` (default jax.random.key(0)) as `model.init(key)` would.

    Args:
        model: from `create`.
        source: as for `find_weights`, or a WeightFile that it returned.
        key: for the head.

    Raises:
        UserError: lists every tensor that does not fit, or says why the file cannot be read.
    """
    file = source if isinstance(source, WeightFile) else find_weights(model.name, source)
    tensors = pretrained.with_channels(pretrained.read_tensors(file.path), model.channels)
    origin = f"{file.path} as {model.name}"
    tree = pretrained.from_state_dict(tensors, _published(model, *shapes(model)), origin=origin, **_naming(model))
    params, batch_stats = tree["params"], {"backbone": {}, "head": {}} | tree.get("batch_stats", {})
    if model.head != "classifier":
        _, head_key = jax.random.split(jax.random.key(0) if key is None else key)
        params["head"], batch_stats["head"] = model.init_head(head_key)
    return params, batch_stats


def to_state_dict(model: Model, params: Tree, batch_stats: Tree) -> dict[str, np.ndarray]:
    """The inverse of loading: arrays under torch's names, in torch's layout; the head only if it is the classifier."""
    return pretrained.to_state_dict(_published(model, params, batch_stats), **_naming(model))


def _published(model: Model, params: Tree, batch_stats: Tree) -> Tree:
    """The part of the network that a published file has: without a head that is not the classifier."""
    parts = ("backbone", "head") if model.head == "classifier" else ("backbone",)
    trees = {"params": params, "batch_stats": batch_stats}
    return {kind: {part: tree[part] for part in parts} for kind, tree in trees.items()}


def _naming(model: Model) -> dict[str, Any]:
    return {"torch_module": model.backbone.torch_module, "classifier": model.backbone.classifier}
