"""What a folder of pictures has that its owner should know before trusting a number."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcats.data.index import FolderIndex, Split

IMBALANCE = 3.0  # times as many pictures in the largest class as in the smallest: worth a line
LEFT_OUT = "files left out"
FEW = 30  # validation pictures of a class: its recall's interval is some 25 points wide


def _every(index: FolderIndex) -> dict[str, Split]:
    return index.splits | ({"test": index.test} if index.test else {})


def counts(index: FolderIndex) -> dict[str, dict[str, int]]:
    """Pictures by split and class."""
    return {
        name: dict(zip(index.classes, np.bincount(split.labels, minlength=len(index.classes)).tolist(), strict=True))
        for name, split in _every(index).items()
    }


def findings(index: FolderIndex) -> list[dict[str, Any]]:
    """Bad files, the same content twice, unequal and small classes; the gravest first.

    Returns:
        {"what", "count", "examples" (a few lines each), "meaning", "grave" (the validation result is in doubt)} each.
    """
    where: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for name, split in _every(index).items():
        for path, label, content in zip(split.paths, split.labels.tolist(), split.hashes, strict=True):
            where[content].append((name, index.classes[label], path))
    conflicts, leaks, tests, rest = [], [], [], []
    for copies in (c for c in where.values() if len(c) > 1):
        splits = {split for split, _, _ in copies}
        into = [conflicts] * (len({label for _, label, _ in copies}) > 1)
        into += [leaks] * ({"train", "valid"} <= splits) + [tests] * ({"test"} < splits)
        for group in into or [rest]:
            group.append(copies)
    found = [
        _finding(
            "the same picture in train and valid",
            leaks,
            "The classifier has seen these answers, so the result flatters. Remove one of the two.",
            grave=True,
        ),
        _finding(
            "the same picture in test and in train or valid",
            tests,
            "The test result will flatter. Remove one of the two.",
            grave=True,
        ),
        _finding(
            "the same picture under two classes",
            conflicts,
            "One of the labels is wrong. Keep the right one.",
            grave=True,
        ),
        {
            "what": LEFT_OUT,
            "count": len(index.bad),
            "examples": [f"{b.path}: {b.reason}" for b in index.bad],
            "meaning": "They can't be decoded, or nothing says their class. Mend or remove them; nothing else is affected.",
            "grave": False,
        },
        _finding("the same picture twice in a split", rest, "It counts twice. Remove one.", grave=False),
        {
            "what": "unusual pictures",
            "count": len(index.notes),
            "examples": [f"{path}: {note}" for path, note in index.notes],
            "meaning": "They are used, after what is said of each. Look whether that is what you want.",
            "grave": False,
        },
        _unequal(index),
        _few(index),
    ]
    return [f for f in found if f["count"]]


def summary(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Findings in two lines at most: the grave ones, and the rest. Files left out have lines of their own."""
    grave, rest = (
        ", ".join(f"{f['what']} ({f['count']:,})" for f in found if f["grave"] is side and f["what"] != LEFT_OUT)
        for side in (True, False)
    )
    return [f"WARNING: {grave}: the result is in doubt."] * bool(grave) + [f"note: {rest}."] * bool(rest)


def _finding(what: str, groups: list[list[tuple[str, str, str]]], meaning: str, *, grave: bool) -> dict[str, Any]:
    lines = [" = ".join(path for _, _, path in copies) for copies in groups]
    return {"what": what, "count": len(groups), "examples": lines, "meaning": meaning, "grave": grave}


def _unequal(index: FolderIndex) -> dict[str, Any]:
    by_class = counts(index)["train"]
    least, most = min(by_class, key=lambda c: by_class[c]), max(by_class, key=lambda c: by_class[c])
    unequal = by_class[most] >= IMBALANCE * by_class[least]
    return {
        "what": "unequal classes",
        "count": int(unequal),
        "examples": [f"{most}: {by_class[most]:,} training pictures; {least}: {by_class[least]:,}"],
        "meaning": "Look at the recall of the small classes; the share of right answers hides it.",
        "grave": False,
    }


def _few(index: FolderIndex) -> dict[str, Any]:
    small = {c: n for c, n in counts(index)["valid"].items() if n < FEW}
    return {
        "what": f"classes with fewer than {FEW} validation pictures",
        "count": len(small),
        "examples": [f"{c}: {n}" for c, n in small.items()],
        "meaning": "What is said of a class alone rests on few pictures: mind the intervals.",
        "grave": False,
    }
