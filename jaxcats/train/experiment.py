"""The parts of a run, before it starts: the images, the model, the plan of its phases, and their pure train steps.

`setup` reads the images and creates the model; `plans` lays the phases one after the other; `make_phase` turns one of
them into a train step and the state that it starts from.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import optax

from jaxcats import models
from jaxcats.common.compile_cache import enable_compilation_cache
from jaxcats.common.config import Config, Phase
from jaxcats.common.distributed import primary_first, require_equal
from jaxcats.common.errors import UserError
from jaxcats.common.io import cache_folder
from jaxcats.core import optim
from jaxcats.core import state as states
from jaxcats.core.schedules import Schedule, one_cycle_momentum
from jaxcats.core.schedules import make as make_schedule
from jaxcats.core.step import make_train_step, normalise, smoothed_cross_entropy
from jaxcats.data import augment
from jaxcats.data.images import Preprocess
from jaxcats.data.index import FolderIndex, scan, skipped
from jaxcats.train.user_functions import UserFunctions, describe_functions

SPLIT_FILE = "split.json"  # in a run folder: the split of each image, where neither folders nor a table give it


@dataclass(frozen=True)
class Experiment:
    """What all phases of a run share.

    Attributes:
        config: of the run.
        index: the images, their labels and splits.
        model: the network, without weights.
        preprocess: how an image becomes the input of the network.
        cache: the cache folder.
        user_functions: loss, augmentation and metrics of the user.
    """

    config: Config
    index: FolderIndex
    model: models.Model
    preprocess: Preprocess
    cache: Path
    user_functions: UserFunctions = field(default_factory=UserFunctions)


@dataclass(frozen=True)
class PhasePlan:
    """A phase and its place in the run.

    Attributes:
        index: number of the phase in the run, from 0.
        name: of the phase in the configuration.
        phase: its settings.
        first_step: steps of the phases before it.
        first_epoch: epochs of the phases before it.
        steps_per_epoch: full batches in the training split.
    """

    index: int
    name: str
    phase: Phase
    first_step: int = 0
    first_epoch: int = 0
    steps_per_epoch: int = 1

    @property
    def steps(self) -> int:
        """Steps of the phase."""
        return self.steps_per_epoch * self.phase.epochs

    @property
    def end_epoch(self) -> int:
        """Epochs of the run when the phase is done."""
        return self.first_epoch + self.phase.epochs

    def with_lr(self, lr: float) -> "PhasePlan":
        """The same plan with a learning rate in place of `auto`."""
        return dataclasses.replace(self, phase=dataclasses.replace(self.phase, lr=lr))

    def lr_schedules(self) -> list[Schedule]:
        """The learning rate of each layer group by step, counted from the first step of the phase."""
        p, cycles = self.phase, [n * self.steps_per_epoch for n in self.phase.cycles]
        return [
            make_schedule(p.schedule, lr, steps=self.steps, cycles=cycles, warmup=p.warmup, div=p.div) for lr in p.lrs
        ]

    def momentum(self) -> float | Schedule:
        """The momentum of the phase: a number, or a schedule by step."""
        p = self.phase
        if not isinstance(p.momentum, (tuple, list)):
            return p.momentum
        start, peak, end = p.momentum
        return one_cycle_momentum((start, peak, end), self.steps, warmup=0.25 if p.warmup is None else p.warmup)


def setup(
    config: Config,
    index: FolderIndex | None = None,
    *,
    user_functions: UserFunctions | None = None,
    run: Path | None = None,
) -> Experiment:
    """Indexes the images, unless `index` is given, and creates the model; it loads no weights yet.

    Args:
        config: of the run.
        index: the images, where they have been indexed before.
        user_functions: loss, augmentation and metrics of the user.
        run: a run folder that is resumed; its split is used where the cache has lost it.

    Raises:
        UserError: images, model or functions that cannot be trained.
    """
    cache = enable_compile_cache(config)
    create_model(config, 2)  # An unknown backbone is reported before any image is read.
    if index is None:
        index = primary_first(lambda: index_images(config, cache, run))
    model, preprocess = create_model(config, len(index.classes))
    require_equal("The images or the precision", f"{fingerprint(index)} {index.classes} {model.dtype}")
    if len(index.splits["train"]) < 2:
        raise UserError(f"{config.data.root}: there is only one training image; training needs at least two.")
    user_functions = user_functions or UserFunctions()
    user_functions.check(config, classes=len(index.classes), size=preprocess.size)
    return Experiment(config, index, model, preprocess, cache, user_functions)


def cache_folder_of(config: Config) -> Path:
    """The cache folder that a Config names, or the user's."""
    return Path(config.cache_dir) if config.cache_dir else cache_folder()


