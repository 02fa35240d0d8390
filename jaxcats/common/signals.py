"""Ctrl-C and SIGTERM: where an exception is raised for them, and how a training stops at the end of a step.

A command runs within `safe_keyboard_interrupt`. Training replaces that by `Stopping`: while epochs run (`patient`) a
signal only sets a flag, which the loop reads after each step (`asked`); then it saves a checkpoint and raises
`leave(step)`. Everywhere else, and at a second signal, Stopped is raised at once.
"""

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxcats.common import distributed

_RETRY_SECONDS = 0.05
# Python drops an exception that is raised in these functions; in an import it may turn into an ImportError.
_LOSES_EXCEPTIONS = ("__del__", "_xla_gc_callback")


class Stopped(KeyboardInterrupt):
    """Raised in a process that a signal asked to end; `code` is its exit code, 128 + the signal's number."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message or f"stopped by {'the keyboard' if signum == signal.SIGINT else 'SIGTERM'}.")
        self.signum, self.code = signum, 128 + signum


class Stopping:
    """Turns signals into a flag that the training loop checks after each step.

    With several processes each may get a signal, at different steps. JAX's preemption service makes all of them stop at
    the same step; outside the steps every process stops alone.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._patient = False
        self._questions = 0

    def listen(self, *, several: bool = False) -> contextlib.AbstractContextManager[None]:
        """Handles SIGINT and SIGTERM within a `with` block; JAX handles SIGTERM when `several` processes train."""
        return _handling([signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM], self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        is_first = self.signum is None
        self.signum = signum
        # The other processes know nothing of Ctrl-C in this one, so it can't wait for a checkpoint with them.
        if not self._patient or not is_first or (signum == signal.SIGINT and distributed.is_multiprocess()):
            raise_when_safe(Stopped(signum), frame)
        else:
            print("\nStopping after this step; a second signal stops at once.", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def patient(self, patient: bool = True) -> Iterator[None]:
        """Inside the block a signal waits for `asked`; inside `patient(False)` it interrupts long work at once."""
        self.check()
        before, self._patient = self._patient, patient
        try:
            yield
        finally:
            self._patient = before

    def check(self) -> None:
        """Raises Stopped again if other code, such as a callback, has swallowed it."""
        if self.signum is not None:
            raise Stopped(self.signum)

    def asked(self) -> bool:
        """Whether to save and stop after this step; every process must call this the same number of times."""
        if self.signum is None and distributed.is_multiprocess():
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            self._questions += 1
            if reached_preemption_sync_point(self._questions):
                self.signum = signal.SIGTERM
        return self.signum is not None

    def leave(self, step: int) -> Stopped:
        """The exception to raise once the checkpoint of `step` is saved."""
        assert self.signum is not None
        return Stopped(self.signum, f"stopped as asked, at step {step:,}, which is saved.")


def safe_keyboard_interrupt() -> contextlib.AbstractContextManager[None]:
    """Inside the block Ctrl-C raises KeyboardInterrupt at a safe place; only Python's own handler is replaced."""
    signals = [signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else []
    return _handling(signals, lambda _, frame: raise_when_safe(KeyboardInterrupt(), frame))


@contextlib.contextmanager
def _handling(signals: Sequence[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        signals = []
    before = {s: signal.signal(s, handler) for s in signals}
    try:
        yield
    finally:
        for s, former in before.items():
            signal.signal(s, former)


def raise_when_safe(error: BaseException, frame: Any) -> None:
    """Raises `error` from a signal handler, as soon as the interrupted `frame` is not in code that would lose it."""
    codes = [caller.f_code for caller, _ in traceback.walk_stack(frame)]
    if not any(c.co_name in _LOSES_EXCEPTIONS or c.co_filename == "<frozen importlib._bootstrap>" for c in codes):
        raise error
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda _, later: raise_when_safe(error, later))
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
