"""The two exceptions that commands print as one line instead of a traceback."""


class UserError(Exception):
    """A mistake in what the user gave; exit code 2. The message names the thing, its value, what was expected and the way out."""


class RunError(Exception):
    """A run that can't go on through nobody's mistake (a loss that is not a number, a full disk); exit code 1."""
