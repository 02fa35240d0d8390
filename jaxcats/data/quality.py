"""Images that look the same: candidates by a perceptual hash, each verified on small grey thumbnails."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.common.config import TABLES
from jaxcats.common.errors import UserError
from jaxcats.data.files import IMAGE_EXTENSIONS, inspect_file, list_images, walk, wrong_extension_note
from jaxcats.data.images import bad_reason, exif_orientation, is_high_bit_depth, open_image, upright_with_remarks
from jaxcats.data.index import FolderIndex, Split
from jaxcats.data.labels import (
    SPLITS,
    check_classes,
    extensions,
    find_labels,
    normalized_name,
    read_table,
    shortened,
    subfolders,
)

# A pair must pass both. Of the 5 million pairs of 3,200 photos of cats and dogs one is a true pair (0 bits, 0.999); the
# next by correlation above 0.8 has 14 bits, the next by bits 0.87. Scaled and re-encoded copies stay under 4 bits.
MAX_BITS = 10
MIN_CORRELATION = 0.95
SIDE = 32


class Groups:
    """Which of N images belong together, joined a few at a time: N - 1 links say it, however many pairs there are."""

    def __init__(self, n: int):
        self.of = np.arange(n)

    def join(self, i: int, others: np.ndarray) -> np.ndarray:
        """One of `others` for each group among them that was not image i's yet; these groups become one with it."""
        others = others[self.of[others] != self.of[i]]
        if len(others):
            groups, first = np.unique(self.of[others], return_index=True)
            others = others[np.sort(first)]
            self.of[np.isin(self.of, groups)] = self.of[i]
        return others


