"""The two exceptions that commands, and notebooks, print as one line instead of a traceback."""

import difflib
from collections.abc import Sequence


class _OneLineError(Exception):
    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class UserError(_OneLineError):
    """A mistake in what the user gave; exit code 2. The message names the thing, its value, what was expected and the way out."""


class RunError(_OneLineError):
    """A run that can't go on through nobody's mistake (a loss that is not a number, a full disk); exit code 1."""


def nearest(name: str, choices: Sequence[str]) -> str:
    """' Did you mean X?' or an empty string."""
    found = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""
