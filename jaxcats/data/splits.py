"""Holding out validation and test images by content, written down so that they are the same next time."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxcats.common.errors import UserError
from jaxcats.common.io import cache_name, remove_stale_temporaries, warn, write_json

SIDES = ("valid", "test", "train")


@dataclass(frozen=True)
class Rule:
    """What a split is made by.

    Attributes:
        fraction: share of each class for "valid".
        seed: of the ranking.
        test_fraction: share for "test"; None: there is none.
        group: what says which images stay together; None: only equal ones do.
    """

    fraction: float
    seed: int
    test_fraction: float | None = None
    group: str | None = None

    def facts(self) -> dict[str, Any]:
        """As the manifest has it: what isn't set is left out, so that older manifests stay readable."""
        more = {"test_fraction": self.test_fraction, "group": self.group}
        return {"fraction": self.fraction, "seed": self.seed} | {k: v for k, v in more.items() if v is not None}


def default_manifest(cache_dir: Path, root: Path, rule: Rule, labels: str = "folders") -> Path:
    """Where the split of a folder is kept when the user names no place; other `labels` are held out afresh."""
    key = "|".join(map(str, ["", *rule.facts().values(), *[labels] * (labels != "folders")]))
    return cache_dir / "splits" / cache_name(root, key)


def split_by_content(
    contents: Mapping[str, Sequence[str]],
    *,
    rule: Rule,
    manifest: Path,
    given: bool,
    groups: Mapping[str, Iterable[str]] | None = None,
    kept: Path | None = None,
) -> dict[str, str]:
    """The side ("train", "valid" or "test") of each content hash.

    Within each class the distinct contents are ranked by a hash of (seed, content), and the first of them held out, at
    least one for each side and never all. Equal contents share a side, in different classes too; so do those of a
    group, which is ranked by its name. Contents and groups that the manifest knows keep their side, so images that
    arrive later only fill up what is short. Where old images come to be of one group too late, a warning says so.

    Args:
        contents: content hashes of each class.
        manifest: JSON file read first and written when something was added.
        given: the user chose the manifest's place: problems with it are errors, not warnings.
        groups: names of the groups of a content, for those that have any.
        kept: a copy of a manifest, of this rule, that goes before `manifest` where it knows every content.
    """
    if not given:
        remove_stale_temporaries(manifest.parent)
    every = {content for hashes in contents.values() for content in hashes}
    saved, known = _read_kept(kept, rule, every) or _read(manifest, rule, given)
    before = (len(saved), len(known))
    sides = dict(saved)
    unit_of = _units(every, groups or {})
    names: dict[str, set[str]] = defaultdict(set)
    members: dict[str, set[str]] = defaultdict(set)
    for content, unit in unit_of.items():
        members[unit].add(content)
        names[unit] |= set((groups or {}).get(content, ()))
    chosen = {}
    for unit, inside in members.items():
        side = next((known[n] for n in sorted(names[unit]) if n in known), None)
        side = side or next((saved[c] for c in sorted(inside) if c in saved), None)
        if side:
            chosen[unit] = side
            sides |= {content: side for content in inside if content not in saved}
    # What is shared with other classes is placed by the class that has the least to choose from.
    for name, hashes in sorted(contents.items(), key=lambda item: len({unit_of[content] for content in item[1]})):
        distinct = set(hashes)
        _check_enough(name, hashes, {unit_of[content] for content in distinct}, rule)
        for unit, side in _place(distinct, sides, unit_of, chosen, rule).items():
            chosen[unit] = side
            sides |= dict.fromkeys(members[unit], side)
    for name, hashes in contents.items():
        _check_sides(name, {sides[content] for content in hashes}, rule, manifest if saved else None)
    known = known | {n: chosen[unit] for unit, of_unit in names.items() for n in of_unit if n not in known}
    _warn_of_torn(groups or {}, sides)
    if (len(sides), len(known)) != before:
        tree = {"version": 1, **rule.facts(), "sides": dict(sorted(sides.items()))}
        _write(manifest, tree | ({"groups": dict(sorted(known.items()))} if rule.group else {}), given)
    return sides


def _warn_of_torn(groups: Mapping[str, Iterable[str]], sides: Mapping[str, str]) -> None:
    """Say which groups are on several sides: images keep theirs, so a group may be tied together too late."""
    found: dict[str, set[str]] = defaultdict(set)
    for content, names in groups.items():
        for name in names:
            found[name].add(sides[content])
    torn = sorted(name for name, of_it in found.items() if len(of_it) > 1)
    if torn:
        warn(
            f"{len(torn):,} groups have images on several sides, for example {torn[0]}: they were split before they were "
            f"of one group. Split afresh, with another manifest, to have each on one side"
        )


