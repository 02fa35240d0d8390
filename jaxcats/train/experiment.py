"""What a run is made of before it runs: the images, the model, the plan of its phases, their pure steps and states."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxcats import models
from jaxcats.common.compile_cache import enable_compilation_cache
from jaxcats.common.config import Config, Phase, flat
from jaxcats.common.distributed import primary_first, require_equal
from jaxcats.common.errors import UserError
from jaxcats.core import optim, state
from jaxcats.core.schedules import Schedule, one_cycle_momentum
from jaxcats.core.schedules import make as make_schedule
from jaxcats.core.step import make_train_step, normalise, smoothed_cross_entropy
from jaxcats.data import augment
from jaxcats.data.images import Preprocess
from jaxcats.data.index import FolderIndex, cache_folder, skipped
from jaxcats.data.index import scan as scan_folder
from jaxcats.train.run_folder import training_changes
from jaxcats.train.user_functions import UserFunctions


@dataclass(frozen=True)
class Experiment:
    """What every phase shares."""

    config: Config
    index: FolderIndex
    model: models.Model
    preprocess: Preprocess
    cache: Path
    own: UserFunctions = field(default_factory=UserFunctions)


def fingerprint(index: FolderIndex) -> str:
    """Two hashes, "A-B", of the images' contents, labels and splits: whatever their order, and in their order.

    A run that resumes must find both unchanged. For judging the first is enough: renamed images are the same images.
    """
    rows = [
        f"{name} {label} {h}\n"
        for name, split in sorted(index.splits.items())
        for h, label in zip(split.hashes, split.labels.tolist(), strict=True)
    ]
    return "-".join(hashlib.sha256("".join(some).encode()).hexdigest() for some in (sorted(rows), rows))


def same_images(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same images, perhaps under other names."""
    return one.partition("-")[0] == other.partition("-")[0]


def check_config(config: Config, meta: dict[str, Any]) -> None:
    """UserError where a Config differs, in what decides the result, from the one a checkpoint was saved under."""
    changed = training_changes(meta["config"], flat(config))
    if changed:
        raise UserError(
            f"config.yaml: not what the checkpoint at step {meta['step']} was trained with ({'; '.join(changed)}). "
            f"Put it back, or train into another --workdir."
        )


@dataclass(frozen=True)
class PhasePlan:
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

    def with_lr(self, lr: float) -> "PhasePlan":
        """The same plan with a learning rate in place of `auto`."""
        return dataclasses.replace(self, phase=dataclasses.replace(self.phase, lr=lr))


def cache_folder_of(config: Config) -> Path:
    """The cache folder of a Config."""
    return Path(config.cache_dir) if config.cache_dir else cache_folder()


def enable_compile_cache(config: Config) -> Path:
    """Turns on the persistent compilation cache, where it can be written; the cache folder."""
    cache = cache_folder_of(config)
    enable_compilation_cache(cache)
    return cache


def create_model(config: Config, num_classes: int, *, dtype: str | None = None) -> tuple[models.Model, Preprocess]:
    """The model of a Config and the Preprocess that its images go through; `dtype` is a run's own, where it has begun."""
    if dtype is None:
        auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        dtype = auto if config.precision == "auto" else config.precision
    how: dict[str, Any] = {"head": config.model.head, "dtype": dtype, "weights": config.model.weights}
    model = models.create(config.model.backbone, num_classes, **how)
    size = config.data.size or model.preprocess.size
    return model, dataclasses.replace(model.preprocess, size=size, policy=config.data.policy)


SPLIT = "split.json"  # in a run folder: which side each image is on, where that isn't in folders or a table


def setup(
    config: Config, index: FolderIndex | None = None, *, own: UserFunctions | None = None, run: Path | None = None
) -> Experiment:
    """Indexes the images, unless that is done, and creates the model; no weights yet.

    Args:
        own: functions of one's own.
        run: a run folder, whose split holds where the cache has lost it.
    """
    cache = enable_compile_cache(config)
    create_model(config, 2)  # a backbone's name that doesn't exist is said before any image is read
    index = primary_first(lambda: index_images(config, cache, run)) if index is None else index
    model, preprocess = create_model(config, len(index.classes))
    require_equal("The images or the precision", f"{fingerprint(index)} {index.classes} {model.dtype}")
    if len(index.splits["train"]) < 2:
        raise UserError(f"{config.data.root}: has one training image; training needs two at least.")
    own = own or UserFunctions()
    own.check(config, classes=len(index.classes), size=preprocess.size)
    return Experiment(config, index, model, preprocess, cache, own)


