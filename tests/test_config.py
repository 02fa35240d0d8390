"""The configuration as a user meets it: files, flags, and what a slip gets."""

import dataclasses
import typing

import pytest

from jaxcats.common.cli import from_file, parse
from jaxcats.common.config import Config, Phase, flat, sgdr_epochs, to_yaml
from jaxcats.common.errors import UserError
from jaxcats.train.run_folder import training_changes

FILE = """
data: {size: 128}
phases:
  head: {epochs: 1, lr: 1e-2, precompute: true}
  all: {lr: [1e-4, 1e-3, 1e-2], freeze: nothing}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(FILE)
    return path


def read(*argv):
    return parse([str(a) for a in argv], prog="x", description="x", options={"workdir": {"type": str}})[0]


def test_flags_win_over_the_file_and_the_file_over_defaults(file):
    config = read("--config", file, "--phases.head.lr", "0.02", "--data.root", "d")
    assert (config.data.size, config.data.root) == (128, "d")
    assert list(config.phases) == ["head", "all"]
    assert config.phases["head"].lr == 0.02
    assert config.phases["all"].lrs == (1e-4, 1e-3, 1e-2)
    assert config.seed == Config().seed


def test_without_a_file_there_is_one_phase():
    assert read("--phases.head.epochs=5").phases["head"].epochs == 5


def test_saved_config_reads_back_equal(file, tmp_path):
    config = read("--config", file, "--seed", "3")
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    assert from_file(saved) == config


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data.sizes", "3"], ["data.sizes", "Did you mean '--data.size'"]),
        (["--phases.head.lrr", "3"], ["Did you mean '--phases.head.lr'"]),
        (["--phases.other.lr", "3"], ["--phases.other.lr", "Did you mean '--phases.head.lr'"]),
        (["--data.size", "big"], ["data.size", "whole number", "big"]),
        (["--phases.head.optimizer", "adm"], ["sgd, adam, adamw", "adm", "Did you mean 'adam'"]),
        (["--data.size", "8"], ["data.size", "8", "32"]),
        (["--phases.head.lr", "[1, 2]"], ["phases.head.lr", "three"]),
        (["--phases.head.lr", "-1"], ["phases.head.lr", "above 0"]),
        (
            ["--phases.head.lr", "auot"],
            ["phases.head.lr", "a number or a list of numbers or auto", "Did you mean 'auto'"],
        ),
        (["--phases.head.momentum", "[0.9, 0.8, 0.9]"], ["phases.head.momentum", "one_cycle"]),
        (["--phases.head.momentum", "[0.9, 0.8]", "--phases.head.schedule", "one_cycle"], ["momentum", "or three"]),
        (["--phases.head.momentum", "1"], ["phases.head.momentum", "x < 1"]),
        (["--phases.head.accumulate", "3"], ["phases.head.accumulate", "divisor of batch_size, 64"]),
        (["--phases.head.accumulate", "64"], ["phases.head.accumulate", "two images"]),
        (["--phases.head.label_smoothing", "1"], ["phases.head.label_smoothing"]),
        (["--phases.head.clip", "-1"], ["phases.head.clip", "at least 0"]),
        (["--phases.head.cycle_len", "0"], ["phases.head.cycle_len"]),
        (["--phases.head.cycle_mult", "0"], ["phases.head.cycle_mult"]),
        (["--phases.head.warmup", "2"], ["phases.head.warmup"]),
        (["--phases.head.div", "0"], ["phases.head.div"]),
        (["--phases.head.schedule", "sgd"], ["phases.head.schedule", "one_cycle", "Did you mean 'sgdr'"]),
        (["--phases.head.epochs", "0"], ["phases.head.epochs", "at least 1"]),
        (["--phases.head.augment", "flip"], ["phases.head.augment", "precompute"]),
        (["--config", "absent.yaml"], ["absent.yaml", "No such file"]),
        (["--workdr", "x"], ["Did you mean '--workdir'"]),
        (["--seed"], ["seed"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_slip_is_one_line_that_names_it(argv, words):
    with pytest.raises(UserError) as e:
        read(*argv)
    message = str(e.value)
    assert "\n" not in message
    assert "class '" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {sizes: 3}", ["data.sizes", "Did you mean 'data.size'"]),
        ("phases: {head: {epoch: 3}}", ["phases.head.epoch", "Did you mean 'phases.head.epochs'"]),
        ("phases: {}", ["phases", "at least one name"]),
        ("data: 3", ["data", "key: value"]),
        ("data: [", ["can't be read as YAML", "line 1"]),
        ("data: {root: !!python/object:os.system {}}", ["can't be read as YAML"]),
        ("[1, 2]", ["the file", "key: value"]),
        ("seed:", ["seed", "whole number"]),
        ("data: {on_bad_file: ignore}", ["data.on_bad_file", "skip, fail", "ignore"]),
    ],
)
def test_a_slip_in_the_file_likewise(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as e:
        read("--config", path)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


def test_changes_that_matter_are_named_and_others_pass(file):
    old = read("--config", file)
    assert training_changes(flat(old), flat(dataclasses.replace(old, cache_dir="elsewhere"))) == []
    assert training_changes(flat(old), flat(read("--config", file, "--phases.all.lr", "0.1"))) == [
        "phases.all.lr: [0.0001, 0.001, 0.01] -> 0.1"
    ]


@pytest.mark.parametrize(
    ("epochs", "cycle_len", "cycle_mult", "cycles"),
    [(7, 1, 2, (1, 2, 4)), (6, 1, 2, (1, 2, 3)), (3, 1, 1, (1, 1, 1)), (4, 2, 1, (2, 2)), (1, 3, 2, (1,))],
)
def test_cycles_of_sgdr(epochs, cycle_len, cycle_mult, cycles):
    assert Phase(epochs=epochs, cycle_len=cycle_len, cycle_mult=cycle_mult).cycles == cycles


def test_three_cycles_of_one_epoch_doubled_are_seven_epochs():
    assert sgdr_epochs(3, 1, 2) == 7
    assert sgdr_epochs(3, 1, 1) == 3


def test_every_preset_of_augmentation_has_a_name_in_the_configuration():
    from jaxcats.data.augment import PRESETS

    assert typing.get_args(typing.get_type_hints(Phase)["augment"]) == tuple(PRESETS)
