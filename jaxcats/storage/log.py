"""What a run writes while it goes: metrics.jsonl, TensorBoard events, and progress on the screen."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from jaxcats.errors import unwritable
from jaxcats.storage.atomic import write_text


class RunLog:
    """Rows of metrics, one JSON object a line, mirrored to TensorBoard; each row has "step".

    Args:
        folder: the run folder.
        resume_step: rows of later steps are dropped (they will be written again), or None for a new log.
        evaluated: whether the evaluation at that step, if one is due, won't come again.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None, evaluated: bool = True):
        path = folder / "metrics.jsonl"
        kept = self.rows(path, resume_step) if resume_step is not None else []
        kept = [row for row in kept if evaluated or row["step"] < (resume_step or 0) or "valid_loss" not in row]
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = path.open("a", encoding="utf-8")
        purge = 0 if resume_step is None else resume_step + 1
        self._folder, self._board = folder, _Board(folder / "tensorboard", purge_step=purge)

    @staticmethod
    def rows(path: Path, last_step: float = float("inf")) -> list[dict[str, Any]]:
        """The rows up to a step; damaged lines, and a last one cut short by a killed process, are passed over."""
        found = []
        if path.exists():
            for line in path.read_bytes().split(b"\n"):
                try:
                    row = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError):  # no text, no JSON, or a value too large or too deep
                    continue
                step = row.get("step") if isinstance(row, dict) else None
                if isinstance(step, int) and step <= last_step:
                    found.append(row)
        return found

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows, flushed; RunError when the disk is full."""
        try:
            self._file.write("".join(json.dumps(r) + "\n" for r in rows))
            self._file.flush()
            self._mirror(rows)
        except OSError as e:
            raise unwritable(f"{self._folder}: the log", e) from None

    def _mirror(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            own = {f"metrics/{name}": value for name, value in row.get("metrics", {}).items()}
            for name, value in (row | own).items():
                several = isinstance(value, list)
                for i, number in enumerate(value if several else [value]):
                    if name != "step" and isinstance(number, (int, float)):
                        self._board.add_scalar(f"{name}/{i}" if several else name, number, row["step"])

    def close(self) -> None:
        """Flushes and closes both."""
        try:
            with self._file, self._board:
                pass
        except OSError as e:
            raise unwritable(f"{self._folder}: the log", e) from None


class NoLog:
    """What a process writes that is not the first of several: nothing."""

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class _Board:
    """TensorBoard's event file. Not tensorboardX's SummaryWriter: that one writes in a thread, whose failures can't be caught.

    Args:
        folder: made where missing.
        purge_step: rows of an earlier file from this step on are to be forgotten.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        self._files, self._events, self._summary = _tensorboard()
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = self._files.EventsWriter(str(folder / "events"))
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._writer.write_event(self._events.Event(step=purge_step, session_log=start))
        self._flushed = time.monotonic()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """One number; on disk ten seconds later at most."""
        summary = self._summary.scalar(name, value)
        self._writer.write_event(self._events.Event(step=step, wall_time=time.time(), summary=summary))
        if time.monotonic() - self._flushed > 10:
            self._writer.flush()
            self._flushed = time.monotonic()

    def __enter__(self) -> "_Board":
        return self

    def __exit__(self, *exc: Any) -> None:
        self._writer.close()


def _tensorboard() -> tuple[Any, Any, Any]:
    """tensorboardX's modules for files, events and summaries, without the second and more that it spends on PyTorch wherever that is installed."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # its import fails; tensorboardX does without
    try:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2
    finally:
        if hidden:
            del sys.modules["torch"]
    return event_file_writer, event_pb2, summary


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def progress_bar(**options: Any) -> Any:
    """A bar that counts pictures: on a terminal and in Jupyter, silent elsewhere; arguments are tqdm's."""
    if in_notebook():
        if importlib.util.find_spec("ipywidgets"):
            from tqdm.notebook import tqdm
        else:
            from tqdm import tqdm
        return tqdm(unit="img", leave=False, **options)
    from tqdm import tqdm

    return tqdm(unit="img", disable=None, leave=False, **options)
