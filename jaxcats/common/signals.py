"""Raising where a signal struck, but not inside an import or a callback, where an exception is lost or becomes another."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from jaxcats.common import distributed

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
def safe_keyboard_interrupt() -> Iterator[None]:
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


class Stopped(KeyboardInterrupt):
    """Raised where a process that was asked to end leaves; `code` is its exit code, 128 + the signal's number."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(
            message or f"stopped by {'the safe_keyboard_interrupt' if signum == signal.SIGINT else 'SIGTERM'}."
        )
        self.signum, self.code = signum, 128 + signum

    @classmethod
    def saved(cls, signum: int, step: int) -> "Stopped":
        """What to raise once the checkpoint of `step` is saved."""
        return cls(signum, f"stopped as asked, at step {step:,}, which is saved.")


class Stopping:
    """Turns signals into a question that the training loop asks after each step.

    Outside `patient` a signal raises Stopped where the process is. Of several processes each may be asked, at different
    steps; JAX's preemption service makes all of them stop at the same one, and outside the steps none of them.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._patient = False
        self._questions = 0

    @contextlib.contextmanager
    def listen(self, *, several: bool = False) -> Iterator[None]:
        """Handles SIGINT and SIGTERM for the length of a `with` block; of `several` processes JAX has SIGTERM."""
        if threading.current_thread() is not threading.main_thread():  # Python hands signals to the main thread alone
            yield
            return
        signals = [signal.SIGINT, *[signal.SIGTERM] * (not several)]
        before = {s: signal.signal(s, self._asked) for s in signals}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _asked(self, signum: int, frame: Any) -> None:
        wait = self._patient and self.signum is None and not (distributed.is_multiprocess() and signum == signal.SIGINT)
        self.signum = signum
        if not wait:
            raise_when_safe(Stopped(signum), frame)
            return
        print("\nStopping after this step; once more, and it stops at once.", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """While epochs run: a signal waits for `asked`."""
        self.check()
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `patient`: what takes long, and nothing is lost by breaking it off."""
        self.check()
        before, self._patient = self._patient, False
        try:
            yield
        finally:
            self._patient = before

    def check(self) -> None:
        """Raises Stopped where it was raised before and something, a callback say, has swallowed it."""
        if self.signum is not None:
            raise Stopped(self.signum)

    def asked(self) -> bool:
        """Whether to save and leave, after a step; every process must ask equally often."""
        if self.signum is None and distributed.is_multiprocess():
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            self._questions += 1
            if reached_preemption_sync_point(self._questions):
                self.signum = signal.SIGTERM
        return self.signum is not None

    def leave(self, step: int) -> Stopped:
        """What to raise once the checkpoint of `step` is saved."""
        assert self.signum is not None
        return Stopped.saved(self.signum, step)