def enable_compile_cache(config: Config) -> Path:
    """Keeps compiled programs in the cache folder, where it is writable; returns that folder."""
    cache = cache_folder_of(config)
    enable_compilation_cache(cache)
    return cache


def create_model(config: Config, num_classes: int, *, dtype: str | None = None) -> tuple[models.Model, Preprocess]:
    """The model of a Config and the Preprocess of its images; a trained run gives the `dtype` that it was trained in."""
    if dtype is None:
        auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        dtype = auto if config.precision == "auto" else config.precision
    options: dict[str, Any] = {"head": config.model.head, "dtype": dtype, "weights": config.model.weights}
    model = models.create(config.model.backbone, num_classes, **options)
    size = config.data.size or model.preprocess.size
    return model, dataclasses.replace(model.preprocess, size=size, policy=config.data.policy)


def index_images(config: Config, cache: Path, run: Path | None = None) -> FolderIndex:
    """The images that a Config names, with the split of a run folder where one is given."""
    d, run_split = config.data, run / SPLIT_FILE if run else None
    names = ("labels", "group", "valid_fraction", "test_fraction", "on_bad_file", "manifest", "rehash", "workers")
    settings: dict[str, Any] = {name: getattr(d, name) for name in names} | {"columns": vars(d.columns)}
    return scan(d.root, seed=d.split_seed, cache_dir=cache, kept_manifest=run_split, **settings)


def fingerprint(index: FolderIndex) -> str:
    """Two hashes, "A-B", of the contents, labels and splits of the images: A ignores their order, B includes it.

    A resumed run must find both unchanged. For evaluation A is enough: renamed images are the same images.
    """
    rows = [
        f"{name} {label} {h}\n"
        for name, split in sorted(index.splits.items())
        for h, label in zip(split.hashes, split.labels.tolist(), strict=True)
    ]
    return "-".join(hashlib.sha256("".join(order).encode()).hexdigest() for order in (sorted(rows), rows))


