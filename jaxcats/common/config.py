"""The configuration: frozen dataclasses, YAML files with every key checked, saving. Values: validation.py; flags: cli.py."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxcats.common.errors import UserError, nearest

GROUPS = 3  # every backbone has three layer groups: early, late, head


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table of labels.

    Args:
        path: images, relative to data.root.
        label: their classes.
        split: train, valid or test; such a column may be missing.
    """

    path: str = "path"
    label: str = "label"
    split: str = "split"


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they become arrays.

    Args:
        root: folder that holds train/ and valid/ (or val/, validation/) with a folder per class; or a folder of class folders, with valid_fraction.
        size: side of the square input in pixels; empty: the size the weights were trained with.
        policy: lesson: shorter side to size, centre crop; weights: shorter side to size / crop fraction, centre crop.
        labels: folders: a folder per class; parent: the folder that an image lies in, at any depth; a regular expression with (?P<label>...) on the path; or a .csv, .tsv or .parquet file.
        columns: of that file.
        valid_fraction: share of each class set aside for validation when neither a valid/ folder nor the table says it.
        test_fraction: share set aside likewise for a test split, which only evaluate --split test looks at.
        group: images that stay together when they are set aside: a regular expression with (?P<group>...) on the path, or a column of the table.
        split_seed: of what is set aside: the same for every seed of the training, so that runs can be compared.
        manifest: file that records the split made by valid_fraction; empty: in the cache folder.
        on_bad_file: what to do with an image that can't be decoded.
        workers: threads that decode; empty: one per processor.
        rehash: read every file again instead of trusting size and modification time.
    """

    root: str = "data/dogscats"
    size: int | None = None
    policy: Literal["lesson", "weights"] = "lesson"
    labels: str = "folders"
    columns: Columns = field(default_factory=Columns)
    valid_fraction: float | None = None
    test_fraction: float | None = None
    group: str | None = None
    split_seed: int = 0
    manifest: str | None = None
    on_bad_file: Literal["skip", "fail"] = "skip"
    workers: int | None = None
    rehash: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101, resnet152 or efficientnet_lite0, or a name registered by your own code.
        head: lesson: concat pool, BN, dropout, 512, BN, dropout, classes; linear: average pool and one dense layer.
        pretrained: false starts from random weights.
        weights: a name that `jaxcats weights list` gives, a .safetensors, .pth or .npz file, hf:OWNER/REPO/FILE or package:MODULE/FILE; empty: the backbone's own.
    """

    backbone: str = "resnet34"
    head: Literal["lesson", "linear"] = "lesson"
    pretrained: bool = True
    weights: str | None = None


@dataclass(frozen=True)
class Phase:
    """One stretch of training; phases run in the order of the file, each with a fresh optimizer.

    Args:
        epochs: passes over the training images.
        lr: peak learning rate, or three of them: early layers, late layers, head; auto: lr_find's valley.
        freeze: backbone: only the head learns; first: the early layers don't; nothing: all learn.
        precompute: compute the frozen backbone's features once and train the head on them.
        optimizer: sgd (with momentum), adam or adamw.
        momentum: of sgd (b1 of adam); with one_cycle also three: at the start, at the peak rate, at the end.
        weight_decay: never applied to biases and BatchNorm; decoupled for adamw, added to the gradient otherwise.
        clip: greatest norm of the gradient; 0: no limit.
        label_smoothing: share of the target spread over all classes.
        schedule: course of the learning rate over the phase; exponential falls to a hundredth.
        cycle_len: sgdr: epochs of the first cycle.
        cycle_mult: sgdr: each cycle is so many times as long as the one before.
        warmup: share of the steps in which the rate rises; empty: 0.25 (one_cycle), 0.1 (warmup_cosine).
        div: one_cycle starts at lr / div.
        batch_size: images per step.
        accumulate: parts that a batch goes through the network in, one after the other, to save memory.
        bn: frozen: the backbone's BatchNorms run on their stored averages; train: all of them, those of frozen layers too, run on the batch's statistics and update the averages.
        augment: none; flip (left-right); crop (a window of a larger image); side_on (crop, flip, rotation, lighting); top_down (the same with all eight symmetries). Not with precompute.
        driver: stream: batches decoded on the fly; scan: everything resident on the device; auto: scan with precompute.
    """

    epochs: int = 3
    lr: float | tuple[float, ...] | Literal["auto"] = 0.01
    freeze: Literal["backbone", "first", "nothing"] = "backbone"
    precompute: bool = False
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float | tuple[float, ...] = 0.9
    weight_decay: float = 0.0
    clip: float = 0.0
    label_smoothing: float = 0.0
    schedule: Literal["constant", "cosine", "warmup_cosine", "sgdr", "one_cycle", "exponential"] = "constant"
    cycle_len: int = 1
    cycle_mult: int = 1
    warmup: float | None = None
    div: float = 25.0
    batch_size: int = 64
    accumulate: int = 1
    bn: Literal["frozen", "train"] = "frozen"
    augment: Literal["none", "flip", "crop", "side_on", "top_down"] = "none"
    driver: Literal["auto", "stream", "scan"] = "auto"

    @property
    def lrs(self) -> tuple[float, ...]:
        """One learning rate per layer group."""
        if self.lr == "auto":
            raise ValueError("lr: auto has no value before lr_find has run")
        return tuple(self.lr) if isinstance(self.lr, (tuple, list)) else (self.lr,) * GROUPS

    @property
    def cycles(self) -> tuple[int, ...]:
        """Epochs of each cycle of sgdr; the last is cut where `epochs` ends."""
        found, length = [], self.cycle_len
        while sum(found) < self.epochs:
            found.append(min(length, self.epochs - sum(found)))
            length *= self.cycle_mult
        return tuple(found)


