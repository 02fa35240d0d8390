"""The run folder: opening it, what a resumed run may change, and the log that training writes into it.

config.yaml  versions.json  data.json  metrics.jsonl  tensorboard/  checkpoints/
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcats.common.cli import from_file
from jaxcats.common.config import Config, DistributedConfig, Phase, flat, to_yaml
from jaxcats.common.errors import UserError, unwritable
from jaxcats.common.io import REPLACED_CHECKPOINT, lock_folder, remove_stale_temporaries, write_text

# Settings that only say where things are, so they may differ between processes that train together. The images are compared.
PER_PROCESS = {"data.root", "data.manifest", "data.workers", "data.rehash", "cache_dir"}
# Settings that a resumed run may change as well, because they do not change what is computed.
RESUMABLE = PER_PROCESS | {"data.on_bad_file", "max_error", "export", "report"}
RESUMABLE_SECTIONS = ("checkpoint.", "distributed.")


# --- opening ---


def open_run(config: Config, name: str | None, *, workdir: str | None, resume: bool) -> Path:
    """Creates or resumes a run folder, locks it for this process, and returns it.

    Args:
        config: of the run; written to config.yaml unless the run has a checkpoint.
        name: of the configuration file, after which a new folder in runs/ is called.
        workdir: the folder; None for a new one.
        resume: whether a run that is in it may be continued.

    Raises:
        UserError: the folder holds something else, another run, or a run with other settings.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(workdir) if workdir else Path("runs") / f"{Path(name).stem if name else 'train'}-{stamp}"
    saved = folder / "config.yaml"
    # A process that was killed at its very start may have left hidden files only.
    if folder.is_dir() and not saved.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise UserError(f"--workdir {folder}: not empty, and not a run folder. Name a new folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
    except OSError as e:
        raise unwritable(f"--workdir {folder}:", e) from None
    resumed = has_checkpoint(folder)  # Without a checkpoint nothing is lost by starting over, even with other settings.
    if resumed and not resume:
        raise UserError(
            f"--workdir {folder}: holds a run already. Add --resume to continue it, or name another folder."
        )
    if resumed and (changes := training_changes(flat(from_file(saved)), flat(config))):
        raise UserError(
            f"--resume: {folder} was started with other settings ({'; '.join(changes)}); restore them, or use another --workdir."
        )
    for place in (folder, folder / "figures"):
        remove_stale_temporaries(place, older=-math.inf)
    if not resumed:
        write_config(folder, config)
    return folder


def write_config(folder: Path, config: Config) -> None:
    """Writes config.yaml, which later commands on this run read."""
    try:
        write_text(folder / "config.yaml", to_yaml(dataclasses.replace(config, distributed=DistributedConfig())))
    except OSError as e:
        raise unwritable(f"--workdir {folder}:", e) from None


def has_checkpoint(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint to resume from."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return any(name.isdigit() or REPLACED_CHECKPOINT.fullmatch(name) for name in names)


# --- which settings must be the same ---


def shared(config: Config) -> dict[str, Any]:
    """The settings that must be the same in all processes that train together."""
    return {k: v for k, v in flat(config).items() if k not in PER_PROCESS and not k.startswith("distributed.")}


def training_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences of two `flat` Configs in settings that decide the result, each as 'key: old -> new'."""
    phases = [list(dict.fromkeys(k.split(".")[1] for k in c if k.startswith("phases."))) for c in (old, new)]
    changes = [] if phases[0] == phases[1] else [f"phases: {', '.join(phases[0])} -> {', '.join(phases[1])}"]
    for key in dict.fromkeys([*old, *new]):
        before, after = (c.get(key, _default(key)) for c in (old, new))
        if before != after and key not in RESUMABLE and not key.startswith(RESUMABLE_SECTIONS):
            changes.append(f"{key}: {before!r} -> {after!r}")
    return changes


def check_config(config: Config, meta: Mapping[str, Any]) -> None:
    """Raises UserError if a Config would train differently from the Config in `meta`, the facts of a checkpoint."""
    if changes := training_changes(meta["config"], flat(config)):
        raise UserError(
            f"config.yaml: differs from the checkpoint ({'; '.join(changes)}). Restore it, or use a new folder."
        )


def _default(key: str) -> Any:
    """The default of a setting that an older version did not have."""
    section, _, name = key.rpartition(".")
    return getattr(Phase(), name, None) if section.startswith("phases.") else flat(Config()).get(key)


# --- the log ---


class RunLog:
    """Rows of metrics, one JSON object per line of metrics.jsonl, also written to TensorBoard; each row has "step".

    Args:
        folder: the run folder.
        resume_step: the step that training resumes from: rows of later steps are dropped, because they will be written
            again; None for a new log.
        evaluated: whether the log keeps the evaluation at `resume_step`; otherwise it is written again.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None, evaluated: bool = True):
        path = folder / "metrics.jsonl"
        rows = [] if resume_step is None else self.rows(path, resume_step)
        rows = [row for row in rows if evaluated or row["step"] < (resume_step or 0) or "valid_loss" not in row]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._folder, self._file = folder, path.open("a", encoding="utf-8")
        self._board = _TensorBoard(folder / "tensorboard", purge_step=0 if resume_step is None else resume_step + 1)

    @staticmethod
    def rows(path: Path, last_step: float = math.inf) -> list[dict[str, Any]]:
        """The rows up to a step. Damaged lines are skipped, for example an unfinished last line of a killed process."""
        rows = []
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):  # no text, no JSON, or a value that is too large or too deep
                continue
            step = row.get("step") if isinstance(row, dict) else None
            if isinstance(step, int) and step <= last_step:
                rows.append(row)
        return rows

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows and flushes them; RunError when the disk is full."""
        try:
            self._file.write("".join(json.dumps(row) + "\n" for row in rows))
            self._file.flush()
            for row in rows:
                self._board.write(row)
        except OSError as e:
            raise unwritable(f"{self._folder}: the log", e) from None

    def close(self) -> None:
        """Flushes and closes both files."""
        try:
            with self._file:
                self._board.close()
        except OSError as e:
            raise unwritable(f"{self._folder}: the log", e) from None


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by name: "lr/0" for an element of a list, "metrics/NAME" for a user's metric."""
    numbers = {}
    for name, value in row.items():
        parts = dict(enumerate(value)) if isinstance(value, list) else value
        named = {f"{name}/{k}": x for k, x in parts.items()} if isinstance(parts, dict) else {name: value}
        numbers |= {k: x for k, x in named.items() if k != "step" and isinstance(x, (int, float))}
    return numbers


class NoLog:
    """The log of a process that is not the primary one: it writes nothing."""

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Writes nothing."""


class _TensorBoard:
    """A TensorBoard event file; events from `purge_step` on in earlier files are to be ignored.

    It does not use tensorboardX's SummaryWriter, which writes in a thread: when the disk is full, that thread dies and the
    training waits for ever for room in its queue.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        no_torch = "torch" not in sys.modules
        if no_torch:  # tensorboardX would spend a second on importing it; without it tensorboardX works as well.
            sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
        finally:
            if no_torch:
                del sys.modules["torch"]
        self._event, self._scalar = Event, summary.scalar
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(self._event(step=purge_step, session_log=start))
        self._flushed = time.monotonic()

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes the numbers of a row; they are on disk ten seconds later at most."""
        for name, value in scalars(row).items():
            event = self._event(step=row["step"], wall_time=time.time(), summary=self._scalar(name, value))
            self._writer.write_event(event)
        if time.monotonic() - self._flushed > 10:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()
