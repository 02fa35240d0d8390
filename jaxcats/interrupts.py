"""Raising where a signal struck, but not inside an import or a callback, where an exception is lost or becomes another."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_AGAIN = 0.05  # seconds
# Python drops what is raised in them; in an import it may come out as an ImportError.
_DEAF = ("__del__", "_xla_gc_callback")


def raise_when_safe(error: BaseException, frame: Any) -> None:
    """Of a signal handler: raises `error` where the program stands (`frame`), or as soon as it has left such a place."""
    at = frame
    while at is not None:
        if at.f_code.co_name in _DEAF or at.f_code.co_filename == "<frozen importlib._bootstrap>":
            break
        at = at.f_back
    else:
        raise error
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda _, later: raise_when_safe(error, later))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)


@contextlib.contextmanager
def keyboard() -> Iterator[None]:
    """Within it Ctrl-C is a KeyboardInterrupt at a safe place; nothing where another handler or thread is at work."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, lambda _, frame: raise_when_safe(KeyboardInterrupt(), frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
