"""The configuration of a run: dataclasses, YAML files, and which values are allowed. cli.py reads the command line."""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxcats.common.errors import UserError, nearest

GROUPS = 3  # every backbone has three layer groups: early, late, head


@dataclass(frozen=True)
class Limit:
    """The values that a field allows beyond its type; None is always allowed where the type allows it."""

    allows: Callable[[Any], bool]
    expected: str


def _at_least(low: int) -> Limit:
    return Limit(lambda x: low <= x < math.inf, f"at least {low}")


SEED = Limit(lambda x: 0 <= x < 2**31, "0 to 2147483647")
FRACTION = Limit(lambda x: 0 < x < 1, "0 < x < 1")
BELOW_ONE = Limit(lambda x: 0 <= x < 1, "0 <= x < 1")
UNIT = Limit(lambda x: 0 <= x <= 1, "0 <= x <= 1")
SIZE = Limit(lambda x: 32 <= x <= 2048, "32 to 2048 pixels (the backbones halve the image five times)")
ADDRESS = Limit(lambda x: (m := re.fullmatch(r".+:([0-9]+)", x)) is not None and 0 < int(m[1]) < 2**16, "HOST:PORT")


def limited(default: Any, limit: Limit) -> Any:
    """A dataclass field whose values `validate` checks."""
    return field(default=default, metadata={"limit": limit})


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table of labels.

    Args:
        path: column of the images' paths, relative to data.root.
        label: column of their classes.
        split: column with train, valid or test; the table may lack it.
    """

    path: str = "path"
    label: str = "label"
    split: str = "split"


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they become arrays.

    Args:
        root: folder with train/ and valid/ (or val/, validation/), each with a folder per class; or a folder of class folders, with valid_fraction.
        size: side of the square input in pixels; empty: the size that the weights were trained with.
        policy: lesson: shorter side to size, centre crop; weights: shorter side to size / crop fraction, centre crop.
        labels: where labels come from. folders: a folder per class; parent: the folder that an image lies in, at any depth; a regular expression with (?P<label>...) on the path; or a .csv, .tsv or .parquet file.
        columns: names of the columns of the table of labels.
        valid_fraction: share of each class to set aside for validation when neither a valid/ folder nor the table gives it.
        test_fraction: share of each class to set aside for a test split, which only evaluate --split test uses.
        group: which images stay in the same split: a regular expression with (?P<group>...) on the path, or a column of the table.
        split_seed: seed of the split; it does not depend on the training's seed, so that runs can be compared.
        manifest: file that records the split made by valid_fraction; empty: a file in the cache folder.
        on_bad_file: what to do with an image that can't be decoded.
        workers: number of threads that decode images; empty: one per processor.
        rehash: read every file again instead of trusting size and modification time.
    """

    root: str = "data/dogscats"
    size: int | None = limited(None, SIZE)
    policy: Literal["lesson", "weights"] = "lesson"
    labels: str = "folders"
    columns: Columns = field(default_factory=Columns)
    valid_fraction: float | None = limited(None, FRACTION)
    test_fraction: float | None = limited(None, FRACTION)
    group: str | None = None
    split_seed: int = limited(0, SEED)
    manifest: str | None = None
    on_bad_file: Literal["skip", "fail"] = "skip"
    workers: int | None = limited(None, _at_least(1))
    rehash: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101, resnet152 or efficientnet_lite0, or a name that your own code registers.
        head: lesson: concat pool, BN, dropout, 512, BN, dropout, classes; linear: average pool and one dense layer.
        pretrained: start from published weights; false: from random ones.
        weights: a name that `jaxcats weights list` gives, a .safetensors, .pth or .npz file, hf:OWNER/REPO/FILE or package:MODULE/FILE; empty: the backbone's own.
    """

    backbone: str = "resnet34"
    head: Literal["lesson", "linear"] = "lesson"
    pretrained: bool = True
    weights: str | None = None


@dataclass(frozen=True)
class Phase:
    """One phase of training; phases run in the order of the file, each with a fresh optimizer.

    Args:
        epochs: number of passes over the training images.
        lr: peak learning rate, or three of them: early layers, late layers, head; auto: lr_find's valley.
        freeze: layers that don't learn. backbone: only the head learns; first: all but the early layers learn; nothing: all layers learn.
        precompute: compute the frozen backbone's features once and train the head on them.
        optimizer: sgd (with momentum), adam or adamw.
        momentum: momentum of sgd, b1 of adam; with one_cycle also three: at the start, at the peak rate, at the end.
        weight_decay: L2 penalty, never on biases and BatchNorm; decoupled for adamw, added to the gradient otherwise.
        clip: greatest norm of the gradient; 0: no limit.
        label_smoothing: share of the target that is spread over all classes.
        schedule: how the learning rate changes over the phase; exponential falls to a hundredth.
        cycle_len: number of epochs in sgdr's first cycle.
        cycle_mult: how many times longer each of sgdr's cycles is than the one before.
        warmup: share of the steps in which the rate rises; empty: 0.25 (one_cycle), 0.1 (warmup_cosine).
        div: one_cycle starts at lr / div.
        batch_size: number of images per step.
        accumulate: number of parts in which a batch goes through the network, to save memory.
        bn: frozen: the backbone's BatchNorms use their stored averages; train: all of them, those of frozen layers too, use the batch's statistics and update the averages.
        augment: random changes of the training images. none; flip (left-right); crop (a window of a larger image); side_on (crop, flip, rotation, lighting); top_down (the same with all eight symmetries). Not with precompute.
        driver: how batches reach the device. stream: decoded on the fly; scan: all kept on the device; auto: scan with precompute, else stream.
    """

    epochs: int = limited(3, _at_least(1))
    lr: float | tuple[float, ...] | Literal["auto"] = 0.01
    freeze: Literal["backbone", "first", "nothing"] = "backbone"
    precompute: bool = False
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float | tuple[float, ...] = 0.9
    weight_decay: float = limited(0.0, _at_least(0))
    clip: float = limited(0.0, _at_least(0))
    label_smoothing: float = limited(0.0, BELOW_ONE)
    schedule: Literal["constant", "cosine", "warmup_cosine", "sgdr", "one_cycle", "exponential"] = "constant"
    cycle_len: int = limited(1, _at_least(1))
    cycle_mult: int = limited(1, _at_least(1))
    warmup: float | None = limited(None, UNIT)
    div: float = limited(25.0, _at_least(1))
    batch_size: int = limited(64, _at_least(2))
    accumulate: int = limited(1, _at_least(1))
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
        """Number of epochs in each cycle of sgdr; the last cycle is shortened to fit `epochs`."""
        lengths, length = [], self.cycle_len
        while sum(lengths) < self.epochs:
            lengths.append(min(length, self.epochs - sum(lengths)))
            length *= self.cycle_mult
        return tuple(lengths)


def sgdr_epochs(n_cycle: int, cycle_len: int, cycle_mult: int) -> int:
    """Epochs of n cycles, each `cycle_mult` times as long as the one before: 1 + 2 + 4 = 7 for (3, 1, 2)."""
    return sum(cycle_len * cycle_mult**i for i in range(n_cycle))


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which one the final evaluation uses.

    Args:
        every_steps: number of steps between checkpoints within an epoch (with scan: at the next chunk boundary); 0: none.
        every_epochs: number of epochs between checkpoints; the last epoch of a phase is always saved.
        use: checkpoint for the final evaluation: the last, or the best (fewest validation errors, then lowest loss).
    """

    every_steps: int = limited(0, _at_least(0))
    every_epochs: int = limited(1, _at_least(1))
    use: Literal["last", "best"] = "last"


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes that train together. If all are empty, SLURM, Open MPI, Kubernetes or a TPU pod may name them.

    Args:
        coordinator: HOST:PORT of the primary process, reachable from all.
        num_processes: number of processes.
        process_id: number of this process, from 0.
    """

    coordinator: str | None = limited(None, ADDRESS)
    num_processes: int | None = limited(None, _at_least(1))
    process_id: int | None = limited(None, _at_least(0))


@dataclass(frozen=True)
class Config:
    """Everything that decides a run.

    Args:
        seed: seed of the initial weights, the order of the images, augmentation and dropout.
        data: The images
        model: The network
        phases: name -> Phase, run in order; --phases.NAME.FIELD VALUE changes one of the file's.
        checkpoint: Checkpoints
        distributed: Several processes
        precision: number format of the arithmetic; auto: float32 on CPU, bfloat16 elsewhere. Parameters are always float32.
        chunk_steps: number of steps per compiled scan; checkpoints fall on its boundaries.
        feature_batch: number of images per call of the frozen backbone, and in evaluation.
        cache_dir: folder for the index, features and compiled programs; empty: JAXCATS_CACHE or the user's cache folder.
        max_error: greatest share of errors among the predictions that are not marked unsure; decides the threshold.
        export: write model/, the classifier that can be shipped.
        report: draw figures/ and write report.html.
    """

    seed: int = limited(0, SEED)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    phases: dict[str, Phase] = field(default_factory=lambda: {"head": Phase(precompute=True)})
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    chunk_steps: int = limited(100, _at_least(1))
    feature_batch: int = limited(32, _at_least(1))
    cache_dir: str | None = None
    max_error: float = limited(0.005, FRACTION)
    export: bool = True
    report: bool = True


def key_types(phases: Iterable[str]) -> dict[str, Any]:
    """Dotted key -> type of everything in a configuration with these phases; sections are keys too."""
    types = _field_types(Config)
    for phase in phases:
        types |= {f"phases.{phase}": Phase, **_field_types(Phase, f"phases.{phase}.")}
    return types


def _field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    types = {}
    for name, kind in typing.get_type_hints(cls).items():
        types[prefix + name] = kind
        if dataclasses.is_dataclass(kind):
            types |= _field_types(typing.cast(type, kind), f"{prefix}{name}.")
    return types


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted key -> value; an empty dict is a value."""
    values = {}
    for name, value in tree.items():
        is_section = isinstance(value, Mapping) and value
        values |= flatten(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return values


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value of a Config; tuples are lists."""
    return flatten(to_tree(config))


def to_tree(config: Config) -> dict[str, Any]:
    """The Config as nested dicts, with every field; tuples are lists, as in YAML and JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Config) -> str:
    """The Config as YAML, with every field; `--config` reads it back to an equal Config."""
    import yaml

    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a configuration file as nested dicts and checks every key.

    Raises:
        UserError: the file can't be read, is not YAML, or has a key that no configuration has.
    """
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as e:
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())
        raise UserError(f"--config {path}: can't be read as YAML ({reason}).") from None
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: the file must hold 'key: value' lines, not {tree!r}.")
    phases = tree.get("phases", {"head": None})
    if not isinstance(phases, Mapping) or not phases:
        raise UserError(f"{path}: 'phases' must map at least one name to its settings, not {phases!r}.")
    known = key_types(map(str, phases))
    for key, value in flatten(tree).items():
        if key not in known:
            hint = nearest(key, list(known)) or " --help lists them all."
            raise UserError(f"{path}: unknown key '{key}'.{hint}")
        if dataclasses.is_dataclass(known[key]) and value not in (None, {}):
            raise UserError(f"{path}: '{key}' must hold 'key: value' lines, not {value!r}.")
    return {key: value for key, value in tree.items() if value is not None or not dataclasses.is_dataclass(known[key])}


TABLES = (".csv", ".tsv", ".parquet")


def label_kind(labels: str) -> str:
    """Which kind of labels a value of data.labels means: "folders", "parent", "pattern" or "table"."""
    if labels in ("folders", "parent"):
        return labels
    if labels.lower().endswith(TABLES):
        return "table"
    if "(?P<" in labels:
        return "pattern"
    expected = f"folders, parent, a regular expression with (?P<label>...), or a file of {', '.join(TABLES)}"
    raise _refusal("data.labels", labels, expected)


def compiled(pattern: str, name: str, key: str) -> re.Pattern[str]:
    """Compiles a regular expression that must have a group called `name`; UserError otherwise."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is not a regular expression ({error}).") from None
    if name not in expression.groupindex:
        raise UserError(f"{key}: {pattern!r} has no group (?P<{name}>...), which must match the {name}.")
    return expression


