"""Opening a run folder: for a new training, or for one that goes on."""

import dataclasses
import math
import time
from pathlib import Path

from jaxcats.cli import from_file
from jaxcats.config import Config, DistributedConfig, flat, to_yaml
from jaxcats.errors import UserError, unwritable
from jaxcats.resumption import training_changes
from jaxcats.storage.atomic import ASIDE, sweep, write_text
from jaxcats.storage.lock import hold


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
        hold(folder)
    except OSError as e:
        raise unwritable(f"--workdir {folder}:", e) from None
    # Until there is a checkpoint nothing is lost by starting over, with mended settings too.
    begun = has_checkpoint(folder)
    if begun and not resume:
        raise UserError(
            f"--workdir {folder}: there is a run in it already. Add --resume to go on with it, or name another folder."
        )
    if begun:
        changed = training_changes(flat(from_file(saved)), flat(config))
        if changed:
            raise UserError(
                f"--resume: the run in {folder} was started with other settings ({'; '.join(changed)}). "
                f"Resume without them, or use another --workdir."
            )
    for place in (folder, folder / "figures"):  # a process may have been killed while it wrote
        sweep(place, older=-math.inf)
    if not begun:
        keep_config(folder, config)
    return folder


def keep_config(folder: Path, config: Config) -> None:
    """Writes what a later command on this run reads; of a run that is resumed once its pictures are known to be the same."""
    try:
        write_text(folder / "config.yaml", to_yaml(dataclasses.replace(config, distributed=DistributedConfig())))
    except OSError as e:
        raise unwritable(f"--workdir {folder}:", e) from None


def has_checkpoint(folder: Path) -> bool:
    """Whether there is something to go on from."""
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(p.name.isdigit() or ASIDE.fullmatch(p.name) for p in checkpoints.iterdir())
