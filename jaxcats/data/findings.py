"""What a folder of pictures has that its owner should know before trusting a number."""

from collections import defaultdict
from typing import Any

import numpy as np

from jaxcats.data.index import FolderIndex

IMBALANCE = 3.0  # times as many pictures in the largest class as in the smallest: worth a line
FEW = 30  # validation pictures of a class: its recall's interval is some 25 points wide


def counts(index: FolderIndex) -> dict[str, dict[str, int]]:
    """Pictures by split and class."""
    return {
        name: dict(zip(index.classes, np.bincount(split.labels, minlength=len(index.classes)).tolist(), strict=True))
        for name, split in index.splits.items()
    }


def findings(index: FolderIndex) -> list[dict[str, Any]]:
    """Bad files, the same content twice, unequal and small classes; the gravest first.

    Returns:
        {"what", "count", "examples" (a few lines each), "meaning", "grave" (the validation result is in doubt)} each.
    """
    where: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for name, split in index.splits.items():
        for path, label, content in zip(split.paths, split.labels.tolist(), split.hashes, strict=True):
            where[content].append((name, index.classes[label], path))
    same = [copies for copies in where.values() if len(copies) > 1]
    conflicts = [c for c in same if len({label for _, label, _ in c}) > 1]
    leaks = [c for c in same if len({split for split, _, _ in c}) > 1]
    rest = [c for c in same if c not in leaks and c not in conflicts]
    found = [
        _finding(
            "the same picture in train and valid",
            leaks,
            "The classifier has seen these answers, so the result flatters. Remove one of the two.",
            grave=True,
        ),
        _finding(
            "the same picture under two classes",
            conflicts,
            "One of the labels is wrong. Keep the right one.",
            grave=True,
        ),
        {
            "what": "files left out",
            "count": len(index.bad),
            "examples": [f"{b.path}: {b.reason}" for b in index.bad],
            "meaning": "They can't be decoded. Mend or remove them; nothing else is affected.",
            "grave": False,
        },
        _finding("the same picture twice in a split", rest, "It counts twice. Remove one.", grave=False),
        _unequal(index),
        _few(index),
    ]
    return [f for f in found if f["count"]]


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