def _refusal(key: str, value: Any, expected: str) -> UserError:
    return UserError(f"{key}: {value!r} can't be used; expected {expected}.")


def type_members(kind: Any) -> tuple[Any, ...]:
    """The types of a union; of any other type, only the type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def choices(kind: Any) -> list[str]:
    """The words that a type allows."""
    return [word for k in type_members(kind) if typing.get_origin(k) is Literal for word in typing.get_args(k)]


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def describe_type(kind: Any) -> str:
    """A type in words, for a message that says what was expected."""
    members, words = type_members(kind), choices(kind)
    expected = [KINDS[member] for member in members if member in KINDS]
    if any(typing.get_origin(member) is tuple for member in members):
        expected.append("a list of numbers")
    if words:
        expected.append(f"one of {', '.join(words)}" if len(words) > 1 else words[0])
    return " or ".join(expected)


def _has_type(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and all(_has_type(x, float) for x in value)
    if isinstance(value, bool):  # which Python counts as an int
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def validate(config: Config) -> Config:
    """Returns the same Config, or raises UserError for a value that no run can have."""
    _check_fields(config, "")
    for name, phase in config.phases.items():
        _check_phase(phase, f"phases.{name}")
    return config


def _check_fields(section: Any, prefix: str) -> None:
    """Checks each field alone: its type, which Python code can get wrong where flags and files can't, and its limit."""
    kinds = typing.get_type_hints(type(section))
    for f in dataclasses.fields(section):
        value, key, limit = getattr(section, f.name), prefix + f.name, f.metadata.get("limit")
        if dataclasses.is_dataclass(value):
            _check_fields(value, f"{key}.")
        elif isinstance(value, Mapping):
            for name, phase in value.items():
                _check_fields(phase, f"{key}.{name}.")
        elif not any(_has_type(value, kind) for kind in type_members(kinds[f.name])):
            raise _refusal(key, value, describe_type(kinds[f.name]))
        elif limit and value is not None and not limit.allows(value):
            raise _refusal(key, value, limit.expected)


