"""What every command shares: its own flags, errors as one line, exit codes, `jaxcats NAME ...`; nothing but the standard library."""

import argparse
import importlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxcats.errors import MAKE_ROOM, RunError, UserError, is_full, nearest
from jaxcats.interrupts import keyboard

COMMANDS = {
    "train": "train a classifier on a folder of pictures, and judge it",
    "lr_find": "find a learning rate by a range test",
    "evaluate": "judge a trained run on its validation pictures or on another folder",
    "compare": "compare two runs on the same pictures",
    "export": "write a run's classifier as a folder that can be shipped",
    "predict": "judge pictures with an exported classifier",
    "doctor": "examine a folder of pictures: bad files, duplicates, leaks",
    "weights": "list, fetch, check and convert pretrained weights",
}
KINDS = {int: "a whole number", float: "a number"}


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command; a user's mistake is one line on stderr and exit code 2, a failed run 1, Ctrl-C 130, SIGTERM 143."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal has no letters for is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        with keyboard():
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


def quiet_tensorflow() -> None:
    """Before TensorFlow is imported: its warnings and tracebacks in C++ stay away, unless the user has asked for a level.

    JAX's own import sets the level 1, which can't be told from a user's.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


_started_by = ""


def as_typed(name: str) -> str:
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
    return run_command(importlib.import_module(f"jaxcats.{argv[0]}").main, argv[1:])


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