def index_images(config: Config, cache: Path, run: Path | None = None) -> FolderIndex:
    """The images that a Config names; of a `run` divided as it has divided them."""
    d = config.data
    return scan_folder(
        d.root,
        labels=d.labels,
        columns=vars(d.columns),
        group=d.group,
        valid_fraction=d.valid_fraction,
        test_fraction=d.test_fraction,
        seed=d.split_seed,
        on_bad_file=d.on_bad_file,
        cache_dir=cache,
        manifest=d.manifest,
        kept_manifest=run / SPLIT if run else None,
        rehash=d.rehash,
        workers=d.workers,
    )


def initial_params(setup: Experiment) -> tuple[Any, Any, dict[str, Any]]:
    """(params, batch_stats, facts about the weights): pretrained backbone and a fresh head, or all random."""
    key = jax.random.fold_in(jax.random.key(setup.config.seed), stable_number("init"))
    if not setup.config.model.pretrained:
        return *jax.jit(setup.model.init)(key), {"source": "random", "seed": setup.config.seed}
    found = models.find_weights(setup.model.name, setup.config.model.weights)
    params, stats = models.load_pretrained(setup.model, found, key=key)
    facts = {"source": found.source, "sha256": found.sha256, "licence": found.licence, "top1": found.top1}
    return params, stats, facts


def stable_number(name: str) -> int:
    """A stable number for `fold_in`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def plans(setup: Experiment) -> list[PhasePlan]:
    """The phases in order, with the steps and epochs before each."""
    found, step, epoch = [], 0, 0
    n = len(setup.index.splits["train"])
    for i, (name, phase) in enumerate(setup.config.phases.items()):
        batch = min(phase.batch_size, n)
        if phase.accumulate > 1 and (batch % phase.accumulate or batch < 2 * phase.accumulate):
            raise UserError(
                f"phases.{name}.accumulate: {phase.accumulate} parts of two images at least don't make a batch of {batch}, "
                f"which is all the training images there are; set phases.{name}.accumulate to 1, or to a divisor."
            )
        per_epoch = n // min(phase.batch_size, n)
        found.append(PhasePlan(i, name, phase, step, epoch, per_epoch))
        step, epoch = step + per_epoch * phase.epochs, epoch + phase.epochs
    return found


def make_optimizer(
    model: models.Model, plan: PhasePlan, *, rates: Sequence[Schedule] | None = None, params: Any = None
) -> tuple[Any, Any]:
    """(tx, trainable): the optimizer of a phase, and a tree of bools like params.

    Args:
        model: whose params, unless `params` (or a part of them) are given, only for their structure.
        plan: of the phase.
        rates: learning rates by step and layer group in place of the phase's.
        params: see `model`.
    """
    phase = plan.phase
    groups = model.groups(models.shapes(model)[0] if params is None else params)
    tx = optim.make_tx(
        phase.optimizer,
        schedules=schedules(plan) if rates is None else rates,
        groups=groups,
        momentum=momentum(plan) if rates is None else first_momentum(phase),
        weight_decay=phase.weight_decay,
        clip=phase.clip,
    )
    return tx, optim.trainable_mask(groups, phase.freeze)


def first_momentum(phase: Phase) -> float:
    """The momentum that a phase begins with."""
    return phase.momentum[0] if isinstance(phase.momentum, (tuple, list)) else phase.momentum


def momentum(plan: PhasePlan) -> float | Schedule:
    """A phase's momentum: a number, or by step."""
    phase = plan.phase
    if not isinstance(phase.momentum, (tuple, list)):
        return phase.momentum
    start, peak, end = phase.momentum
    warmup = 0.25 if phase.warmup is None else phase.warmup
    return one_cycle_momentum((start, peak, end), plan.steps, warmup=warmup)


def schedules(plan: PhasePlan) -> list[Schedule]:
    """One learning rate by step per layer group, counted from the phase's first step."""
    phase = plan.phase
    cycles = [n * plan.steps_per_epoch for n in phase.cycles]
    return [
        make_schedule(phase.schedule, lr, steps=plan.steps, cycles=cycles, warmup=phase.warmup, div=phase.div)
        for lr in phase.lrs
    ]


