"""What a run is made of before it runs: the pictures, the model, the plan of its phases, their pure steps and states."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax

from jaxcats import models
from jaxcats.config import Config, Phase, flat, training_changes
from jaxcats.core import optim
from jaxcats.core import state as states
from jaxcats.core.step import make_train_step, normalise
from jaxcats.data import augment
from jaxcats.data.index import FolderIndex, cache_folder
from jaxcats.data.index import scan as scan_folder
from jaxcats.data.preprocess import Preprocess
from jaxcats.errors import UserError


@dataclass(frozen=True)
class Setup:
    """What every phase shares."""

    config: Config
    index: FolderIndex
    model: models.Model
    preprocess: Preprocess
    cache: Path


def fingerprint(index: FolderIndex) -> str:
    """Hash of the pictures in their order, their labels and the split: what a resumed run must find unchanged."""
    digest = hashlib.sha256()
    for name, split in sorted(index.splits.items()):
        for h, label in zip(split.hashes, split.labels.tolist(), strict=True):
            digest.update(f"{name} {label} {h}\n".encode())
    return digest.hexdigest()


def check_config(config: Config, meta: dict[str, Any]) -> None:
    """UserError where a Config differs, in what decides the result, from the one a checkpoint was saved under."""
    changed = training_changes(meta["config"], flat(config))
    if changed:
        raise UserError(
            f"config.yaml: not what the checkpoint at step {meta['step']} was trained with ({'; '.join(changed)}). "
            f"Put it back, or train into another --workdir."
        )


@dataclass(frozen=True)
class Plan:
    """A phase and its place in the run; steps and epochs count over all phases."""

    index: int
    name: str
    phase: Phase
    first_step: int
    first_epoch: int
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.phase.epochs


def cache_of(config: Config) -> Path:
    """The cache folder of a Config."""
    return Path(config.cache_dir) if config.cache_dir else cache_folder()


def start_jax(config: Config) -> Path:
    """Turns on the persistent compilation cache, where it can be written; the cache folder."""
    cache = cache_of(config)
    with contextlib.suppress(OSError):
        (cache / "xla").mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return cache


def create_model(config: Config, num_classes: int, *, dtype: str | None = None) -> tuple[models.Model, Preprocess]:
    """The model of a Config and the Preprocess that its pictures go through; `dtype` is a run's own, where it has begun."""
    if dtype is None:
        auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        dtype = auto if config.precision == "auto" else config.precision
    model = models.create(config.model.backbone, num_classes, head=config.model.head, dtype=cast(models.Dtype, dtype))
    size = config.data.size or model.preprocess.size
    return model, dataclasses.replace(model.preprocess, size=size, policy=config.data.policy)


def setup(config: Config) -> Setup:
    """Indexes the pictures and creates the model; no weights yet."""
    cache = start_jax(config)
    d = config.data
    create_model(config, 2)  # a backbone's name that doesn't exist is said before any picture is read
    index = scan_folder(
        d.root,
        valid_fraction=d.valid_fraction,
        seed=config.seed,
        on_bad_file=d.on_bad_file,
        cache_dir=cache,
        manifest=d.manifest,
        rehash=d.rehash,
        workers=d.workers,
    )
    model, preprocess = create_model(config, len(index.classes))
    if len(index.splits["train"]) < 2:
        raise UserError(f"{d.root}: has one training picture; training needs two at least.")
    return Setup(config, index, model, preprocess, cache)


def initial_params(setup: Setup) -> tuple[Any, Any, dict[str, Any]]:
    """(params, batch_stats, facts about the weights): pretrained backbone and a fresh head, or all random."""
    key = jax.random.fold_in(jax.random.key(setup.config.seed), name_number("init"))
    if not setup.config.model.pretrained:
        return *jax.jit(setup.model.init)(key), {"source": "random", "seed": setup.config.seed}
    found = models.find_weights(setup.model.name, setup.config.model.weights)
    params, stats = models.load_pretrained(setup.model, found, key=key)
    facts = {"source": found.source, "sha256": found.sha256, "licence": found.licence, "top1": found.top1}
    return params, stats, facts


def name_number(name: str) -> int:
    """A stable number for `fold_in`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def plans(setup: Setup) -> list[Plan]:
    """The phases in order, with the steps and epochs before each."""
    found, step, epoch = [], 0, 0
    n = len(setup.index.splits["train"])
    for i, (name, phase) in enumerate(setup.config.phases.items()):
        per_epoch = n // min(phase.batch_size, n)
        found.append(Plan(i, name, phase, step, epoch, per_epoch))
        step, epoch = step + per_epoch * phase.epochs, epoch + phase.epochs
    return found


def make_optimizer(model: models.Model, plan: Plan) -> tuple[Any, Any]:
    """(tx, trainable): the optimizer of a phase, and a tree of bools like params."""
    phase = plan.phase
    groups = model.groups(models.shapes(model)[0])
    tx = optim.make_tx(
        phase.optimizer,
        schedules=schedules(plan),
        groups=groups,
        momentum=phase.momentum,
        weight_decay=phase.weight_decay,
    )
    return tx, optim.trainable_mask(groups, phase.freeze)


def make_phase(setup: Setup, plan: Plan) -> tuple[Callable, Callable[[Any, Any], states.TrainState]]:
    """The pure train step of a phase, and `(params, batch_stats) -> TrainState` with its fresh optimizer."""
    phase, model = plan.phase, setup.model
    tx, trainable = make_optimizer(model, plan)
    key = jax.random.key(setup.config.seed)
    flips = phase.augment in ("flip", "side_on")
    step = make_train_step(
        apply_fn=head_on_features(model) if phase.precompute else model.apply,
        tx=tx,
        trainable=trainable,
        preprocess=normalise(setup.preprocess.mean, setup.preprocess.std),
        augment=augment.flip(jax.random.fold_in(key, name_number("flip"))) if flips else None,
        key=jax.random.fold_in(key, name_number("dropout")),
        epoch_of=lambda step: plan.first_epoch + (step - plan.first_step) // plan.steps_per_epoch,
        bn_train=phase.bn == "train",
    )
    return step, lambda p, s: states.create(p, s, tx, trainable=trainable, step=plan.first_step)


def schedules(plan: Plan) -> list[optim.Schedule]:
    """One schedule per layer group, from the phase's first step."""
    return [optim.make_schedule(plan.phase.schedule, lr, plan.steps) for lr in plan.phase.lrs]


def abstract_state(model: models.Model, plan: Plan) -> states.TrainState:
    """Shapes and dtypes of a phase's state, without computing any of it."""
    tx, trainable = make_optimizer(model, plan)
    return jax.eval_shape(lambda p, s: states.create(p, s, tx, trainable=trainable), *models.shapes(model))


def head_on_features(model: models.Model) -> Callable:
    """`apply` for inputs that are features already."""

    def apply(params, batch_stats, x, *, train, bn_train=False, key=None):
        return model.apply_head(params, batch_stats, x, train=train, key=key)

    return apply
