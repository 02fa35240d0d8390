"""The configuration: frozen dataclasses, YAML files with every key checked, saving. Values: validation.py; flags: cli.py."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxcats.errors import UserError, nearest

GROUPS = 3  # every backbone has three layer groups: early, late, head


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table of labels.

    Args:
        path: pictures, relative to data.root.
        label: their classes.
        split: train, valid or test; such a column may be missing.
    """

    path: str = "path"
    label: str = "label"
    split: str = "split"


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and how they become arrays.

    Args:
        root: folder that holds train/ and valid/ (or val/, validation/) with a folder per class; or a folder of class folders, with valid_fraction.
        size: side of the square input in pixels; empty: the size the weights were trained with.
        policy: lesson: shorter side to size, centre crop; weights: shorter side to size / crop fraction, centre crop.
        labels: folders: a folder per class; parent: the folder that a picture lies in, at any depth; a regular expression with (?P<label>...) on the path; or a .csv, .tsv or .parquet file.
        columns: of that file.
        valid_fraction: share of each class set aside for validation when neither a valid/ folder nor the table says it.
        test_fraction: share set aside likewise for a test split, which only evaluate --split test looks at.
        group: pictures that stay together when they are set aside: a regular expression with (?P<group>...) on the path, or a column of the table.
        split_seed: of what is set aside: the same for every seed of the training, so that runs can be compared.
        manifest: file that records the split made by valid_fraction; empty: in the cache folder.
        on_bad_file: what to do with a picture that can't be decoded.
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
        epochs: passes over the training pictures.
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
        batch_size: pictures per step.
        accumulate: parts that a batch goes through the network in, one after the other, to save memory.
        bn: frozen: the backbone's BatchNorms run on their stored averages; train: all of them, those of frozen layers too, run on the batch's statistics and update the averages.
        augment: none; flip (left-right); crop (a window of a larger picture); side_on (crop, flip, rotation, lighting); top_down (the same with all eight symmetries). Not with precompute.
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
        data: The pictures
        model: The network
        phases: name -> Phase, run in order; --phases.NAME.FIELD VALUE changes one of the file's.
        checkpoint: Checkpoints
        distributed: Several processes
        precision: of the arithmetic; auto: float32 on CPU, bfloat16 elsewhere. Parameters are float32 always.
        chunk_steps: steps per compiled scan; checkpoints fall on its boundaries.
        feature_batch: pictures per call of the frozen backbone, and in evaluation.
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
