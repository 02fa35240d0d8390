"""Flags and YAML read by jsonargparse into a Config, its mistakes as one line."""

import argparse
import dataclasses
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxcats.config import Config, Phase, field_types, known_keys, read_yaml, unknown_key
from jaxcats.errors import UserError, nearest
from jaxcats.validation import validate


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
