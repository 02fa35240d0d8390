"""What every command shares: its own flags, errors as one line, exit codes, `jaxcats NAME ...`; nothing but the standard library."""

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
from typing import Any, Literal, NoReturn

from jaxcats.common.config import Config, Phase, field_types, known_keys, read_yaml, unknown_key, validate
from jaxcats.common.errors import MAKE_ROOM, RunError, UserError, is_full, nearest
from jaxcats.common.signals import safe_keyboard_interrupt

COMMANDS = {
    "train": "train a classifier on a folder of images, and judge it",
    "lr_find": "find a learning rate by a range test",
    "evaluate": "judge a trained run on its validation images or on another folder",
    "compare": "compare two runs on the same images",
    "export": "write a run's classifier as a folder that can be shipped",
    "predict": "judge images with an exported classifier",
    "doctor": "examine a folder of images: bad files, duplicates, leaks",
    "weights": "list, fetch, check and convert pretrained weights",
}
KINDS = {int: "a whole number", float: "a number"}


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command; a user's mistake is one line on stderr and exit code 2, a failed run 1, Ctrl-C 130, SIGTERM 143."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal has no letters for is no reason to stop
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
    except OSError as e:  # a folder that may not be read, a full disk: the system's own words
        place = f"{one_line(e.filename)}: " if e.filename else ""
        full = is_full(e)
        more = f". {MAKE_ROOM}" if full else ""
        print(f"{'stopped' if full else 'error'}: {place}{e.strerror or one_line(e)}{more}", file=sys.stderr)
        return 1 if full else 2
    except KeyboardInterrupt as e:
        print(str(e) or "stopped by the keyboard.", file=sys.stderr)
        return getattr(e, "code", 130)


def one_line(message: Any) -> str:
    """A message, or a file's name, that can't break the line it stands in, nor the terminal's encoding, nor steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(message))


def silence_tensorflow() -> None:
    """Before TensorFlow is imported: its warnings and tracebacks in C++ stay away, unless the user has asked for a level.

    JAX's own import sets the level 1, which can't be told from a user's.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


_started_by = ""


def command_line(name: str) -> str:
    """How the command `name` is given by the user of this process: as a module, or by what called `main`."""
    return f"{_started_by} {name}" if _started_by else f"python -m jaxcats.{name}"


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: `jaxcats NAME ...` does what `python -m jaxcats.NAME ...` does.

    A script of your own that registers a network and calls this has every command for it: `python mine.py NAME ...`.
    """
    global _started_by
    if argv is not None:
        return _dispatch(list(argv))
    script = sys.argv[0]
    _started_by = "jaxcats" if Path(script).stem == "jaxcats" else f"python {shlex.quote(script)}"
    try:
        return _dispatch(sys.argv[1:])
    finally:
        _started_by = ""


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: jaxcats COMMAND ...\n")
        print("\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items()))
        print("\n`jaxcats COMMAND --help` says more.")
        return 0
    if argv[0] not in COMMANDS:
        print(
            f"error: there is no command '{argv[0]}'.{nearest(argv[0], list(COMMANDS))} "
            f"Commands: {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2
    return run_command(command_module(argv[0]).main, argv[1:])


def command_module(name: str) -> ModuleType:
    """The module that holds the `main` of a command: a folder's `__main__`, or a file."""
    module = importlib.import_module(f"jaxcats.{name}")
    return importlib.import_module(f"jaxcats.{name}.__main__") if hasattr(module, "__path__") else module


