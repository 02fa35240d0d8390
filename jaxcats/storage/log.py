"""What a run writes while it goes: metrics.jsonl, TensorBoard events, and progress on the screen."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from jaxcats.storage.atomic import write_text


class RunLog:
    """Rows of metrics, one JSON object a line, mirrored to TensorBoard; each row has "step".

    Args:
        folder: the run folder.
        resume_step: rows of later steps are dropped (they will be written again), or None for a new log.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None):
        path = folder / "metrics.jsonl"
        kept = self.rows(path, resume_step) if resume_step is not None else []
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = path.open("a", encoding="utf-8")
        purge = 0 if resume_step is None else resume_step + 1
        self._board = _summary_writer()(str(folder / "tensorboard"), purge_step=purge)

    @staticmethod
    def rows(path: Path, last_step: int) -> list[dict[str, Any]]:
        """The rows up to a step; a last line cut short by a killed process is passed over."""
        found = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                step = row.get("step") if isinstance(row, dict) else None
                if isinstance(step, int) and step <= last_step:
                    found.append(row)
        return found

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows, flushed."""
        self._file.write("".join(json.dumps(r) + "\n" for r in rows))
        self._file.flush()
        for row in rows:
            own = {f"metrics/{name}": value for name, value in row.get("metrics", {}).items()}
            for name, value in (row | own).items():
                several = isinstance(value, list)
                for i, number in enumerate(value if several else [value]):
                    if name != "step" and isinstance(number, (int, float)):
                        self._board.add_scalar(f"{name}/{i}" if several else name, number, row["step"])

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._board.close()


class NoLog:
    """What a process writes that is not the first of several: nothing."""

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _summary_writer() -> Any:
    """tensorboardX's SummaryWriter, without the second and more that it spends on PyTorch wherever that is installed."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # its import fails; tensorboardX does without
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


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
