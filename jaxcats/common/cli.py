"""What all commands share: `jaxcats NAME ...`, flags, errors as one line, and exit codes."""

import argparse
import dataclasses
import importlib
import io
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from jaxcats.common.config import Config, Phase, choices, describe_type, key_types, read_yaml, validate
from jaxcats.common.errors import MAKE_ROOM, RunError, UserError, is_full, nearest, one_line
from jaxcats.common.signals import safe_keyboard_interrupt

COMMANDS = {
    "train": "train a classifier on a folder of images and evaluate it",
    "lr_find": "find a learning rate by a range test",
    "evaluate": "evaluate a trained run on its validation images or on another folder",
    "compare": "compare two runs on the same images",
    "export": "write a run's classifier as a folder that can be shipped",
    "predict": "classify images with an exported classifier",
    "doctor": "examine a folder of images: bad files, duplicates, leaks",
    "weights": "list, fetch, check and convert pretrained weights",
}
_started_by = ""  # what the user typed before the command's name, where `main` runs as the console script


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jaxcats NAME ...`, which does the same as `python -m jaxcats.NAME ...`.

    A script that registers a backbone can call this; `python my_script.py NAME ...` then runs any command with it.

    Args:
        argv: the command's name and its flags; None: those of this process.

    Returns:
        The exit code.
    """
    global _started_by
    if argv is None:
        argv, script = sys.argv[1:], sys.argv[0]
        _started_by = "jaxcats" if Path(script).stem == "jaxcats" else f"python {shlex.quote(script)}"
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:10} {summary}" for name, summary in COMMANDS.items()]
        print("\n".join(["usage: jaxcats COMMAND ...", "", *lines, "", "`jaxcats COMMAND --help` says more."]))
        return 0
    return run_command(lambda words: command_module(words[0]).main(words[1:]), argv)


def command_line(name: str) -> str:
    """How the user of this process starts the command `name`, to be shown in messages."""
    return f"{_started_by} {name}" if _started_by else f"python -m jaxcats.{name}"


def command_module(name: str) -> ModuleType:
    """The module with the `main` of a command: the `__main__` of a folder, or a file."""
    if name not in COMMANDS:
        hint = nearest(name, list(COMMANDS))
        raise UserError(f"there is no command '{name}'.{hint} Commands: {', '.join(COMMANDS)}.")
    module = importlib.import_module(f"jaxcats.{name}")
    return importlib.import_module(f"jaxcats.{name}.__main__") if hasattr(module, "__path__") else module


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs the `main` of a command and prints its errors as one line on stderr.

    Returns:
        The exit code: 2 for a user's mistake, 1 for a run that failed, 130 after Ctrl-C, 143 after SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # print what the terminal's encoding lacks as an escape
            stream.reconfigure(errors="backslashreplace")
    try:
        with safe_keyboard_interrupt():
            return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as e:
        print(f"error: {one_line(e)}", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"stopped: {one_line(e)}", file=sys.stderr)
        return 1
    except OSError as e:  # a folder that may not be read, a full disk
        message = (f"{one_line(e.filename)}: " if e.filename else "") + (e.strerror or one_line(e))
        print(f"stopped: {message}. {MAKE_ROOM}" if is_full(e) else f"error: {message}", file=sys.stderr)
        return 1 if is_full(e) else 2
    except KeyboardInterrupt as e:
        print(str(e) or "stopped by the keyboard.", file=sys.stderr)
        return getattr(e, "code", 130)


def silence_tensorflow() -> None:
    """Turns off TensorFlow's C++ warnings, unless the user has asked for a level; call it before TensorFlow is imported.

    JAX's own import sets the level 1, which can't be told from a user's.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


class Parser(argparse.ArgumentParser):
    """argparse for the flags of a command without a Config; it raises a UserError of one line for a mistake."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses the flags; an unknown or abbreviated one is reported before one that is missing."""
        check_flags(args or [], [option for action in self._actions for option in action.option_strings])
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UserError(readable_error(message, {a.dest: _flag_type(a.type, a.choices) for a in self._actions}))


def _flag_type(kind: Any, allowed: Any) -> Any:
    """The type of a flag, from the `type` and `choices` of `add_argument`, as `describe_type` takes it."""
    return typing.Literal[tuple(allowed)] if allowed else kind or str


def check_flags(words: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError for the first unknown flag among the words."""
    for word in words:
        name = word.partition("=")[0]
        if name == "--":
            return
        if name.startswith("--") and name not in known:
            raise UserError(f"{name}: there is no such option.{nearest(name, known)}")


def readable_error(message: str, types: Mapping[str, Any]) -> str:
    """An error of argparse or jsonargparse as one plain line.

    Args:
        message: the library's text.
        types: flag (without its dashes) or key -> its type.
    """
    text = " ".join(message.split())
    if match := re.search(r"arguments are required: (.+)", text):
        return f"{match[1]}: is required."
    keys = re.findall(r'Parser key "([^"]+)"', text) or re.findall(r"argument (?:--)?([^:]+): ", text)
    value = re.search(r".*(?:Got|Given) value: (.*)$", text) or re.search(r"invalid [^:]+: '(.*?)'(?: \(|$)", text)
    key = next((key for key in reversed(keys) if types.get(key)), None)
    if key is None or value is None:
        return re.sub(r"^argument ([^:]+): (.+)", r"\1: \2.", text)
    flag = re.match(r"argument ([^:]+): invalid", text)
    hint = nearest(value[1], choices(types[key]))
    return f"{flag[1] if flag else key}: expected {describe_type(types[key])}, got '{value[1]}'.{hint}"


def flag_value(argv: Sequence[str], name: str) -> str | None:
    """The value of --NAME VALUE or --NAME=VALUE, the last one if repeated; None without it. It ignores other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", nargs="?")
    return getattr(parser.parse_known_args(argv)[0], name)


def parse(
    argv: Sequence[str], *, prog: str, description: str, options: Mapping[str, Any] | None = None
) -> tuple[Config, dict[str, Any]]:
    """Reads a Config from `--config FILE` and flags, and the command's own options.

    Args:
        argv: flags.
        prog: name shown in the help.
        description: shown in the help.
        options: name -> keyword arguments of `add_argument` for the command's own flags.

    Returns:
        The Config, and the options by name; "config" is the file's path or None.

    Raises:
        UserError: unknown key, wrong type, bad choice, unreadable file.
    """
    from jsonargparse import ArgumentError, ArgumentParser, Namespace

    options = {"config": {"type": str, "help": "YAML file; only what differs from the defaults"}} | dict(options or {})
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, print_config=None)
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    parser.add_class_arguments(Config, skip={"phases"})
    if any(word in ("-h", "--help") for word in argv):
        parser.usage = f"{prog} --config FILE [--KEY VALUE ...]"
        parser.add_class_arguments(Phase, "phases.NAME")
        print(re.sub(r"type:\s+(Literal|Union)\[[^)]*\],\s+", "", parser.format_help()))  # Python's names
        sys.exit(0)
    path = flag_value(argv, "config")
    tree = {"phases": {"head": {"precompute": True}}} | (read_yaml(path) if path is not None else {})
    tree["phases"] = phases = {str(name): settings or {} for name, settings in tree["phases"].items()}
    types = key_types(phases)
    check_flags(argv, ["--help", *(f"--{key}" for key in [*types, *options])])
    for name in phases:
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or hasattr(Namespace, name):
            expected = "letters, digits and _, and not a word like 'items'"
            raise UserError(f"phases: '{name}' can't be the name of a phase; expected {expected}.")
        parser.add_class_arguments(Phase, f"phases.{name}")
    try:
        space = parser.parse_object(tree, defaults=True)
        values = parser.instantiate(parser.parse_args(list(argv), namespace=space, defaults=False))
    except (ArgumentError, TypeError, ValueError) as e:
        own = {name: _flag_type(settings.get("type"), settings.get("choices")) for name, settings in options.items()}
        raise UserError(readable_error(str(e), types | own)) from None
    fields = {f.name: getattr(values, f.name) for f in dataclasses.fields(Config) if f.name != "phases"}
    config = Config(phases={name: getattr(values.phases, name) for name in phases}, **fields)
    return validate(config), {name: getattr(values, name) for name in options}


def from_file(path: str | Path) -> Config:
    """The Config in a YAML file, with the defaults of what it leaves out."""
    return parse(["--config", str(path)], prog="jaxcats", description="")[0]