def augmentation(phase: Phase) -> augment.Augmentation | None:
    """What a phase does to its images."""
    return augment.PRESETS[phase.augment]


def augment_key(key: jax.Array) -> jax.Array:
    """The augmentation's key, from a run's."""
    return jax.random.fold_in(key, stable_number("augment"))


def change(setup: Experiment, phase: Phase, key: jax.Array) -> Callable | None:
    """What a phase does to its images, in a train step: its `augment`, then a function of one's own; None: nothing."""
    how, own = augmentation(phase), setup.own.augment
    preset = how and augment.make_augment(how, key=augment_key(key), size=setup.preprocess.size)
    if own is None or phase.precompute:
        return preset
    each = augment.per_image(own, key=jax.random.fold_in(augment_key(key), stable_number("own")))
    return each if preset is None else lambda images, *which: each(preset(images, *which), *which)


def make_phase(
    setup: Experiment,
    plan: PhasePlan,
    *,
    key: jax.Array | None = None,
    rates: Sequence[Schedule] | None = None,
    params: Any = None,
) -> tuple[Callable, Callable[[Any, Any], state.TrainState]]:
    """The pure train step of a phase, and `(params, batch_stats) -> TrainState` with its fresh optimizer.

    Args:
        setup: what all phases share.
        plan: the phase and its place.
        key: base of all randomness; by default the configuration's seed.
        rates: see `make_optimizer`.
        params: see `make_optimizer`.
    """
    phase, model = plan.phase, setup.model
    tx, trainable = make_optimizer(model, plan, rates=rates, params=params)
    key = jax.random.key(setup.config.seed) if key is None else key
    step = make_train_step(
        apply_fn=head_on_features(model) if phase.precompute else model.apply,
        tx=tx,
        loss_fn=setup.own.loss_fn or smoothed_cross_entropy(phase.label_smoothing),
        trainable=trainable,
        preprocess=normalise(setup.preprocess.mean, setup.preprocess.std),
        augment=change(setup, phase, key),
        key=jax.random.fold_in(key, stable_number("dropout")),
        epoch_of=lambda step: plan.first_epoch + (step - plan.first_step) // plan.steps_per_epoch,
        bn_train=phase.bn == "train",
        accumulate=phase.accumulate,
    )
    return step, lambda p, s: state.create(p, s, tx, trainable=trainable, step=plan.first_step)


def abstract_state(model: models.Model, plan: PhasePlan) -> state.TrainState:
    """Shapes and dtypes of a phase's state, without computing any of it."""
    plan = plan.with_lr(0.01) if plan.phase.lr == "auto" else plan  # no shape depends on the rate
    tx, trainable = make_optimizer(model, plan)
    return jax.eval_shape(lambda p, s: state.create(p, s, tx, trainable=trainable), *models.shapes(model))


def head_on_features(model: models.Model) -> Callable:
    """`apply` for inputs that are features already."""

    def apply(params, batch_stats, x, *, train, bn_train=False, key=None):
        return model.apply_head(params, batch_stats, x, train=train, key=key)

    return apply


def rates(lr: Any) -> str:
    """A phase's learning rate, or its three, in words."""
    return " / ".join(map(str, lr if len(set(lr)) > 1 else lr[:1])) if isinstance(lr, (tuple, list)) else str(lr)


def describe(setup: Any) -> str:
    """What is about to be trained, in a few lines."""
    index, c = setup.index, setup.config
    train, valid = index.splits["train"], index.splits["valid"]
    lines = [
        f"{len(train):,} training and {len(valid):,} validation images in {len(index.classes)} classes "
        f"({', '.join(index.classes[:6])}{', ...' if len(index.classes) > 6 else ''}) from {index.root}"
    ]
    lines += skipped(index.bad)
    start = "pretrained" if c.model.pretrained else "random weights"
    lines.append(
        f"{c.model.backbone} ({start}), {c.model.head} head, {setup.preprocess.size} px, {setup.model.dtype}; "
        + "; ".join(
            f"{n}: {p.epochs} epoch{'s' * (p.epochs > 1)}, {p.optimizer} {p.schedule} lr {rates(p.lr)}, "
            f"{p.freeze} frozen, BatchNorm {p.bn}"
            for n, p in c.phases.items()
        )
    )
    if names := setup.own.names(c):
        from jaxcats.train.user_functions import describe_functions

        lines.append(f"Functions of your own: {describe_functions(names)}")
    return "\n".join(lines)
