"""One look at each file of any folder, for what may be wrong with it: `examine_folder` finds, doctor prints."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.data.duplicates import SIDE, alike_features, near_pairs
from jaxcats.data.files import IMAGE_EXTENSIONS, belied, list_pictures, look_at
from jaxcats.data.findings import IMBALANCE
from jaxcats.data.preprocess import bad_reason, exif_orientation, open_picture, remarks, upright
from jaxcats.data.table import SPLITS

BLANK = 2.0  # greatest standard deviation of a channel, 0 to 255
TINY, EXTREME = 32, 5.0  # shorter side in pixels; longer over shorter side
LITTER = ("thumbs.db", "desktop.ini", ".ds_store")
Found = dict[str, list[dict[str, Any]]]


@dataclass
class Look:
    """What one decode of a file said; `notes` are (kind, detail)."""

    bad: str = ""
    sha256: str = ""
    hash: int = 0
    thumb: np.ndarray = field(default_factory=lambda: np.zeros((SIDE, SIDE), np.uint8))
    notes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def blank(self) -> bool:
        return any(kind == "blank" for kind, _ in self.notes)


def look(path: Path) -> Look:
    """Read and decode one file, once."""
    import imagehash
    from PIL import Image

    try:
        if not path.is_file() or not path.stat().st_size:
            return Look(bad=look_at(path).bad or "")
        content = path.read_bytes()
        result = Look(sha256=hashlib.sha256(content).hexdigest())
        with open_picture(content) as image:
            turned, wrong = exif_orientation(image), belied(str(image.format), path.suffix)
            picture = upright(image)
            unusual = remarks(image)
    except Exception as error:  # whatever a damaged file raises is its finding
        return Look(bad=bad_reason(error))
    short, long = sorted(picture.size)
    size = f"{picture.width} x {picture.height}"
    even = np.asarray(picture.resize((64, 64))).astype(float).std(axis=(0, 1)).max() < BLANK
    checks = (
        ("wrong extension", wrong),
        ("unusual picture", "; ".join(unusual)),
        ("turned by EXIF", f"orientation {turned}" if turned != 1 else ""),
        ("tiny", size if short < TINY else ""),
        ("long and narrow", size if long > EXTREME * short else ""),
        ("blank", "one even colour" if even else ""),
    )
    result.notes = [(kind, detail) for kind, detail in checks if detail]
    grey = picture.convert("L")
    result.thumb = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
    result.hash = int(str(imagehash.phash(grey)), 16)
    return result


def place(path: str) -> tuple[str, str]:
    """(split, class) by the folders a path stands in; "" where there is none."""
    parts = path.split("/")[:-1]
    split = SPLITS.get(parts[0], "") if parts else ""
    return split, next(iter(parts[1:] if split else parts), "")


def examine_folder(
    root: Path,
    *,
    features_of: Callable[[Sequence[str], Sequence[str]], np.ndarray] | None = None,
    cosine: float = 0.95,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[int, Found]:
    """How many pictures there are, and what was found: kind -> items {"paths", "detail"}.

    Args:
        features_of: from paths and content hashes to features [N, F]: pairs of pictures with a cosine of at least
            `cosine` are found as well.
        workers: decoding threads; None is one per core.
    """
    from tqdm import tqdm

    paths = list_pictures(root, root)
    bar = {"total": len(paths), "unit": "file", "desc": "looking at pictures", "disable": None if progress else True}
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        looks = list(tqdm(pool.map(look, [root / p for p in paths]), **bar))
    found: Found = defaultdict(list)
    for path, seen in zip(paths, looks, strict=True):
        for kind, detail in [("unreadable", seen.bad)] * bool(seen.bad) + seen.notes:
            found[kind].append({"paths": [path], "detail": detail})
    good = [(p, s) for p, s in zip(paths, looks, strict=True) if not s.bad]
    _same(found, good)
    _alike(found, [(p, s) for p, s in good if not s.blank], features_of, cosine)
    _classes(found, [p for p, _ in good], root)
    _others(found, root)
    return len(paths), found


def _same(found: Found, good: Sequence[tuple[str, Look]]) -> None:
    same: dict[str, list[str]] = defaultdict(list)
    for path, seen in good:
        same[seen.sha256].append(path)
    for copies in same.values():
        if len(copies) > 1:
            places = [place(p) for p in copies]
            leak, conflict = (len({p[n] for p in places}) > 1 for n in (0, 1))
            for kind in ["leak"] * leak + ["label conflict"] * conflict or ["the same twice"]:
                found[kind].append({"paths": copies, "detail": ""})


def _alike(
    found: Found,
    good: Sequence[tuple[str, Look]],
    features_of: Callable[[Sequence[str], Sequence[str]], np.ndarray] | None,
    cosine: float,
) -> None:
    if len(good) < 2:
        return
    hashes, thumbs = np.array([s.hash for _, s in good], np.uint64), np.stack([s.thumb for _, s in good])
    why = {(i, j): f"{bits} of 64 bits, correlation {alike:.3f}" for i, j, bits, alike in near_pairs(hashes, thumbs)}
    if features_of is not None:
        paths, contents = [p for p, _ in good], [s.sha256 for _, s in good]
        for i, j, alike in alike_features(features_of(paths, contents), cosine=cosine):
            why[i, j] = ", ".join(filter(None, [why.get((i, j)), f"cosine of features {alike:.3f}"]))
    for (i, j), detail in sorted(why.items()):
        pair = [good[i][0], good[j][0]]
        if good[i][1].sha256 != good[j][1].sha256:
            kind = "look alike in two splits" if place(pair[0])[0] != place(pair[1])[0] else "look alike"
            found[kind].append({"paths": pair, "detail": detail})


def _classes(found: Found, paths: Sequence[str], root: Path) -> None:
    counts = Counter(place(p) for p in paths)
    tops = [t for t in sorted(root.iterdir()) if t.is_dir() and t.name in SPLITS]
    inside = {t: {d.name for d in t.iterdir() if d.is_dir() and d.name[0] != "."} for t in tops or [root]}
    classes = set().union(*inside.values())
    for top, names in inside.items():
        split = SPLITS.get(top.name, "") if tops else ""
        if not names:  # pictures without labels
            continue
        numbers = {c: counts[split, c] for c in sorted(classes)}
        filled = {c: n for c, n in numbers.items() if n}
        found["class without pictures"] += [
            {"paths": [(top / c).relative_to(root).as_posix()], "detail": ""} for c, n in numbers.items() if not n
        ]
        if filled and max(filled.values()) >= IMBALANCE * min(filled.values()):
            detail = ", ".join(f"{c}: {n:,}" for c, n in filled.items())
            found["unequal classes"].append({"paths": [top.relative_to(root).as_posix()], "detail": detail})


def _others(found: Found, root: Path) -> None:
    for here, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(here, name).relative_to(root)
            ending = path.suffix.lower()
            if name.lower() in LITTER:
                kind = "left by an operating system"
            elif any(part.startswith(".") for part in path.parts):
                kind = "hidden"
            elif ending not in IMAGE_EXTENSIONS:
                kind = "no picture"
            else:
                continue
            found[kind].append({"paths": [path.as_posix()], "detail": ending if kind == "no picture" else ""})