def _units(contents: Iterable[str], groups: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Which contents go together: content -> the name of its unit. A content of two groups makes them one."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    first = {}
    for content in contents:
        of_it = sorted(groups.get(content, ()))
        first[content] = f"group {of_it[0]}" if of_it else content
        for other in of_it:
            a, b = sorted((root(first[content]), root(f"group {other}")))
            parent[b] = a
    return {content: root(name) for content, name in first.items()}


def _check_enough(name: str, hashes: Sequence[str], units: set[str], rule: Rule) -> None:
    needed = 3 if rule.test_fraction else 2
    if len(units) < needed:
        what = "group" if rule.group and len(units) < len(set(hashes)) else "distinct"
        ask = (
            "valid_fraction needs two at least, one for each side"
            if needed == 2
            else "three splits need three at least"
        )
        raise UserError(f"class {name}: {len(hashes)} images, but only {('one', 'two')[len(units) - 1]} {what}; {ask}")


def _place(
    distinct: set[str], sides: Mapping[str, str], unit_of: Mapping[str, str], chosen: Mapping[str, str], rule: Rule
) -> dict[str, str]:
    """The side of each unit of a class that has none yet."""
    shares = {"valid": rule.fraction} | ({"test": rule.test_fraction} if rule.test_fraction else {})
    size = defaultdict(int)
    for content in distinct:
        if unit_of[content] not in chosen:
            size[unit_of[content]] += 1
    fresh = sorted(size, key=lambda unit: _rank(rule.seed, unit))
    placed, left_over = {}, len(distinct)
    for further, (side, share) in enumerate(shares.items()):
        target = min(max(round(share * len(distinct)), 1), left_over - (len(shares) - further))
        left_over -= target
        held = sum(sides.get(content) == side for content in distinct)
        short = target - held
        for unit in fresh:
            if unit not in placed and short > 0 and short >= size[unit] / 2:
                placed[unit], short = side, short - size[unit]
        if not held and side not in placed.values():  # only groups too large for it are left
            left = [unit for unit in fresh if unit not in placed]
            if len(left) > 1:
                placed[min(left, key=lambda unit: size[unit])] = side
    return {unit: placed.get(unit, "train") for unit in fresh}


def _check_sides(name: str, found: set[str], rule: Rule, manifest: Path | None) -> None:
    """`manifest`: what an earlier split was read from, None where there was none."""
    for side in SIDES:
        if side not in found and (side != "test" or rule.test_fraction):
            if manifest:
                why = f"the split written in {manifest} leaves it no {side} images; remove that file to split afresh, or add images"
            else:
                why = f"what it shares with other classes leaves it no {side} images; try another split_seed, or add images"
            if rule.group:
                why += ", or choose smaller groups"
            raise UserError(f"class {name}: {why}")


def _rank(seed: int, content: str) -> str:
    return hashlib.sha256(f"{seed}:{content}".encode()).hexdigest()


def _read(manifest: Path, rule: Rule, given: bool) -> tuple[dict[str, str], dict[str, str]]:
    """The sides of contents and of groups."""
    try:
        saved = json.loads(manifest.read_text(encoding="utf-8"))
        made_with = {key: saved.get(key) for key in ("test_fraction", "group") if saved.get(key) is not None}
        made_with = {"fraction": saved["fraction"], "seed": saved["seed"]} | made_with
        sides, groups = dict(saved["sides"]), dict(saved.get("groups", {}))
        if not set(sides.values()) | set(groups.values()) <= set(SIDES):
            raise ValueError("a side is none of train, valid and test")
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        message = f"the split manifest {manifest} can't be read ({type(error).__name__})"
        if given:
            raise UserError(f"{message}; restore it, or remove it to split afresh") from error
        warn(f"{message}: the folder is split afresh")
        return {}, {}
    if made_with != rule.facts():
        raise UserError(
            f"the split manifest {manifest} was made with {_words(made_with)}, not {_words(rule.facts())}; give those, or another "
            f"manifest"
        )
    return sides, groups


def _read_kept(kept: Path | None, rule: Rule, contents: set[str]) -> tuple[dict[str, str], dict[str, str]] | None:
    """The same, of a copy; None where there is none, or it can't be used."""
    try:
        sides, groups = _read(kept, rule, True) if kept else ({}, {})
    except UserError:
        return None
    return (sides, groups) if contents <= sides.keys() else None


def _words(facts: Mapping[str, Any]) -> str:
    names = {"fraction": "valid_fraction"}
    return " and ".join(f"{names.get(key, key)} {value}" for key, value in facts.items())


def _write(manifest: Path, value: dict, given: bool) -> None:
    try:
        write_json(manifest, value)
    except OSError as error:
        message = f"the split manifest {manifest} can't be written ({error.strerror})"
        if given:
            raise UserError(f"{message}; give a place that can be written") from error
        warn(f"{message}: the split may change when images are added")
