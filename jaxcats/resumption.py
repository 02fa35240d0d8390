"""Which settings a run may change when it goes on."""

from collections.abc import Mapping
from typing import Any

from jaxcats.config import Config, Phase, flat

# These may change between a run and its resumption: they don't change what is computed.
RESUMABLE = {
    "data.root",  # the pictures themselves are compared
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