def sgdr_epochs(n_cycle: int, cycle_len: int, cycle_mult: int) -> int:
    """Epochs of n cycles, each `cycle_mult` times as long as the one before: 1 + 2 + 4 = 7 for (3, 1, 2)."""
    return sum(cycle_len * cycle_mult**i for i in range(n_cycle))


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and which one is judged.

    Args:
        every_steps: save every so many steps as well as after each epoch (with scan: at the next chunk boundary); 0: no.
        every_epochs: save after every so many epochs; the last epoch of a phase is always saved.
        use: last or best (fewest validation errors, then lowest loss): what the final evaluation uses.
    """

    every_steps: int = 0
    every_epochs: int = 1
    use: Literal["last", "best"] = "last"


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes that train together; all empty: one process, or what SLURM, Open MPI, Kubernetes or a TPU pod says.

    Args:
        coordinator: HOST:PORT of the first process, reachable from all.
        num_processes: how many there are.
        process_id: which of them this one is, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclass(frozen=True)
class Config:
    """Everything that decides a run.

    Args:
        seed: of initial weights, order, augmentation and dropout.
        data: The images
        model: The network
        phases: name -> Phase, run in order; --phases.NAME.FIELD VALUE changes one of the file's.
        checkpoint: Checkpoints
        distributed: Several processes
        precision: of the arithmetic; auto: float32 on CPU, bfloat16 elsewhere. Parameters are float32 always.
        chunk_steps: steps per compiled scan; checkpoints fall on its boundaries.
        feature_batch: images per call of the frozen backbone, and in evaluation.
        cache_dir: for the index, features and compiled programs; empty: JAXCATS_CACHE or the user's cache folder.
        max_error: of the answers that the classifier gives when it may abstain; decides the threshold.
        export: write the classifier that can be shipped, model/.
        report: draw figures/ and write report.html.
    """

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    phases: dict[str, Phase] = field(default_factory=lambda: {"head": Phase(precompute=True)})
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    chunk_steps: int = 100
    feature_batch: int = 32
    cache_dir: str | None = None
    max_error: float = 0.005
    export: bool = True
    report: bool = True


def field_types(cls: type) -> dict[str, Any]:
    """Field name -> type of a dataclass."""
    return typing.get_type_hints(cls)


def known_keys(cls: type = Config, prefix: str = "", phases: Sequence[str] = ()) -> list[str]:
    """Every dotted key of the configuration, sections included; phases under the given names."""
    keys = []
    for name, kind in field_types(cls).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys += known_keys(typing.cast(type, kind), f"{prefix}{name}.")
        elif name == "phases":
            for phase in phases:
                keys += [f"phases.{phase}", *known_keys(Phase, f"phases.{phase}.")]
    return keys


def unknown_key(key: str, where: str, known: Sequence[str]) -> UserError:
    """The error for a key that isn't there: the nearest known one, or all of its section."""
    hint = nearest(key, known)
    section = key.rpartition(".")[0]
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    return UserError(f"{where}: unknown key '{key}'.{hint or ' Known here: ' + ', '.join(siblings) + '.'}")


