"""Holds out validation and test images by content, and records the split so that it is the same next time.

`index.scan` splits a folder with it. The key of the splits in the manifest is "sides"; another name would make existing manifests unreadable.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxcats.common.errors import UserError
from jaxcats.common.io import cache_name, remove_stale_temporaries, warn, write_json

SPLITS = ("valid", "test", "train")


@dataclass(frozen=True)
class Rule:
    """What decides a split.

    Attributes:
        valid_fraction: share of each class for "valid".
        seed: of the ranking.
        test_fraction: share for "test"; None: there is none.
        group: what says which images stay together; None: only equal images do.

    Raises:
        UserError: a fraction is impossible.
    """

    valid_fraction: float
    seed: int
    test_fraction: float | None = None
    group: str | None = None

    def __post_init__(self):
        for name, value in (("valid_fraction", self.valid_fraction), ("test_fraction", self.test_fraction)):
            if value is not None and not 0 < value < 1:
                raise UserError(f"{name}: {value} is not between 0 and 1; 0.2 holds out a fifth")
        if self.valid_fraction + (self.test_fraction or 0) >= 1:
            raise UserError(
                f"valid_fraction, test_fraction: {self.valid_fraction} and {self.test_fraction} leave nothing to train on"
            )

    def to_dict(self) -> dict[str, Any]:
        """The rule as the manifest stores it; unset fields are left out, so that older manifests stay readable."""
        optional = {"test_fraction": self.test_fraction, "group": self.group}
        return {"fraction": self.valid_fraction, "seed": self.seed} | {
            k: v for k, v in optional.items() if v is not None
        }

    def __str__(self) -> str:
        return " and ".join(f"{name} {value}" for name, value in vars(self).items() if value is not None)


@dataclass(eq=False)
class _Unit:
    """Contents that stay together: one content, or all those of a group; a content of two groups makes them one unit."""

    contents: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    split: str | None = None

    @property
    def name(self) -> str:
        return f"group {min(self.groups)}" if self.groups else min(self.contents)


def default_manifest(cache_dir: Path, root: Path, rule: Rule, labels: str = "folders") -> Path:
    """The file for a folder's split when the user names no file; other `labels` get a separate split."""
    values = ["", *rule.to_dict().values()] + ([labels] if labels != "folders" else [])
    return cache_dir / "splits" / cache_name(root, "|".join(map(str, values)))


def split_by_content(
    contents: Mapping[str, Sequence[str]],
    *,
    rule: Rule,
    manifest: Path,
    given: bool,
    groups: Mapping[str, Iterable[str]] | None = None,
    kept: Path | None = None,
) -> dict[str, str]:
    """The split ("train", "valid" or "test") of each content hash.

    Within each class the distinct contents are ranked by a hash of (seed, content), and the first are held out, at least
    one for each split and never all. Equal contents share a split, in different classes too; so do those of a group,
    which is ranked by its name. Contents and groups that the manifest knows keep their split, so images that arrive
    later only fill up what is short. A warning says which old images were grouped too late to share a split.

    Args:
        contents: content hashes of each class.
        manifest: JSON file read first and written when something was added.
        given: the user chose the manifest's place: problems with it are errors, not warnings.
        groups: names of the groups of a content, for those that have any.
        kept: a copy of a manifest of this rule; used in place of `manifest` if it knows every content.

    Raises:
        UserError: a class has too few images, or the user's manifest can't be used.
    """
    if not given:
        remove_stale_temporaries(manifest.parent)
    groups = groups or {}
    distinct = {content for hashes in contents.values() for content in hashes}
    saved, saved_groups = _read(kept, rule, given) if kept else ({}, {})
    if not distinct <= saved.keys():
        saved, saved_groups = _read(manifest, rule, given)
    assignments, unit_of = dict(saved), _units(distinct, groups)
    units = set(unit_of.values())
    for unit in units:
        known = [saved_groups[name] for name in sorted(unit.groups) if name in saved_groups]
        known += [saved[content] for content in sorted(unit.contents) if content in saved]
        if known:
            unit.split = known[0]
            assignments |= dict.fromkeys(unit.contents - saved.keys(), unit.split)
    # The class with the fewest units comes first, so it decides the split of units that classes share.
    for name, hashes in sorted(contents.items(), key=lambda item: len({unit_of[content] for content in item[1]})):
        _place_class(name, hashes, assignments, unit_of, rule)
    wanted = set(SPLITS) if rule.test_fraction else {"valid", "train"}
    for name, hashes in contents.items():
        if missing := wanted - {assignments[content] for content in hashes}:
            reason = f"the split written in {manifest}" if saved else "images that it shares with other classes"
            way_out = "remove that file to split afresh" if saved else "try another split_seed or smaller groups"
            raise UserError(
                f"class {name}: it has no {min(missing)} images because of {reason}; {way_out}, or add images"
            )
    all_groups = {name: unit.split for unit in units for name in unit.groups} | saved_groups
    # Images keep their splits, so a group may be tied together too late.
    torn = {name for c, names in groups.items() for name in names if assignments[c] != all_groups[name]}
    if torn:
        problem = f"{len(torn):,} groups have images in several splits, for example {min(torn)}"
        warn(f"{problem}: they were split before the groups were set. Another manifest splits them again")
    if (len(assignments), len(all_groups)) != (len(saved), len(saved_groups)):
        tree = {"version": 1, **rule.to_dict(), "sides": dict(sorted(assignments.items()))}
        if rule.group:
            tree["groups"] = dict(sorted(all_groups.items()))
        try:
            write_json(manifest, tree)
        except OSError as error:
            _report(f"the split manifest {manifest} can't be written ({error.strerror})", given)
    return assignments