def group_of(n: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """The number of each image's group, by links of one kind or several."""
    partners: dict[int, list[int]] = {}
    for i, j in links:
        partners.setdefault(i, []).append(j)
    groups = Groups(n)
    for i, others in partners.items():
        groups.join(i, np.array(others))
    return groups.of.tolist()


def near_links(
    hashes: np.ndarray,
    thumbs: np.ndarray,
    *,
    bits: int = MAX_BITS,
    correlation: float = MIN_CORRELATION,
    block: int = 512,
) -> list[tuple[int, int, int, float]]:
    """(i, j, bits that differ, correlation of the thumbnails) of pairs i < j that look the same.

    Of many images that all look the same no pair is named that earlier ones have already joined.

    Args:
        hashes: uint64 [N], perceptual hashes.
        thumbs: uint8 [N, 32, 32], grey. Pairs are compared in blocks of rows: 11 x block x N bytes of memory at a time.
    """
    found, groups = [], Groups(len(hashes))
    flat = _unit(thumbs.reshape(len(thumbs), -1).astype(np.float32), centred=True)
    for start in range(0, len(hashes), block):
        distance = np.bitwise_count(hashes[start : start + block, None] ^ hashes[None, start:])
        close = np.triu(distance <= bits, 1)
        for row in np.flatnonzero(close.any(1)):
            i, others = start + int(row), start + np.flatnonzero(close[row])
            others = others[groups.of[others] != groups.of[i]]
            # In parts, as each holds 4 KB for every image that is compared.
            alike = np.concatenate([flat[others[at : at + 4096]] @ flat[i] for at in range(0, len(others) + 1, 4096)])
            same = dict(zip(others.tolist(), alike.tolist(), strict=True))
            for j in groups.join(i, others[alike >= correlation]).tolist():
                found.append((i, j, int(distance[row, j - start]), same[j]))
    return found


def alike_features(features: np.ndarray, *, cosine: float, block: int = 1024) -> list[tuple[int, int, float]]:
    """(i, j, cosine) of pairs i < j of rows whose cosine is at least `cosine`, likewise none that is joined already.

    Args:
        features: float [N, F]; compared in blocks of rows: 4 x block x N bytes of memory at a time.
    """
    found, groups = [], Groups(len(features))
    unit = _unit(features.astype(np.float32), centred=False)
    for start in range(0, len(unit), block):
        products = unit[start : start + block] @ unit[start:].T
        close = np.triu(products >= cosine, 1)
        for row in np.flatnonzero(close.any(1)):
            i = start + int(row)
            for j in groups.join(i, start + np.flatnonzero(close[row])).tolist():
                found.append((i, j, float(products[row, j - start])))
    return found


def _unit(rows: np.ndarray, *, centred: bool) -> np.ndarray:
    if centred:
        rows = rows - rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


EVEN = 2.0  # greatest standard deviation of a channel of 64 x 64 pixels, 0 to 255
# Greatest difference of two pixels of a blank image: noise of a standard deviation of 2 stays under it, a letter doesn't.
BLANK = 24
DARK = 1 / 8  # of the range of deep greys: 13 of 16 bits
TINY, EXTREME = 32, 5.0  # shorter side in pixels; longer over shorter side
LITTER = ("thumbs.db", "desktop.ini", ".ds_store")
RAW = (".dng", ".nef", ".nrw", ".arw", ".sr2", ".pef", ".srw", ".cr2")  # cameras' own files, TIFF by their first bytes
NAMELESS = "image without an image's ending"
# How the formats begin. Of BMP and PNM the letters alone may begin a text.
_STARTS = [
    (re.compile(start, re.DOTALL), ending)
    for start, ending in (
        (rb"\xff\xd8\xff", ".jpg"),
        (rb"\x89PNG\r\n\x1a\n", ".png"),
        (rb"GIF8[79]a", ".gif"),
        (rb"RIFF.{4}WEBP", ".webp"),
        (rb"II\*\0|MM\0\*", ".tif"),
        (rb"BM.{4}\0{4}", ".bmp"),
        (rb".{4}ftyp(avi[fs]|m[is]f1.*avi[fs])", ".avif"),
        (rb".{4}ftyp(hei[cxms]|hev[cxms]|m[is]f1)", ".heic"),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", ".jp2"),
        (rb"P[1-6]\s+(#|\d+\s+\d)", ".pnm"),
    )
]


@dataclass
class Look:
    """What one decode of a file said; `notes` are (kind, detail), an `even` image is not to be compared with others."""

    bad: str = ""
    sha256: str = ""
    hash: int = 0
    thumb: np.ndarray = field(default_factory=lambda: np.zeros((SIDE, SIDE), np.uint8))
    notes: list[tuple[str, str]] = field(default_factory=list)
    even: bool = False


def inspect_image(path: Path) -> Look:
    """Read and decode one file, once."""
    import imagehash
    from PIL import Image

    try:
        if not path.is_file() or not path.stat().st_size:
            return Look(bad=inspect_file(path).bad or "")
        content = path.read_bytes()
        # Pixels are worked on inside: a file of several frames takes its image with it as it is closed.
        with open_image(content) as image:
            early = exif_orientation(image) if image.format == "TIFF" else 1  # Pillow turns them as it decodes them
            picture, unusual = upright_with_remarks(image, content)
            turned = max(early, exif_orientation(image))
            even = bool(np.asarray(picture.resize((64, 64))).astype(float).std(axis=(0, 1)).max() < EVEN)
            checks = (
                ("wrong extension", wrong_extension_note(str(image.format), path.suffix)),
                ("unusual image", "; ".join(unusual)),
                ("turned by EXIF", f"orientation {turned}" if turned > 1 else ""),
                *_checks_of_pixels(picture, image, even),
            )
            grey = picture.convert("L")
            thumb = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
            bits = int(str(imagehash.phash(grey)), 16)
    except MemoryError:
        return Look(bad="too large for the memory that is free")
    except Exception as error:  # whatever a damaged file raises is its finding
        return Look(bad=bad_reason(error))
    notes = [(kind, detail) for kind, detail in checks if detail]
    return Look(sha256=hashlib.sha256(content).hexdigest(), hash=bits, thumb=thumb, notes=notes, even=even)


def _checks_of_pixels(picture: Any, image: Any, even: bool) -> tuple[tuple[str, str], ...]:
    """Of the image as it is read, and of the image that it was made of, whose greys may be deeper."""
    short, long = sorted(picture.size)
    size = f"{picture.width} x {picture.height}"
    # Seen small, a title page and a night sky are as even as a blank sheet.
    flat = even and max(high - low for low, high in picture.getextrema()) < BLANK
    unused = _unused_range(image, flat) if is_high_bit_depth(image) else ""
    return (
        ("tiny", size if short < TINY else ""),
        ("long and narrow", size if long > EXTREME * short else ""),
        ("little of the range used", unused),
        ("blank", "one even colour" if flat and not unused else ""),
    )


def _unused_range(image: Any, flat: bool) -> str:
    """What to say of deep greys of which 8 bits keep next to nothing; "" for others, and for blank ones."""
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    full, words = (1.0, "of 0 to 1") if image.mode == "F" else (65535.0, "of what 16 bits hold")
    low, high = (float(values.min()) / full, float(values.max()) / full) if values.size else (0.0, 0.0)
    if low < 0 or high > 1 or (high - low) * 65535 < BLANK:  # beyond the range an image is scaled by its own
        return ""
    if high <= DARK:
        return f"its values fill only the lowest {100 * high:.2g} % {words}: nearly black as it is read"
    return f"its values fill only {100 * (high - low):.2g} % {words}: nearly even as it is read" if flat else ""


def other_files(root: Path) -> Iterator[tuple[str, str, str]]:
    """(kind of finding, path, detail) of every file that is not listed as an image."""
    for here, names in walk(root, root, hidden=True):
        for name in sorted(names):
            path = Path(here, name)
            short, ending, detail = path.relative_to(root), path.suffix.lower(), ""
            if name.lower() in LITTER:
                kind = "left by an operating system"
            elif any(part.startswith(".") for part in short.parts):
                kind = "hidden"
            elif ending not in IMAGE_EXTENSIONS:
                right = "" if ending in RAW else starts_like_a_image(path)
                kind, detail = (NAMELESS, f"{right} by its content") if right else ("no image", ending)
            else:
                continue
            yield kind, short.as_posix(), detail


def starts_like_a_image(path: str | Path) -> str:
    """The ending that an ordinary file should have by its first bytes, whatever its name; "" if it begins as no image."""
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            return ""
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError:
        return ""
    return next((ending for pattern, ending in _STARTS if pattern.match(start)), "")


IMBALANCE = 3.0  # times as many images in the largest class as in the smallest: worth a line
LEFT_OUT = "files left out"
FEW = 30  # validation images of a class: its recall's interval is some 25 points wide


def _every(index: FolderIndex) -> dict[str, Split]:
    return index.splits | ({"test": index.test} if index.test else {})


def counts(index: FolderIndex) -> dict[str, dict[str, int]]:
    """Images by split and class."""
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
            "the same image in train and valid",
            leaks,
            "The classifier has seen these answers, so the result flatters. Remove one of the two.",
            grave=True,
        ),
        _finding(
            "the same image in test and in train or valid",
            tests,
            "The test result will flatter. Remove one of the two.",
            grave=True,
        ),
        _finding(
            "the same image under two classes",
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
        _finding("the same image twice in a split", rest, "It counts twice. Remove one.", grave=False),
        {
            "what": "unusual images",
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
        "examples": [f"{most}: {by_class[most]:,} training images; {least}: {by_class[least]:,}"],
        "meaning": "Look at the recall of the small classes; the share of right answers hides it.",
        "grave": False,
    }


def _few(index: FolderIndex) -> dict[str, Any]:
    small = {c: n for c, n in counts(index)["valid"].items() if n < FEW}
    return {
        "what": f"classes with fewer than {FEW} validation images",
        "count": len(small),
        "examples": [f"{c}: {n}" for c, n in small.items()],
        "meaning": "What is said of a class alone rests on few images: mind the intervals.",
        "grave": False,
    }


Features = Callable[[Sequence[str], Sequence[str]], np.ndarray]
SPELT = "one class spelt in two ways"
LIKE_SPLITS = ("training", "testing", *SPLITS)
EvaluationNumbers = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Layout:
    """Where training would find what in a folder.

    Attributes:
        tops: the folders of splits that are there -> "train", "valid" or "test".
        classes: the class folders' names in train and valid; without these two folders those of the root, sorted.
        table: a file in the folder that can be read as a table of labels; "" where there is none.
    """

    tops: dict[str, str]
    classes: tuple[str, ...]
    table: str = ""

    @property
    def divided(self) -> bool:
        return not {"train", "valid"}.isdisjoint(self.tops.values())

    @property
    def by_folders(self) -> bool:
        """Whether the labels seem to come from folders: a single one may lie among images that are labelled by name."""
        return len(self.classes) > 1 and not self.table

    def place(self, path: str) -> tuple[str, str]:
        """(split, class) of an image; "" where there is none.

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

    def unseen(self, path: str) -> str:
        """Where an image is that training doesn't see; "" for others, and where the folders don't tell."""
        split, name = self.place(path)
        if self.table:
            return ""
        if split not in SPLITS.values():
            return "outside train, valid and test"
        return "in no class folder" if self.by_folders and not name and split != "test" else ""

    def outside(self, paths: Sequence[str]) -> str:
        """What to say of those of the images that training doesn't see; "" for nothing."""
        said = [
            f"{path} is {why}: training does not see it{', but a test on it would flatter' * self.to_test_on(path)}"
            for path in paths
            if (why := self.unseen(path))
        ]
        return shortened(said, 3)

    def to_test_on(self, path: str) -> bool:
        """Whether an image is in a folder beside train and valid that is named like one to test on."""
        return self.place(path)[0].endswith("/")


def find_layout(root: Path) -> Layout:
    """The folders of splits and classes in a folder."""
    there = subfolders(root)
    tops = {name: SPLITS[name] for name in there if name in SPLITS}
    labelled = [root / name for name, split in tops.items() if split != "test"]
    names = [name for top in labelled for name in subfolders(top)] if labelled else [n for n in there if n not in tops]
    return Layout(tops, tuple(sorted(set(names))), _table(root))


def _table(root: Path) -> str:
    """The first file in a folder that training could read labels of its images from, with the usual names of columns."""
    for file in sorted(p for p in root.iterdir() if p.suffix.lower() in TABLES and p.is_file()):
        try:
            rows, _ = read_table(root, str(file), {})
        except UserError:
            continue
        if any((root / row.path).is_file() for row in rows[:100]):
            return file.name
    return ""


def examine_folder(
    root: Path,
    *,
    features_of: Features | None = None,
    cosine: float = 0.95,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[int, str, EvaluationNumbers]:
    """How many images there are, what they were taken for, and what was found: kind -> items {"paths", "detail"}.

    Args:
        features_of: from paths and content hashes to features [N, F]: pairs of images with a cosine of at least
            `cosine` are found as well.
        workers: decoding threads; None is one per core.
    """
    from tqdm import tqdm

    found: EvaluationNumbers = defaultdict(list)
    paths, layout = list_images(root, root), find_layout(root)
    for kind, path, detail in other_files(root):
        found[kind].append({"paths": [path], "detail": detail})
    if not paths and NAMELESS not in found:
        raise UserError(f"{root}: no images found at any depth; looked for {extensions()}")
    bar = {"total": len(paths), "unit": "file", "desc": "looking at images", "disable": None if progress else True}
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        looks = list(tqdm(pool.map(inspect_image, [root / p for p in paths]), **bar))
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
    _alike(found, [s for p, s in good if not s.even and same[s.sha256][0] == p], same, layout, features_of, cosine)
    seen = [p for p, _ in good]
    counts = Counter(layout.place(p) for p in seen)
    _classes(found, counts, layout, root)
    _training(found, seen, layout, root)
    return len(paths), _understood(counts, layout), found


def _understood(counts: Mapping[tuple[str, str], int], layout: Layout) -> str:
    """The splits and classes that the images were taken for."""
    said = []
    for split in ("train", "valid", "test"):
        names = [name for name, of_it in layout.tops.items() if of_it == split]
        if not names and (split != "train" or layout.divided):
            continue
        if not names and not layout.classes:
            said.append("no class folders")
            continue
        numbers = [f"{c} {counts[split, c]:,}" for c in layout.classes if counts[split, c]]
        where = "without labels" if split == "test" else "in no class folder"
        loose = [f"{counts[split, '']:,} {where}"] * bool(counts[split, ""])
        top = " and ".join(names) if names else "classes"
        said.append(f"{top}: {shortened(numbers + loose) or 'no images'}")
    said += [f"{split[:-1]}: {n:,} without labels" for (split, _), n in sorted(counts.items()) if split.endswith("/")]
    said += ["no train/ and valid/"] * (not layout.divided)
    return "; ".join(said + [f"{layout.table} has labels too"] * bool(layout.table))


def _crossing(contents: Sequence[Sequence[str]], layout: Layout) -> tuple[list[str], list[str]]:
    """The splits and the classes that images are in, where different contents, each with its copies, differ in them."""

    def across(n: int) -> list[str]:
        of = [{layout.place(p)[n] for p in copies} - {""} for copies in contents]
        every = sorted(set().union(*of))
        return every if len(every) > 1 and sum(map(bool, of)) > 1 else []

    return across(0), across(1)


def _same(found: EvaluationNumbers, same: Mapping[str, list[str]], layout: Layout) -> None:
    for copies in same.values():
        if len(copies) > 1:
            splits, classes = _crossing([[path] for path in copies], layout)
            once = (
                "copy that training does not see" if sum(not layout.unseen(p) for p in copies) < 2 else "the same twice"
            )
            for kind in ["leak"] * bool(splits) + ["label conflict"] * bool(classes) or [once]:
                found[kind].append({"paths": copies, "detail": layout.outside(copies)})


def _alike(
    found: EvaluationNumbers,
    looks: Sequence[Look],
    same: Mapping[str, list[str]],
    layout: Layout,
    features_of: Features | None,
    cosine: float,
) -> None:
    """Groups of different contents that look alike: as many items as groups, however many pairs there are in them."""
    if len(looks) < 2:
        return
    contents = [same[s.sha256] for s in looks]
    paths = [copies[0] for copies in contents]
    hashed = near_links(np.array([s.hash for s in looks], np.uint64), np.stack([s.thumb for s in looks]))
    felt = alike_features(features_of(paths, [s.sha256 for s in looks]), cosine=cosine) if features_of else []
    of = group_of(len(looks), [(i, j) for i, j, *_ in (*hashed, *felt)])
    groups: dict[int, tuple[list, list]] = defaultdict(lambda: ([], []))
    for which, links in enumerate((hashed, felt)):
        for link in links:
            groups[of[link[0]]][which].append(link)
    for by_hash, by_features in groups.values():
        them = sorted({n for i, j, *_ in (*by_hash, *by_features) for n in (i, j)})
        splits, classes = _crossing([contents[i] for i in them], layout)
        names = sorted(path for i in them for path in _placed(contents[i], layout))
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


def _placed(copies: Sequence[str], layout: Layout) -> list[str]:
    """One path of a content for each split and class that has it; the first where none has."""
    places = {layout.place(p): p for p in reversed(copies)}
    return [path for place, path in places.items() if any(place)] or [copies[0]]


def _classes(found: EvaluationNumbers, counts: Mapping[tuple[str, str], int], layout: Layout, root: Path) -> None:
    classes = layout.classes
    if not classes or layout.table:  # images without labels, or with others
        return
    tops = {name: split for name, split in layout.tops.items() if split != "test"} if layout.divided else {".": "train"}
    # A test folder with others, as Kaggle's test/test, holds images without labels.
    tops |= {n: s for n, s in layout.tops.items() if s == "test" and set() < set(subfolders(root / n)) <= set(classes)}
    folders = {c: [Path(top, c).as_posix() for top in tops if (root / top / c).is_dir()] for c in classes}
    if len(classes) == 1 and not any(n for (split, name), n in counts.items() if split in tops.values() and not name):
        found["one class only"].append({"paths": folders[classes[0]], "detail": ""})
    found["class named like a split"] += [
        {"paths": folders[c], "detail": ""} for c in classes if c.casefold() in LIKE_SPLITS
    ]
    spelt = defaultdict(list)
    for c in classes:
        spelt[normalized_name(c)].append(c)
    twins: list[str] = []
    for names in spelt.values():
        # All of them may be classes; where a folder lacks one of them and has another, they are the same.
        if any(0 < sum(counts[s, c] > 0 for c in names) < len(names) for s in tops.values()):
            twins += names
            detail = f"{' and '.join(map(ascii, names))} differ only in encoding, case or spaces"
            found[SPELT].append({"paths": [f for c in names for f in folders[c]], "detail": detail})
    for top, split in tops.items():
        numbers = {c: counts[split, c] for c in classes}
        filled = {c: n for c, n in numbers.items() if n}
        found["class without images"] += [
            {"paths": [Path(top, c).as_posix()], "detail": ""} for c, n in numbers.items() if not n and c not in twins
        ]
        if filled and max(filled.values()) >= IMBALANCE * min(filled.values()):
            detail = ", ".join(f"{c}: {n:,}" for c, n in filled.items())
            found["unequal classes"].append({"paths": [top], "detail": detail})


def _training(found: EvaluationNumbers, paths: Sequence[str], layout: Layout, root: Path) -> None:
    """What training would make of the folder, by its own code, where the labels come from folders."""
    if not layout.by_folders:
        return
    whole = {"train", "valid"} <= set(layout.tops.values())
    try:
        labelled = find_labels(root, "folders", valid_fraction=None if whole else 0.2, columns={})
    except UserError as error:
        said = str(error).removeprefix(f"{root}: ")
        # What it says of a folder inside is said already, of every class.
        if said != str(error) or not (found["class without images"] or found[SPELT]):
            found["not laid out for training"].append({"paths": ["."], "detail": said})
        return
    unseen = defaultdict(list)
    for path in paths:
        if layout.unseen(path) and not layout.to_test_on(path):
            unseen[path.split("/")[0] if "/" in path else "."].append(path)
    for top, inside in unseen.items():
        detail = f"{len(inside):,} in {'the folder itself' if top == '.' else top + '/'}, {layout.unseen(inside[0])}"
        found["training does not see them"].append({"paths": inside, "detail": detail})
    names = subfolders(root / "test") if layout.divided and "test" in layout.tops else []
    if "test" not in labelled.parts and {n.casefold() for n in names} & {c.casefold() for c in labelled.classes}:
        try:
            check_classes(Path("test"), names, labelled.classes, against="train")
        except UserError as error:
            found["test folder left alone"].append({"paths": ["test"], "detail": str(error).removeprefix("test: ")})