def _check_tree(tree: Any, cls: type, where: str, prefix: str = "") -> None:
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: '{prefix[:-1] or 'the file'}' must hold 'key: value' lines, not {tree!r}.")
    for key, value in tree.items():
        kind = field_types(cls).get(key)
        if kind is None:
            names = list(value) if key == "phases" and isinstance(value, Mapping) else ["head"]
            raise unknown_key(f"{prefix}{key}", where, [k for k in known_keys(cls, prefix, names) if k])
        if dataclasses.is_dataclass(kind):
            _check_tree({} if value is None else value, typing.cast(type, kind), where, f"{prefix}{key}.")
        elif prefix + key == "phases":
            if not isinstance(value, Mapping) or not value:
                raise UserError(f"{where}: 'phases' must map at least one name to its settings, not {value!r}.")
            for phase, settings in value.items():
                _check_tree({} if settings is None else settings, Phase, where, f"phases.{phase}.")
        elif value is None and type(None) not in typing.get_args(kind):
            raise UserError(f"{where}: '{prefix}{key}' is empty; give it a value or remove the line.")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A configuration file as a tree, with every key checked; UserError when it can't be read or holds unknown keys."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--config {path}: can't be read ({getattr(e, 'strerror', None) or e}).") from None
    except (yaml.YAMLError, ValueError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        reason = getattr(e, "problem", None) or " ".join(str(e).split())
        raise UserError(f"--config {path}: not valid YAML{line} ({reason}).") from None
    _check_tree(tree, Config, str(path))
    return {key: value for key, value in tree.items() if value is not None}


def to_tree(config: Config) -> dict[str, Any]:
    """The Config as plain dicts, lists and scalars, every field written out."""

    def plain(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {k: plain(v) for k, v in x.items()}
        return [plain(v) for v in x] if isinstance(x, (tuple, list)) else x

    return plain(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    """The resolved Config as YAML that `--config` reads back to an equal Config."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value."""

    def walk(tree: Any, prefix: str) -> dict[str, Any]:
        out = {}
        for k, v in tree.items():
            out |= walk(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
        return out

    return walk(to_tree(config), "")


TABLES = (".csv", ".tsv", ".parquet")

WAYS = "folders, parent, a regular expression with (?P<label>...), or a .csv, .tsv or .parquet file"


def label_kind(labels: str) -> str:
    """Which of "folders", "parent", "pattern" and "table" a `labels` means; UserError for none of them."""
    if labels in ("folders", "parent"):
        return labels
    if labels.lower().endswith(TABLES):
        return "table"
    if "(?P<" in labels:
        compiled(labels, "label", "data.labels")
        return "pattern"
    raise UserError(f"data.labels: {labels!r} can't be used; expected {WAYS}.")


def check_labels(labels: str, group: str | None) -> None:
    """UserError for values of data.labels and data.group that no folder can have."""
    kind = label_kind(labels)
    if group is not None and "(?P<" in group:
        compiled(group, "group", "data.group")
    elif group is not None and kind != "table":
        raise UserError(
            f"data.group: {group!r} can't be used; expected a regular expression with (?P<group>...), or a column where "
            f"data.labels is a table."
        )


def compiled(pattern: str, name: str, key: str) -> re.Pattern[str]:
    """The regular expression; UserError when it is none or has no group of that name."""
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression ({error}).") from None
    if name not in found.groupindex:
        raise UserError(f"{key}: {pattern!r} has no group (?P<{name}>...), which says what the {name} is.")
    return found


def validate(config: Config) -> Config:
    """The same Config, or UserError for values that no run can have."""

    def need(ok: bool, key: str, value: Any, expected: str) -> None:
        if not ok:
            raise UserError(f"{key}: {value!r} can't be used; expected {expected}.")

    _check_types(config, "", need)
    d = config.data
    need(
        d.size is None or 32 <= d.size <= 2048,
        "data.size",
        d.size,
        "32 to 2048 pixels (the backbones halve the image five times)",
    )
    need(d.valid_fraction is None or 0 < d.valid_fraction < 1, "data.valid_fraction", d.valid_fraction, "0 < x < 1")
    need(d.test_fraction is None or 0 < d.test_fraction < 1, "data.test_fraction", d.test_fraction, "0 < x < 1")
    need(
        d.test_fraction is None or d.valid_fraction is not None,
        "data.test_fraction",
        d.test_fraction,
        "data.valid_fraction beside it",
    )
    check_labels(d.labels, d.group)
    need(d.workers is None or d.workers >= 1, "data.workers", d.workers, "at least 1")
    need(config.chunk_steps >= 1, "chunk_steps", config.chunk_steps, "at least 1")
    need(config.feature_batch >= 1, "feature_batch", config.feature_batch, "at least 1")
    need(config.checkpoint.every_steps >= 0, "checkpoint.every_steps", config.checkpoint.every_steps, "0 or more")
    need(config.checkpoint.every_epochs >= 1, "checkpoint.every_epochs", config.checkpoint.every_epochs, "at least 1")
    for name, seed in (("seed", config.seed), ("data.split_seed", config.data.split_seed)):
        need(0 <= seed < 2**31, name, seed, "0 to 2147483647")
    need(0 < config.max_error < 1, "max_error", config.max_error, "0 < x < 1")
    for name, p in config.phases.items():
        _validate_phase(p, f"phases.{name}", need)
    return config


KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}


def _check_types(section: Any, prefix: str, need: Callable[[bool, str, Any, str], None]) -> None:
    """Every field of a dataclass and of those in it: the command line checks its words, Python code could pass anything."""
    for name, kind in field_types(type(section)).items():
        value, key = getattr(section, name), prefix + name
        if dataclasses.is_dataclass(value):
            _check_types(value, f"{key}.", need)
        elif isinstance(value, Mapping):
            for each, phase in value.items():
                _check_types(phase, f"{key}.{each}.", need)
        else:
            options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
            options = [o for option in options for o in (typing.get_args(option) if _union(option) else [option])]
            need(any(_is(value, option) for option in options), key, value, " or ".join(map(_words, options)))


def _union(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Union


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and all(_is(x, float) for x in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return ", ".join(typing.get_args(kind))
    return "a list of numbers" if typing.get_origin(kind) is tuple else KINDS[kind]


def _validate_phase(p: Phase, key: str, need: Callable[[bool, str, Any, str], None]) -> None:
    if p.lr != "auto":
        need(len(p.lrs) == GROUPS, f"{key}.lr", p.lr, "one number, or three: early layers, late layers, head; or auto")
        need(all(math.isfinite(x) and x >= 0 for x in p.lrs) and max(p.lrs) > 0, f"{key}.lr", p.lr, "a number above 0")
    several = isinstance(p.momentum, (tuple, list))
    momenta = p.momentum if isinstance(p.momentum, (tuple, list)) else (p.momentum,)
    need(all(0 <= x < 1 for x in momenta), f"{key}.momentum", p.momentum, "0 <= x < 1")
    if several:
        need(len(momenta) == 3, f"{key}.momentum", p.momentum, "one number, or three: start, peak rate, end")
        need(p.schedule == "one_cycle", f"{key}.momentum", p.momentum, "one number, unless schedule is one_cycle")
    need(p.epochs >= 1, f"{key}.epochs", p.epochs, "at least 1")
    need(p.batch_size >= 2, f"{key}.batch_size", p.batch_size, "at least 2 (the head's BatchNorm needs two)")
    need(p.accumulate >= 1, f"{key}.accumulate", p.accumulate, "at least 1")
    parts = f"a divisor of batch_size, {p.batch_size}, that leaves two images in a part"
    need(
        p.batch_size % p.accumulate == 0 and p.batch_size // p.accumulate >= 2,
        f"{key}.accumulate",
        p.accumulate,
        parts,
    )
    for field_name in ("weight_decay", "clip"):
        need(0 <= getattr(p, field_name) < math.inf, f"{key}.{field_name}", getattr(p, field_name), "0 or more")
    need(0 <= p.label_smoothing < 1, f"{key}.label_smoothing", p.label_smoothing, "0 <= x < 1")
    need(p.cycle_len >= 1, f"{key}.cycle_len", p.cycle_len, "at least 1")
    need(p.cycle_mult >= 1, f"{key}.cycle_mult", p.cycle_mult, "at least 1")
    need(p.warmup is None or 0 <= p.warmup <= 1, f"{key}.warmup", p.warmup, "0 <= x <= 1")
    need(1 <= p.div < math.inf, f"{key}.div", p.div, "at least 1")
    if p.precompute:
        need(p.freeze == "backbone", f"{key}.freeze", p.freeze, "backbone with precompute: true")
        need(p.bn == "frozen", f"{key}.bn", p.bn, "frozen with precompute: true")
        why = "none with precompute: true (features are computed once, so augmentation has no effect)"
        need(p.augment == "none", f"{key}.augment", p.augment, why)


def check_tta(n: int, weight: float | None) -> None:
    """UserError for a number of changed versions, or a weight of the plain answer, that can't be."""
    if not isinstance(n, int) or n < 0:
        raise UserError(f"tta: {n!r} can't be used; expected 0 or more changed versions of each image.")
    if weight is not None and not (n and 0 <= weight <= 1):
        raise UserError(
            f"tta_weight: {weight} can't be used; expected 0 to 1, the plain answer's share, and tta above 0."
        )
