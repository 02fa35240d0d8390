"""The two exceptions that every command and notebook shows as one line, and how an error becomes text."""

import difflib
import errno
import os
from collections.abc import Sequence
from typing import Any

MAKE_ROOM = "Free some space and run the same command again (train: with --resume)."


class _OneLineError(Exception):
    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class UserError(_OneLineError):
    """The user's mistake; exit code 2. The message names the thing, its value, what was expected and the way out."""


class RunError(_OneLineError):
    """A failure that is nobody's mistake and ends the run (a loss that is not a number, a full disk); exit code 1."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full; some libraries pass on only the system's text."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def unwritable(place: str, error: OSError) -> Exception:
    """The exception to raise when a file can't be written: RunError for a full disk, UserError otherwise.

    Args:
        place: the sentence up to "can't be written".
        error: what the system raised.
    """
    if is_full(error):
        return RunError(f"{place} can't be written ({error.strerror}). {MAKE_ROOM}")
    return UserError(f"{place} can't be written ({error.strerror}).")


def nearest(name: str, choices: Sequence[str]) -> str:
    """The hint " Did you mean 'X'?" with the choice most like `name`; an empty string when no choice is similar."""
    matches = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def one_line(message: Any) -> str:
    """A message or file name as printable text, so that it can't break its line, fail to encode or control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(message))


def first_line(error: BaseException) -> str:
    """The first line of another library's error, at most 200 characters; the error's type when it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()[:200]