def _check_phase(p: Phase, key: str) -> None:
    """Checks the fields that hold one number or three, and those that depend on each other."""

    def need(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise _refusal(f"{key}.{name}", getattr(p, name), expected)

    if p.lr != "auto":
        is_valid = len(p.lrs) == GROUPS and all(0 <= x < math.inf for x in p.lrs) and max(p.lrs) > 0
        need(is_valid, "lr", "a number above 0, or three: early layers, late layers, head; or auto")
    momenta = p.momentum if isinstance(p.momentum, (tuple, list)) else (p.momentum,)
    need(all(0 <= x < 1 for x in momenta), "momentum", "0 <= x < 1")
    if momenta is p.momentum:
        is_cycle = len(momenta) == 3 and p.schedule == "one_cycle"
        need(is_cycle, "momentum", "one number, or three with schedule one_cycle: start, peak rate, end")
    fits = p.batch_size % p.accumulate == 0 and p.batch_size // p.accumulate >= 2
    need(fits, "accumulate", f"a divisor of batch_size, {p.batch_size}, that leaves two images in a part")
    if p.precompute:
        for name, value in {"freeze": "backbone", "bn": "frozen", "augment": "none"}.items():
            why = "the features of each image are computed once, before training"
            need(getattr(p, name) == value, name, f"{value} with precompute: true ({why})")


def check_tta(n: int, weight: float | None) -> None:
    """Raises UserError for a number of augmented versions, or a weight of the unchanged image, that can't be used."""
    if not isinstance(n, int) or n < 0:
        raise _refusal("tta", n, "0 or more augmented versions of each image")
    if weight is not None and not (n and 0 <= weight <= 1):
        raise _refusal("tta_weight", weight, "0 to 1, the weight of the unchanged image, and tta above 0")