class Parser(argparse.ArgumentParser):
    """argparse for a command's own flags; a mistake is a UserError of one line."""

    def __init__(self, *, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but a flag that isn't there is said before one that is missing."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in args or []:
            name = word.split("=", 1)[0]
            if name == "--":
                break
            if name.startswith("--") and name not in known:
                raise UserError(f"{name}: there is no such option.{nearest(name, known)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """argparse calls this with words of its own."""
        raise UserError(self._readable(message))

    def _readable(self, message: str) -> str:
        required = re.match(r"the following arguments are required: (.+)", message)
        if required:
            return f"{required[1]}: is required."
        unknown = re.match(r"unrecognized arguments: (.*)", message)
        if unknown:
            return f"{unknown[1]}: not expected here; --help says what is."
        about = re.match(r"argument ([^:]+): (.+)", message, re.DOTALL)
        action = about and next((a for a in self._actions if "/".join(a.option_strings) == about[1]), None)
        if not about or not action:
            return message
        given = re.search(r"invalid (?:\w+ value|choice): '?(.*?)'?(?: \(choose from .*)?$", about[2], re.DOTALL)
        if not given:
            return f"{about[1]}: {about[2]}."
        if action.choices:
            choices = [str(c) for c in action.choices]
            return f"{about[1]}: '{given[1]}' is not one of {', '.join(choices)}.{nearest(given[1], choices)}"
        return f"{about[1]}: expected {KINDS.get(action.type, 'another value')}, got '{given[1]}'."  # type: ignore[arg-type]


def _phase_help() -> str:
    doc = re.split(r"\n\s*Args:\n", Phase.__doc__ or "")[1]
    lines = ["Phase, as --phases.NAME.FIELD VALUE:"]
    for name, text in re.findall(r"(\w+): (.+)", doc):
        kind = field_types(Phase)[name]
        choices = " | ".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else ""
        default = next(f.default for f in dataclasses.fields(Phase) if f.name == name)
        lines.append(f"  {name:15} {text}{' [' + choices + ']' if choices else ''} (default: {default})")
    return "\n".join(lines)


def make_parser(prog: str, description: str):
    """A jsonargparse parser that raises UserError instead of exiting."""

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return ArgumentParser(
        prog=prog, description=description, exit_on_error=False, print_config=None, formatter_class=Formatter
    )


KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}


def readable_error(message: str) -> str:
    """A jsonargparse message as one line without Python's names in it."""
    text = " ".join(message.split())
    required = re.search(r"arguments are required: (.+)", text)
    if required:
        return f"--{required.group(1)}: is required."
    keys = re.findall(r'Parser key "([^"]+)"', text)
    union = re.search(r"Subtypes: \[(.+)\] Errors.* Given value: (.*)$", text)
    single = re.search(r"[Ee]xpected (?:a |an |one of )?(.+?)\.? Got value: (.*)$", text)
    found = union or single
    if not keys or not found:
        return text
    kind, value = found.groups()
    value = "null" if value == "None" else f"'{value}'"
    choices = [word for words in re.findall(r"Literal\[([^\]]*)\]", kind) for word in re.findall(r"'(\w+)'", words)]
    several = ["a list of numbers"] if "tuple[" in kind else []
    plain = re.findall(r"\b(?:int|float|bool|str|NoneType)\b", re.sub(r"tuple\[[^\]]*\]|Literal\[[^\]]*\]", "", kind))
    one_of = [f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]] if choices else []
    wanted = " or ".join([*(KINDS[k] for k in plain), *several, *one_of])
    return f"{'.'.join(dict.fromkeys(keys))}: expected {wanted or kind}, got {value}.{nearest(value.strip(chr(39)), choices)}"


def _check_flags(argv: Sequence[str], phases: Sequence[str], own: Sequence[str]) -> None:
    known = known_keys(phases=phases)
    for token in argv:
        key = token[2:].split("=", 1)[0]
        if not token.startswith("--") or not key or key in own or key in known:
            continue
        parts = key.split(".")
        if parts[0] == "phases" and len(parts) > 1 and parts[1] not in phases:
            raise UserError(f"--{key}: there is no phase '{parts[1]}'; the configuration has {', '.join(phases)}.")
        raise unknown_key(key, f"--{key}", [*known, *own])


def flag_value(argv: Sequence[str], name: str) -> str | None:
    """The value of --NAME VALUE or --NAME=VALUE, before anything is parsed; the last of several; None when it isn't there."""
    value = None
    for i, word in enumerate(argv):
        if word == f"--{name}" and i + 1 < len(argv):
            value = argv[i + 1]
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


def parse(argv: Sequence[str], *, prog: str, description: str, options: Mapping[str, Any] | None = None):
    """A Config from `--config FILE` and flags, and the command's own options.

    Args:
        argv: command-line words.
        prog: name shown in the help.
        description: shown in the help.
        options: name -> keyword arguments of `add_argument` for the command's own flags.

    Returns:
        (Config, namespace of the own options; it has `config`, the file's path or None).

    Raises:
        UserError: unknown key, wrong type, bad choice, unreadable file.
    """
    from jsonargparse import ArgumentError, Namespace

    parser = make_parser(prog, description + "\n\n" + _phase_help())
    parser.add_argument("--config", type=str, help="YAML file; only what differs from the defaults")
    for name, kwargs in (options or {}).items():
        parser.add_argument(f"--{name}", **kwargs)
    if any(a in ("-h", "--help") for a in argv):
        parser.usage = f"{prog} --config FILE [--KEY VALUE ...]"
        parser.add_class_arguments(Config, skip={"phases"})
        # The choices stand in braces before it already.
        print(re.sub(r"type:\s+Literal\[[^\]]*\],\s+", "", parser.format_help()))
        sys.exit(0)
    words = list(argv)
    path = flag_value(words, "config")
    tree = read_yaml(path) if path is not None else {}
    tree.setdefault("phases", {"head": {"precompute": True}})
    tree["phases"] = {str(k): v or {} for k, v in tree["phases"].items()}
    _check_flags(words, list(tree["phases"]), ["config", "help", *(options or {})])
    parser.add_class_arguments(Config, skip={"phases"})
    for name in tree["phases"]:
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or hasattr(Namespace, name):
            raise UserError(
                f"phases: '{name}' can't be a name; expected letters, digits and _, and not a word like 'items'."
            )
        parser.add_class_arguments(Phase, f"phases.{name}")
    try:
        space = parser.parse_object(tree, defaults=True)
        space = parser.parse_args(words, namespace=space, defaults=False)
        made = parser.instantiate(space)
    except (ArgumentError, TypeError, ValueError) as e:
        raise UserError(readable_error(str(e))) from None
    own = {name: getattr(made, name) for name in ["config", *(options or {})]}
    phases = {name: getattr(made.phases, name) for name in tree["phases"]}
    values = {f.name: getattr(made, f.name) for f in dataclasses.fields(Config) if f.name != "phases"}
    return validate(Config(phases=phases, **values)), own


def from_file(path: str | Path) -> Config:
    """The Config in a YAML file, defaults filled in."""
    return parse(["--config", str(path)], prog="jaxcats", description="")[0]
