"""The two exceptions that commands, and notebooks, print as one line instead of a traceback."""

import difflib
import errno
import os
from collections.abc import Sequence

MAKE_ROOM = "Make room and run the same again (train: with --resume)."


class _OneLineError(Exception):
    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class UserError(_OneLineError):
    """A mistake in what the user gave; exit code 2. The message names the thing, its value, what was expected and the way out."""


class RunError(_OneLineError):
    """A run that can't go on through nobody's mistake (a loss that is not a number, a full disk); exit code 1."""


def is_full(error: BaseException) -> bool:
    """Whether an error of the system, or of a library that passes on only its text, says that the disk is full."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def unwritable(place: str, error: OSError) -> Exception:
    """What to raise where something can't be written: a full disk is nobody's mistake, a missing right is the user's.

    Args:
        place: the sentence up to "can't be written".
        error: what the system said.
    """
    if is_full(error):
        return RunError(f"{place} can't be written ({error.strerror}). {MAKE_ROOM}")
    return UserError(f"{place} can't be written ({error.strerror}).")


def nearest(name: str, choices: Sequence[str]) -> str:
    """' Did you mean X?' or an empty string."""
    found = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""