def _units(contents: Iterable[str], groups: Mapping[str, Iterable[str]]) -> dict[str, _Unit]:
    """The unit of each content."""
    unit_of: dict[str, _Unit] = {}
    of_group: dict[str, _Unit] = {}
    for content in contents:
        names = set(groups.get(content, ()))
        joined = {of_group[name] for name in names if name in of_group}
        unit = max(joined, key=lambda unit: len(unit.contents), default=_Unit())
        for other in joined - {unit}:
            unit.contents |= other.contents
            unit.groups |= other.groups
            unit_of |= dict.fromkeys(other.contents, unit)
            of_group |= dict.fromkeys(other.groups, unit)
        unit.contents.add(content)
        unit.groups |= names
        unit_of[content] = unit
        of_group |= dict.fromkeys(names, unit)
    return unit_of


def _place_class(
    name: str, hashes: Sequence[str], assignments: dict[str, str], unit_of: Mapping[str, _Unit], rule: Rule
) -> None:
    """Gives a split to each unit of a class that has none yet, and to all contents of the unit."""
    distinct = set(hashes)
    n, needed = len({unit_of[content] for content in distinct}), 3 if rule.test_fraction else 2
    if n < needed:
        kind = "group" if rule.group and n < len(distinct) else "distinct"
        problem = f"class {name}: {len(hashes)} images, but only {n} {kind}"
        raise UserError(f"{problem}; {needed} splits need at least {needed}")
    shares = {"valid": rule.valid_fraction} | ({"test": rule.test_fraction} if rule.test_fraction else {})
    size = Counter(unit_of[content] for content in distinct if unit_of[content].split is None)
    fresh = sorted(size, key=lambda unit: hashlib.sha256(f"{rule.seed}:{unit.name}".encode()).hexdigest())
    present = Counter(assignments.get(content) for content in distinct)
    remaining = len(distinct)
    for i, (split, share) in enumerate(shares.items()):
        target = min(max(round(share * len(distinct)), 1), remaining - (len(shares) - i))
        remaining -= target
        short, placed = target - present[split], False
        for unit in fresh:
            if unit.split is None and short > 0 and short >= size[unit] / 2:
                unit.split, short, placed = split, short - size[unit], True
        left = [unit for unit in fresh if unit.split is None]
        if not present[split] and not placed and len(left) > 1:  # only groups that are too large are left
            min(left, key=lambda unit: size[unit]).split = split
    for unit in fresh:
        unit.split = unit.split or "train"
        assignments |= dict.fromkeys(unit.contents, unit.split)


def _read(manifest: Path, rule: Rule, given: bool) -> tuple[dict[str, str], dict[str, str]]:
    """The splits of contents and of groups; both empty where there is no manifest."""
    try:
        saved = json.loads(manifest.read_text(encoding="utf-8"))
        saved_rule = Rule(saved["fraction"], saved["seed"], saved.get("test_fraction"), saved.get("group"))
        assignments, groups = dict(saved["sides"]), dict(saved.get("groups", {}))
        if not {*assignments.values(), *groups.values()} <= set(SPLITS):
            raise ValueError("a split is none of train, valid and test")
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problem = f"the split manifest {manifest} can't be read ({type(error).__name__})"
        _report(f"{problem}; restore it, or remove it to split afresh", given)
        return {}, {}
    if saved_rule != rule:
        problem = f"the split manifest {manifest} was made with {saved_rule}, not {rule}"
        raise UserError(f"{problem}; use the settings of the manifest, or another manifest")
    return assignments, groups


def _report(problem: str, given: bool) -> None:
    """A problem with a manifest: an error where the user chose its place, otherwise a warning."""
    if given:
        raise UserError(problem)
    warn(f"{problem}; the split may change when images are added")
