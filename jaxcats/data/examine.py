"""One look at each file of any folder, for what may be wrong with it: `examine_folder` finds, doctor prints."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.data.duplicates import SIDE, alike_features, group_of, near_links
from jaxcats.data.files import IMAGE_EXTENSIONS, belied, list_pictures, look_at, walk
from jaxcats.data.findings import IMBALANCE
from jaxcats.data.layout import extensions, shortened
from jaxcats.data.preprocess import bad_reason, exif_orientation, open_picture, upright_with_remarks
from jaxcats.data.table import SPLITS
from jaxcats.errors import UserError

BLANK = 2.0  # greatest standard deviation of a channel, 0 to 255
TINY, EXTREME = 32, 5.0  # shorter side in pixels; longer over shorter side
LITTER = ("thumbs.db", "desktop.ini", ".ds_store")
RAW = (".dng", ".nef", ".nrw", ".arw", ".sr2", ".pef", ".srw", ".cr2")  # cameras' own files, TIFF by their first bytes
STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
Features = Callable[[Sequence[str], Sequence[str]], np.ndarray]
NAMELESS = "picture without a picture's ending"
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
        # Pixels are worked on inside: a file of several frames takes its picture with it as it is closed.
        with open_picture(content) as image:
            early = exif_orientation(image) if image.format == "TIFF" else 1  # Pillow turns them as it decodes them
            picture, unusual = upright_with_remarks(image, content)
            turned = max(early, exif_orientation(image))
            checks = (
                ("wrong extension", belied(str(image.format), path.suffix)),
                ("unusual picture", "; ".join(unusual)),
                ("turned by EXIF", f"orientation {turned}" if turned > 1 else ""),
                *_checks_of_pixels(picture),
            )
            grey = picture.convert("L")
            thumb = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
            bits = int(str(imagehash.phash(grey)), 16)
    except Exception as error:  # whatever a damaged file raises is its finding
        return Look(bad=bad_reason(error))
    notes = [(kind, detail) for kind, detail in checks if detail]
    return Look(sha256=hashlib.sha256(content).hexdigest(), hash=bits, thumb=thumb, notes=notes)


def _checks_of_pixels(picture: Any) -> tuple[tuple[str, str], ...]:
    short, long = sorted(picture.size)
    size = f"{picture.width} x {picture.height}"
    even = np.asarray(picture.resize((64, 64))).astype(float).std(axis=(0, 1)).max() < BLANK
    return (
        ("tiny", size if short < TINY else ""),
        ("long and narrow", size if long > EXTREME * short else ""),
        ("blank", "one even colour" if even else ""),
    )


@dataclass(frozen=True)
class Layout:
    """Where training would find what in a folder.

    Attributes:
        tops: the folders of splits that are there -> "train", "valid" or "test".
        classes: the class folders' names in train and valid; without these two folders those of the root, sorted.
    """

    tops: dict[str, str]
    classes: tuple[str, ...]

    @property
    def divided(self) -> bool:
        return not {"train", "valid"}.isdisjoint(self.tops.values())

    def place(self, path: str) -> tuple[str, str]:
        """(split, class) of a picture; "" where there is none.

        What is still to be divided is "train"; a folder beside train and valid that is named like one to test on is
        a split of its own, with its name and a slash.
        """
        *folders, _ = path.split("/")
        split = self.tops.get(folders[0], "") if folders else ""
        if split:
            folders = folders[1:]
        elif self.divided:
            named = bool(folders) and folders[0].lower().startswith("test")
            return (f"{folders[0]}/" if named else "", "")
        return split or "train", folders[0] if folders and folders[0] in self.classes else ""

    def outside(self, paths: Sequence[str]) -> str:
        """What to say of those of the pictures that are in no split; "" for nothing."""
        beside = [p for p in paths if self.place(p)[0] not in SPLITS.values()]
        if not beside:
            return ""
        flatters = ", but a test on it would flatter" if self.place(beside[0])[0] else ""
        return f"{beside[0]} is outside train, valid and test: training does not see it{flatters}"


def find_layout(root: Path) -> Layout:
    """The folders of splits and classes in a folder."""
    there = _folders(root)
    tops = {name: SPLITS[name] for name in there if name in SPLITS}
    labelled = [root / name for name, split in tops.items() if split != "test"]
    names = [name for top in labelled for name in _folders(top)] if labelled else [n for n in there if n not in tops]
    return Layout(tops, tuple(sorted(set(names))))


def _folders(folder: Path) -> list[str]:
    return sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))


def examine_folder(
    root: Path,
    *,
    features_of: Features | None = None,
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

    found: Found = defaultdict(list)
    paths, layout = list_pictures(root, root), find_layout(root)
    _others(found, root)
    if not paths and NAMELESS not in found:
        raise UserError(f"{root}: no pictures found at any depth; looked for {extensions()}")
    bar = {"total": len(paths), "unit": "file", "desc": "looking at pictures", "disable": None if progress else True}
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        looks = list(tqdm(pool.map(look, [root / p for p in paths]), **bar))
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C doesn't wait for the rest
    for path, seen in zip(paths, looks, strict=True):
        for kind, detail in [("unreadable", seen.bad)] * bool(seen.bad) + seen.notes:
            found[kind].append({"paths": [path], "detail": detail})
    good = [(p, s) for p, s in zip(paths, looks, strict=True) if not s.bad]
    same: dict[str, list[str]] = defaultdict(list)
    for path, seen in good:
        same[seen.sha256].append(path)
    _same(found, same, layout)
    _alike(found, [(p, s) for p, s in good if not s.blank and same[s.sha256][0] == p], layout, features_of, cosine)
    _classes(found, [p for p, _ in good], layout, root)
    return len(paths), found


def _crossing(paths: Sequence[str], layout: Layout) -> tuple[list[str], list[str]]:
    """The splits and the classes that pictures are in, where these are more than one of a kind."""
    places = [layout.place(p) for p in paths]
    splits, classes = (sorted({place[n] for place in places if place[n]}) for n in (0, 1))
    return splits * (len(splits) > 1), classes * (len(classes) > 1)


def _same(found: Found, same: Mapping[str, list[str]], layout: Layout) -> None:
    for copies in same.values():
        if len(copies) > 1:
            splits, classes = _crossing(copies, layout)
            for kind in ["leak"] * bool(splits) + ["label conflict"] * bool(classes) or ["the same twice"]:
                found[kind].append({"paths": copies, "detail": layout.outside(copies)})


def _alike(
    found: Found, good: Sequence[tuple[str, Look]], layout: Layout, features_of: Features | None, cosine: float
) -> None:
    """Groups of different contents that look alike: as many items as groups, however many pairs there are in them."""
    if len(good) < 2:
        return
    paths, looks = zip(*good, strict=True)
    hashed = near_links(np.array([s.hash for s in looks], np.uint64), np.stack([s.thumb for s in looks]))
    felt = alike_features(features_of(paths, [s.sha256 for s in looks]), cosine=cosine) if features_of else []
    of = group_of(len(good), [(i, j) for i, j, *_ in (*hashed, *felt)])
    groups: dict[int, tuple[list, list]] = defaultdict(lambda: ([], []))
    for which, links in enumerate((hashed, felt)):
        for link in links:
            groups[of[link[0]]][which].append(link)
    for by_hash, by_features in groups.values():
        them = sorted({n for i, j, *_ in (*by_hash, *by_features) for n in (i, j)})
        names = [paths[i] for i in them]
        splits, classes = _crossing(names, layout)
        said = []
        if by_hash:
            bits, alike = max(link[2] for link in by_hash), min(link[3] for link in by_hash)
            said.append(f"{bits} of 64 bits, correlation {alike:.3f}")
        if by_features:
            said.append(f"cosine of features {min(link[2] for link in by_features):.3f}")
        if classes:
            said.append(f"in the classes {shortened(classes)}: perhaps a label is wrong")
        detail = "the least alike neighbours: " * (len(them) > 2) + ", ".join(said)
        found["look alike in two splits" if splits else "look alike"].append({"paths": names, "detail": detail})


def _classes(found: Found, paths: Sequence[str], layout: Layout, root: Path) -> None:
    counts, classes = Counter(layout.place(p) for p in paths), layout.classes
    if not classes:  # pictures without labels
        return
    tops = {name: split for name, split in layout.tops.items() if split != "test"} if layout.divided else {".": "train"}
    # A test folder with others, as Kaggle's test/test, holds pictures without labels.
    tops |= {n: s for n, s in layout.tops.items() if s == "test" and set() < set(_folders(root / n)) <= set(classes)}
    if len(classes) == 1 and not any(n for (split, name), n in counts.items() if split in tops.values() and not name):
        folders = [Path(top, classes[0]) for top in tops if (root / top / classes[0]).is_dir()]
        found["one class only"].append({"paths": [f.as_posix() for f in folders], "detail": ""})
    for top, split in tops.items():
        numbers = {c: counts[split, c] for c in classes}
        filled = {c: n for c, n in numbers.items() if n}
        found["class without pictures"] += [
            {"paths": [Path(top, c).as_posix()], "detail": ""} for c, n in numbers.items() if not n
        ]
        if filled and max(filled.values()) >= IMBALANCE * min(filled.values()):
            detail = ", ".join(f"{c}: {n:,}" for c, n in filled.items())
            found["unequal classes"].append({"paths": [top], "detail": detail})


def _others(found: Found, root: Path) -> None:
    for here, names in walk(root, root, hidden=True):
        for name in sorted(names):
            path = Path(here, name)
            short, ending = path.relative_to(root), path.suffix.lower()
            if name.lower() in LITTER:
                kind = "left by an operating system"
            elif any(part.startswith(".") for part in short.parts):
                kind = "hidden"
            elif ending not in IMAGE_EXTENSIONS:
                kind = NAMELESS if ending not in RAW and starts_like_a_picture(path) else "no picture"
            else:
                continue
            found[kind].append({"paths": [short.as_posix()], "detail": ending if kind == "no picture" else ""})


def starts_like_a_picture(path: str | Path) -> bool:
    """Whether an ordinary file begins as JPEG, PNG, GIF, WebP, TIFF or BMP do, whatever its name."""
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            return False
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    bitmap = start[:2] == b"BM" and start[6:10] == bytes(4)  # of which the first two letters may begin a text
    return start.startswith(STARTS) or (start[:4] == b"RIFF" and start[8:] == b"WEBP") or bitmap
