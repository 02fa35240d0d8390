"""Which settings a run may change when it goes on."""

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

# These may change between a run and its resumption: they don't change what is computed.
RESUMABLE = {
    "data.root",  # the images themselves are compared
    "data.manifest",
    "data.workers",
    "data.rehash",
    "data.on_bad_file",
    "checkpoint.every_steps",
    "checkpoint.every_epochs",
    "checkpoint.use",
    "distributed.coordinator",
    "distributed.num_processes",
    "distributed.process_id",
    "cache_dir",
    "max_error",
    "export",
    "report",
}

# And these may differ between processes that train together: they say where things are.
OWN = {"data.root", "data.manifest", "data.workers", "data.rehash", "cache_dir"}


def shared(config: Config) -> dict[str, Any]:
    """The settings that must be the same in all processes that train together."""
    return {k: v for k, v in flat(config).items() if k not in OWN and not k.startswith("distributed.")}


def training_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two `flat` Configs in fields that decide the result: 'key: old -> new' each."""
    names = [list(dict.fromkeys(k.split(".")[1] for k in side if k.startswith("phases."))) for side in (old, new)]
    found = [] if names[0] == names[1] else [f"phases: {', '.join(names[0])} -> {', '.join(names[1])}"]
    for key in dict.fromkeys([*old, *new]):
        before, after = (side.get(key, _default(key)) for side in (old, new))
        if key not in RESUMABLE and before != after:
            found.append(f"{key}: {before!r} -> {after!r}")
    return found


def _default(key: str) -> Any:
    """What a field is where a record, of an older version perhaps, doesn't have it."""
    section, _, name = key.rpartition(".")
    if section.startswith("phases."):
        return getattr(Phase(), name, None)
    return flat(Config()).get(key)


def open_run(config: Config, name: str | None, *, workdir: str | None, resume: bool) -> Path:
    """The run folder with its config.yaml; UserError when it holds another run, or one that differs where it matters."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(workdir) if workdir else Path("runs") / f"{Path(name).stem if name else 'train'}-{stamp}"
    saved = folder / "config.yaml"
    # A process killed at its very start may have left hidden files only.
    if folder.is_dir() and not saved.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise UserError(f"--workdir {folder}: not empty, and not a run folder. Name a new folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
    except OSError as e:
        raise unwritable(f"--workdir {folder}:", e) from None
    # Until there is a checkpoint nothing is lost by starting over, with mended settings too.
    resumed = has_checkpoint(folder)
    if resumed and not resume:
        raise UserError(
            f"--workdir {folder}: there is a run in it already. Add --resume to go on with it, or name another folder."
        )
    if resumed:
        changed = training_changes(flat(from_file(saved)), flat(config))
        if changed:
            raise UserError(
                f"--resume: the run in {folder} was started with other settings ({'; '.join(changed)}). "
                f"Resume without them, or use another --workdir."
            )
    for place in (folder, folder / "figures"):  # a process may have been killed while it wrote
        remove_stale_temporaries(place, older=-math.inf)
    if not resumed:
        write_config(folder, config)
    return folder


def write_config(folder: Path, config: Config) -> None:
    """Writes what a later command on this run reads; of a run that is resumed once its images are known to be the same."""
    try:
        write_text(folder / "config.yaml", to_yaml(dataclasses.replace(config, distributed=DistributedConfig())))
    except OSError as e:
        raise unwritable(f"--workdir {folder}:", e) from None


def has_checkpoint(folder: Path) -> bool:
    """Whether there is something to go on from."""
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(
        p.name.isdigit() or REPLACED_CHECKPOINT.fullmatch(p.name) for p in checkpoints.iterdir()
    )


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