def same_images(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same images, whatever their names."""
    return one.partition("-")[0] == other.partition("-")[0]


def initial_params(experiment: Experiment) -> tuple[Any, Any, dict[str, Any]]:
    """(params, batch_stats, facts about the weights): a pretrained backbone with a fresh head, or random weights."""
    seed = experiment.config.seed
    key = jax.random.fold_in(jax.random.key(seed), stable_number("init"))
    if not experiment.config.model.pretrained:
        return *jax.jit(experiment.model.init)(key), {"source": "random", "seed": seed}
    weights = models.find_weights(experiment.model.name, experiment.config.model.weights)
    params, batch_stats = models.load_pretrained(experiment.model, weights, key=key)
    facts = {"source": weights.source, "sha256": weights.sha256, "licence": weights.licence, "top1": weights.top1}
    return params, batch_stats, facts


def stable_number(name: str) -> int:
    """A number for `fold_in` that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def plans(experiment: Experiment) -> list[PhasePlan]:
    """The phases in order, each with the steps and epochs before it."""
    n, step, epoch = len(experiment.index.splits["train"]), 0, 0
    phase_plans = []
    for i, (name, phase) in enumerate(experiment.config.phases.items()):
        batch = min(phase.batch_size, n)
        if phase.accumulate > 1 and (batch % phase.accumulate or batch < 2 * phase.accumulate):
            raise UserError(
                f"phases.{name}.accumulate: a batch of {batch} does not divide into {phase.accumulate} parts of two or more images."
            )
        plan = PhasePlan(i, name, phase, step, epoch, n // batch)
        phase_plans.append(plan)
        step, epoch = step + plan.steps, plan.end_epoch
    return phase_plans


def make_phase(
    experiment: Experiment,
    plan: PhasePlan,
    *,
    key: jax.Array | None = None,
    rates: Sequence[Schedule] | None = None,
    params: Any = None,
) -> tuple[Callable, Callable[[Any, Any], states.TrainState]]:
    """(train_step, create_state): the pure train step of a phase, and `(params, batch_stats) -> TrainState` with a fresh optimizer.

    Args:
        experiment: what all phases share.
        plan: the phase and its place in the run.
        key: base of all randomness; None: the seed of the configuration.
        rates: learning rate by step of each layer group, in place of the phase's; the momentum is then constant.
        params: the parameters, or a part of them, for their structure alone; None: those of the model.
    """
    phase, model = plan.phase, experiment.model
    tx, trainable = make_optimizer(model, plan, rates=rates, params=params)
    key = jax.random.key(experiment.config.seed) if key is None else key
    train_step = make_train_step(
        apply_fn=head_on_features(model) if phase.precompute else model.apply,
        tx=tx,
        loss_fn=experiment.user_functions.loss_fn or smoothed_cross_entropy(phase.label_smoothing),
        trainable=trainable,
        preprocess=normalise(experiment.preprocess.mean, experiment.preprocess.std),
        augment=make_augmentation(experiment, phase, key),
        key=jax.random.fold_in(key, stable_number("dropout")),
        epoch_of=lambda step: plan.first_epoch + (step - plan.first_step) // plan.steps_per_epoch,
        bn_train=phase.bn == "train",
        accumulate=phase.accumulate,
    )
    return train_step, lambda p, s: states.create(p, s, tx, trainable=trainable, step=plan.first_step)


def make_optimizer(
    model: models.Model, plan: PhasePlan, *, rates: Sequence[Schedule] | None = None, params: Any = None
) -> tuple[optax.GradientTransformation, Any]:
    """(tx, trainable): the optimizer of a phase, and a tree of bools like params; arguments as of `make_phase`."""
    phase, momentum = plan.phase, plan.momentum()
    if rates is not None and isinstance(phase.momentum, (tuple, list)):
        momentum = phase.momentum[0]
    groups = model.groups(models.shapes(model)[0] if params is None else params)
    tx = optim.make_tx(
        phase.optimizer,
        schedules=plan.lr_schedules() if rates is None else rates,
        groups=groups,
        momentum=momentum,
        weight_decay=phase.weight_decay,
        clip=phase.clip,
    )
    return tx, optim.trainable_mask(groups, phase.freeze)


def abstract_state(model: models.Model, plan: PhasePlan) -> states.TrainState:
    """Shapes and dtypes of the state of a phase; computes nothing."""
    plan = plan.with_lr(0.01) if plan.phase.lr == "auto" else plan  # No shape depends on the rate.
    tx, trainable = make_optimizer(model, plan)
    return jax.eval_shape(lambda p, s: states.create(p, s, tx, trainable=trainable), *models.shapes(model))


def augment_key(key: jax.Array) -> jax.Array:
    """The key of the augmentation, from that of a run."""
    return jax.random.fold_in(key, stable_number("augment"))


def make_augmentation(experiment: Experiment, phase: Phase, key: jax.Array) -> Callable | None:
    """`(images, epoch, index) -> images` in a train step: the preset of the phase, then the user's function; None: neither."""
    preset, function = augment.PRESETS[phase.augment], experiment.user_functions.augment
    of_preset = preset and augment.make_augment(preset, key=augment_key(key), size=experiment.preprocess.size)
    if function is None or phase.precompute:
        return of_preset
    of_user = augment.per_image(function, key=jax.random.fold_in(augment_key(key), stable_number("own")))
    if of_preset is None:
        return of_user
    return lambda images, epoch, index: of_user(of_preset(images, epoch, index), epoch, index)


def head_on_features(model: models.Model) -> Callable:
    """`apply` of a model whose inputs are features already."""

    def apply(params, batch_stats, x, *, train, bn_train=False, key=None):
        return model.apply_head(params, batch_stats, x, train=train, key=key)

    return apply


def describe(experiment: Experiment) -> str:
    """What is about to be trained, in a few lines."""
    index, c = experiment.index, experiment.config
    names = ", ".join(index.classes[:6]) + (", ..." if len(index.classes) > 6 else "")
    start = "pretrained" if c.model.pretrained else "random weights"
    lines = [
        f"{len(index.splits['train']):,} training and {len(index.splits['valid']):,} validation images in "
        f"{len(index.classes)} classes ({names}) from {index.root}",
        *skipped(index.bad),
        f"{c.model.backbone} ({start}), {c.model.head} head, {experiment.preprocess.size} px, {experiment.model.dtype}",
    ]
    for name, p in c.phases.items():
        rate = f"{p.optimizer} {p.schedule} lr {p.lr}"
        lines.append(f"{name}: epochs {p.epochs}, {rate}, {p.freeze} frozen, BatchNorm {p.bn}")
    if functions := experiment.user_functions.names(c):
        lines.append(f"User functions: {describe_functions(functions)}")
    return "\n".join(lines)
