"""What is wrong with a dataset: `train` says it of an index in two lines, `doctor` of any folder in full.

A `Finding` is one problem of some images or folders, and `KINDS` says what each kind means. The checks are functions that
yield findings: checks of one image, checks of a dataset, look-alikes, and what training would make of a folder.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxcats.common.config import TABLES
from jaxcats.common.errors import UserError
from jaxcats.data.files import IMAGE_EXTENSIONS, inspect_file, list_images, subfolders, walk, wrong_extension_note
from jaxcats.data.images import Decoded, is_high_bit_depth
from jaxcats.data.index import FolderIndex, Split
from jaxcats.data.labels import SPLITS, check_classes, extensions, find_labels, normalized_name, read_table, shortened

IMBALANCE = 3.0  # a class with this many times the images of another is worth a line
FEW = 30  # validation images of a class: the interval of its recall is some 25 points wide
UNIFORM = 2.0  # greatest standard deviation of a channel of 64 x 64 pixels, 0 to 255
# Greatest difference of two pixels of a blank image: noise of a standard deviation of 2 stays below it, a letter doesn't.
BLANK = 24
DARK = 1 / 8  # of the range of a high bit depth: 13 of 16 bits
TINY, LONG = 32, 5.0  # shorter side in pixels; longer over shorter side
THUMBNAIL = 32  # side in pixels
# Look-alikes must pass both. Of the 5 million pairs of 3,200 photos of cats and dogs one is a true pair (0 bits, 0.999);
# the next by correlation above 0.8 has 14 bits, the next by bits 0.87. Scaled and re-encoded copies stay below 4 bits.
MAX_BITS, MIN_CORRELATION = 10, 0.95

# kind: (grave, what it means and what to do), the gravest first
KINDS = {
    "unreadable": (True, "They can't be decoded and are skipped. Mend, shrink or remove them."),
    "the same image in two splits": (True, "The result on the second split will be too good. Remove one of the copies."),
    "the same image under two classes": (True, "One of their labels is wrong. Keep the copy with the right one."),
    "not laid out for training": (True, "With labels from folders, the default, training refuses the folder with this message."),
    "class named like a split": (True, "Training takes them for classes. If they are splits, name them train, valid or test, in small letters."),
    "one class spelled in two ways": (True, "Training takes them for two classes. Give both folders one name."),
    "class without images": (True, "Add images, or remove the class everywhere."),
    "only one class": (True, "A classifier needs at least two. Add another, or give the folder that the class folders are in."),
    "look-alikes in two splits": (True, "They may show the same scene, and then the result is too good. Compare them; keep them in one split."),
    "file left out": (False, "They can't be decoded, or nothing says their class. Mend or remove them; nothing else is affected."),
    "look-alikes": (False, "Compare them; they may be one image twice, or have two labels."),
    "the same image twice": (False, "They count twice. Remove one of the copies."),
    "copy that training ignores": (False, "Training does not look where the other copy is, so the image counts once. If you remove one, remove that copy."),
    "ignored by training": (False, "With labels from folders, the default, training reads the class folders only. Move these images, or leave them."),
    "test folder not used": (False, "Its class folders are not those of train, so its images count as unlabelled. Correct its folders to get a test result."),
    "wrong extension": (False, "Their content has another format than their name says. jaxcats reads them; rename them for other programs."),
    "unusual image": (False, "They are used, after the change that each note names. Check that this is what you want."),
    "rotated by EXIF": (False, "jaxcats rotates them upright; other programs may not."),
    "tiny": (False, "They are less than 32 pixels wide or high, with little to learn from. Find larger ones."),
    "long and narrow": (False, "They are more than 5 times as long as wide: the centre crop loses most of them."),
    "narrow range of values": (False, "They have more than 8 bits a pixel, and 8 bits keep little of what they show. Rescale their values before training."),
    "blank": (False, "They have one uniform colour, with nothing to learn from. Remove them."),
    "class imbalance": (False, "Look at the recall of the small classes; the accuracy hides it."),
    "few validation images": (False, f"Metrics of a class with fewer than {FEW} validation images are uncertain: mind their intervals."),
    "image without an image extension": (False, "Training ignores them. Rename them, with the extension of their content."),
    "not an image": (False, "Training ignores them."),
    "system file": (False, "An operating system left them. Training ignores them."),
    "hidden file": (False, "Training ignores hidden names."),
}  # fmt: skip
COPIES = ("the same image", "copy", "look-alikes")  # how kinds begin whose paths are one image


@dataclass(frozen=True)
class Finding:
    """One problem: its kind, the images or folders that have it (relative to the root), and what more there is to say."""

    kind: str
    paths: Sequence[str]
    detail: str = ""

    def line(self, most: int = 5) -> str:
        """The finding on one line, with the first `most` of its paths."""
        more = f" and {len(self.paths) - most:,} more" if len(self.paths) > most else ""
        paths = (" = " if self.kind.startswith(COPIES) else ", ").join(self.paths[:most]) + more
        return f"{paths}: {self.detail}" if self.detail else paths


def by_kind(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """The findings of each kind, the gravest kind first."""
    grouped = defaultdict(list)
    for finding in findings:
        grouped[finding.kind].append(finding)
    return {kind: grouped[kind] for kind in KINDS if kind in grouped}


# What train says of an index.


def counts(index: FolderIndex) -> dict[str, dict[str, int]]:
    """Images by split and class."""
    return {
        name: dict(zip(index.classes, np.bincount(split.labels, minlength=len(index.classes)).tolist(), strict=True))
        for name, split in _splits(index).items()
    }


def findings(index: FolderIndex) -> list[dict[str, Any]]:
    """What is wrong with an indexed dataset, as the run folder's data.json has it; the gravest first.

    Returns:
        {"what", "count", "examples" (a line each), "meaning", "grave" (the validation result is in doubt)} each.
    """
    images = [
        PlacedImage(path, content, name, index.classes[label])
        for name, split in _splits(index).items()
        for path, label, content in zip(split.paths, split.labels.tolist(), split.hashes, strict=True)
    ]
    number = counts(index)
    grouped = by_kind(
        [
            *check_copies(images),
            *(Finding("file left out", [file.path], file.reason) for file in index.bad),
            *(Finding("unusual image", [path], note) for path, note in index.notes),
            *check_balance(number),
            *(Finding("few validation images", [name], f"{n}") for name, n in number["valid"].items() if n < FEW),
        ]
    )
    return [
        {"what": kind, "count": len(found), "examples": [f.line() for f in found], "meaning": meaning, "grave": grave}
        for kind, found in grouped.items()
        for grave, meaning in [KINDS[kind]]
    ]


def summary(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Findings in two lines at most: the grave ones, and the rest. Files left out are listed elsewhere."""
    grave, rest = (
        ", ".join(f"{f['what']} ({f['count']:,})" for f in findings if f["grave"] is g and f["what"] != "file left out")
        for g in (True, False)
    )
    warning = [f"WARNING: {grave}: the result is in doubt."] if grave else []
    return [*warning, f"note: {rest}."] if rest else warning


def _splits(index: FolderIndex) -> dict[str, Split]:
    return index.splits | ({"test": index.test} if index.test else {})


# What doctor says of a folder.

Features = Callable[[Sequence[str], Sequence[str]], np.ndarray]  # (paths, content hashes) -> [N, F]


def examine_folder(
    root: Path, *, features_of: Features | None = None, cosine: float = 0.95, progress: bool = True
) -> tuple[int, str, dict[str, list[Finding]]]:
    """Examines any folder of images.

    Args:
        features_of: computes features of images: pairs with a cosine of at least `cosine` count as look-alikes too.

    Returns:
        The number of images, a sentence about the splits and classes that they were taken for, and the findings by kind.
    """
    from tqdm import tqdm

    paths, layout = list_images(root, root), find_layout(root)
    found = list(check_other_files(root))
    if not paths and not any(finding.kind == "image without an image extension" for finding in found):
        raise UserError(f"{root}: no images found at any depth; looked for {extensions()}")
    pool = ThreadPoolExecutor(os.cpu_count())
    disable = None if progress else True  # None: unless stderr is a terminal
    try:
        inspections = pool.map(inspect_image, [root / path for path in paths])
        looks = list(tqdm(inspections, total=len(paths), unit="file", desc="examining images", disable=disable))
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C doesn't wait for the rest
    contents: dict[str, tuple[Look, list[PlacedImage]]] = {}
    for path, look in zip(paths, looks, strict=True):
        found += [Finding(kind, [path], detail) for kind, detail in look.notes]
        if look.sha256:
            contents.setdefault(look.sha256, (look, []))[1].append(PlacedImage(path, look.sha256, *layout.place(path)))
    images = sorted(image for _, copies in contents.values() for image in copies)
    found += check_copies(images, layout)
    found += check_look_alikes([c for c in contents.values() if not c[0].is_uniform], features_of, cosine)
    number = Counter((image.split, image.label) for image in images)
    found += check_class_folders(number, layout, root)
    classes_said = any(f.kind in ("class without images", "one class spelled in two ways") for f in found)
    found += check_training([image.path for image in images], layout, root, classes_said=classes_said)
    return len(paths), _describe(number, layout), by_kind(found)


# Checks of one image.


@dataclass
class Look:
    """What inspecting one image showed.

    Attributes:
        sha256: of its content; "" for a bad file.
        phash: perceptual hash, 64 bits.
        thumbnail: uint8 [32, 32], grey.
        is_uniform: it is too uniform to be compared with others.
        notes: (kind of finding, detail).
    """

    sha256: str = ""
    phash: int = 0
    thumbnail: np.ndarray = field(default_factory=lambda: np.zeros((THUMBNAIL, THUMBNAIL), np.uint8))
    is_uniform: bool = False
    notes: list[tuple[str, str]] = field(default_factory=list)


def inspect_image(path: Path) -> Look:
    """Reads and decodes one file, once."""
    import imagehash

    look = Look()

    def check(stored: Image.Image, decoded: Decoded) -> None:
        small = np.asarray(decoded.image.resize((64, 64))).astype(float)
        look.is_uniform = bool(small.std(axis=(0, 1)).max() < UNIFORM)
        (short, long), size = sorted(decoded.image.size), f"{decoded.image.width} x {decoded.image.height}"
        notes = {
            "unusual image": "; ".join(decoded.notes),
            "wrong extension": wrong_extension_note(stored, path),
            "rotated by EXIF": f"orientation {decoded.orientation}" if decoded.orientation > 1 else "",
            "tiny": size if short < TINY else "",
            "long and narrow": size if long > LONG * short else "",
            **_range_notes(decoded.image, stored, look.is_uniform),
        }
        look.notes = [(kind, detail) for kind, detail in notes.items() if detail]
        grey = decoded.image.convert("L")
        look.thumbnail = np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
        look.phash = int(str(imagehash.phash(grey)), 16)

    record = inspect_file(path, check)
    if record.bad is not None:
        return Look(notes=[("unreadable", record.bad)])
    look.sha256 = record.sha256
    return look


def _range_notes(image: Image.Image, stored: Image.Image, is_uniform: bool) -> dict[str, str]:
    """Whether an image is blank, or was stored with a high bit depth of which 8 bits keep next to nothing."""
    ranges: Any = image.getextrema()
    # Seen small, a title page and a night sky are as uniform as a blank sheet.
    is_blank = is_uniform and max(high - low for low, high in ranges) < BLANK
    if is_high_bit_depth(stored):
        values = np.asarray(stored)
        values = values[np.isfinite(values)]
        full, words = (1.0, "of 0 to 1") if stored.mode == "F" else (65535.0, "of what 16 bits hold")
        low, high = (float(values.min()) / full, float(values.max()) / full) if values.size else (0.0, 0.0)
        # Beyond the full range an image is scaled by its own.
        if low >= 0 and high <= 1 and (high - low) * 65535 >= BLANK and (high <= DARK or is_blank):
            share = f"the lowest {100 * high:.2g} %" if high <= DARK else f"{100 * (high - low):.2g} %"
            return {"narrow range of values": f"its values fill only {share} {words}"}
    return {"blank": "one uniform colour" if is_blank else ""}


# Checks of files that aren't listed as images.

SYSTEM_FILES = ("thumbs.db", "desktop.ini", ".ds_store")
RAW = (".dng", ".nef", ".nrw", ".arw", ".sr2", ".pef", ".srw", ".cr2")  # cameras' own files, TIFF by their first bytes
# How the formats begin. Of BMP and PNM the letters alone may begin a text.
_STARTS = {
    ".jpg": rb"\xff\xd8\xff",
    ".png": rb"\x89PNG\r\n\x1a\n",
    ".gif": rb"GIF8[79]a",
    ".webp": rb"RIFF.{4}WEBP",
    ".tif": rb"II\*\0|MM\0\*",
    ".bmp": rb"BM.{4}\0{4}",
    ".avif": rb".{4}ftyp(avi[fs]|m[is]f1.*avi[fs])",
    ".heic": rb".{4}ftyp(hei[cxms]|hev[cxms]|m[is]f1)",
    ".jp2": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    ".pnm": rb"P[1-6]\s+(#|\d+\s+\d)",
}


def check_other_files(root: Path) -> Iterator[Finding]:
    """What every file is that isn't listed as an image."""
    for folder, names in walk(root, root, hidden=True):
        for name in sorted(names):
            file = Path(folder, name)
            path, extension = file.relative_to(root), file.suffix.lower()
            if name.lower() in SYSTEM_FILES:
                yield Finding("system file", [path.as_posix()])
            elif any(part.startswith(".") for part in path.parts):
                yield Finding("hidden file", [path.as_posix()])
            elif extension not in IMAGE_EXTENSIONS:
                image_extension = "" if extension in RAW else extension_by_content(file)
                if image_extension:
                    detail = f"{image_extension} by its content"
                    yield Finding("image without an image extension", [path.as_posix()], detail)
                else:
                    yield Finding("not an image", [path.as_posix()], extension)


def extension_by_content(path: str | Path) -> str:
    """The extension that a file should have by its first bytes; "" if it doesn't begin like an image."""
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            return ""
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError:
        return ""
    return next((extension for extension, regex in _STARTS.items() if re.match(regex, start, re.DOTALL)), "")


# Checks of a dataset.


class PlacedImage(NamedTuple):
    """An image with the hash of its content, its split and its label; "" where it has none."""

    path: str
    sha256: str
    split: str
    label: str


def check_copies(images: Iterable[PlacedImage], layout: "Layout | None" = None) -> Iterator[Finding]:
    """Images of the same content: in two splits, under two classes, or just twice.

    Args:
        layout: says which copies training would ignore; None: none of them.
    """
    by_content = defaultdict(list)
    for image in images:
        by_content[image.sha256].append(image)
    for copies in by_content.values():
        if len(copies) < 2:
            continue
        paths, splits = [image.path for image in copies], sorted({image.split for image in copies} - {""})
        ignored = [(path, where) for path in paths if layout and (where := layout.where_ignored(path))]
        note = shortened([f"training ignores {path}, which is {where}" for path, where in ignored], 3)
        is_leak, is_conflict = len(splits) > 1, len({image.label for image in copies} - {""}) > 1
        if is_leak:
            where = f"in {' and '.join(splits)}"
            yield Finding("the same image in two splits", paths, f"{where}; {note}" if note else where)
        if is_conflict:
            yield Finding("the same image under two classes", paths, note)
        if not is_leak and not is_conflict:
            counts_once = len(copies) - len(ignored) < 2
            yield Finding("copy that training ignores" if counts_once else "the same image twice", paths, note)


def check_balance(number: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    """Splits in which one class has many times the images of another; `number` is by split and class."""
    for split, by_class in number.items():
        filled = {name: n for name, n in by_class.items() if n}
        least, most = min(filled, key=filled.__getitem__, default=""), max(filled, key=filled.__getitem__, default="")
        if filled and filled[most] >= IMBALANCE * filled[least]:
            detail = f"{filled[most]:,} images of {most}, {filled[least]:,} of {least}"
            yield Finding("class imbalance", [split], detail)


# Look-alikes: candidates by a perceptual hash, each verified on small grey thumbnails; and, if asked, by features.


def check_look_alikes(
    contents: Sequence[tuple[Look, list[PlacedImage]]], features_of: Features | None, cosine: float
) -> Iterator[Finding]:
    """Groups of different contents that look alike: one finding a group, however many pairs there are in it.

    Args:
        contents: a look and the copies of each content.
    """
    if len(contents) < 2:
        return
    looks, copies_of = [look for look, _ in contents], [copies for _, copies in contents]
    groups = Groups(len(contents))
    phashes = np.array([look.phash for look in looks], np.uint64)
    links = near_links(groups, phashes, np.stack([look.thumbnail for look in looks]))
    if features_of:
        features = features_of([copies[0].path for copies in copies_of], [look.sha256 for look in looks])
        links += feature_links(groups, features, cosine=cosine)
    links_of = defaultdict(list)
    for link in links:
        links_of[groups.of[link.i]].append(link)
    for links in links_of.values():
        members = sorted({n for link in links for n in (link.i, link.j)})
        copies = [copies_of[i] for i in members]
        least = "the least alike neighbours: " if len(members) > 2 else ""
        detail = least + min(links, key=lambda link: link.similarity).words
        if classes := _differing([{image.label for image in same} for same in copies]):
            detail += f", in the classes {shortened(classes)}: perhaps a label is wrong"
        is_leak = _differing([{image.split for image in same} for same in copies])
        paths = sorted(path for same in copies for path in _one_per_place(same))
        yield Finding("look-alikes in two splits" if is_leak else "look-alikes", paths, detail)


def _differing(values: Sequence[set[str]]) -> list[str]:
    """The splits, or the classes, of several contents, if different contents differ in them."""
    every = sorted(set().union(*values) - {""})
    return every if len(every) > 1 and sum(bool(value - {""}) for value in values) > 1 else []


def _one_per_place(copies: Sequence[PlacedImage]) -> list[str]:
    """One path of a content for each split and class that has it; the first where none has."""
    places = {(image.split, image.label): image.path for image in reversed(copies)}
    return [path for place, path in places.items() if any(place)] or [copies[0].path]


class Groups:
    """Which of N images belong together, joined a few at a time: N - 1 links say it, however many pairs there are."""

    def __init__(self, n: int):
        self.of = np.arange(n)

    def join(self, i: int, others: np.ndarray) -> np.ndarray:
        """Makes one group of those of image i and `others`; returns one of `others` for each group that is new to i."""
        others = others[self.of[others] != self.of[i]]
        if len(others):
            groups, first = np.unique(self.of[others], return_index=True)
            others = others[np.sort(first)]
            self.of[np.isin(self.of, groups)] = self.of[i]
        return others


class Link(NamedTuple):
    """Two images i < j that look alike, and how much: as a number of at most 1, and in words."""

    i: int
    j: int
    similarity: float
    words: str


def near_links(groups: Groups, phashes: np.ndarray, thumbnails: np.ndarray, *, block: int = 512) -> list[Link]:
    """Links of images whose perceptual hashes and thumbnails are close; their groups are joined.

    Of many images that all look the same no pair is listed that earlier ones have already joined.

    Args:
        phashes: uint64 [N].
        thumbnails: uint8 [N, 32, 32]. Pairs are compared in blocks of rows: 11 x block x N bytes of memory at a time.
    """
    links, flat = [], thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    unit = _unit_rows(flat - flat.mean(1, keepdims=True))
    for start in range(0, len(phashes), block):
        distance = np.bitwise_count(phashes[start : start + block, None] ^ phashes[None, start:])
        close = np.triu(distance <= MAX_BITS, 1)
        for row in np.flatnonzero(close.any(1)).tolist():
            i, others = start + row, start + np.flatnonzero(close[row])
            others = others[groups.of[others] != groups.of[i]]
            # In parts, as each holds 4 KB for every image that is compared.
            parts = [unit[others[at : at + 4096]] @ unit[i] for at in range(0, len(others) + 1, 4096)]
            correlation = np.concatenate(parts)
            similarity = dict(zip(others.tolist(), correlation.tolist(), strict=True))
            for j in groups.join(i, others[correlation >= MIN_CORRELATION]).tolist():
                words = f"{distance[row, j - start]} of 64 bits, correlation {similarity[j]:.3f}"
                links.append(Link(i, j, similarity[j], words))
    return links


def feature_links(groups: Groups, features: np.ndarray, *, cosine: float, block: int = 1024) -> list[Link]:
    """Links of images whose features have a cosine of at least `cosine`; joins their groups as `near_links` does.

    Args:
        features: float [N, F]; compared in blocks of rows: 4 x block x N bytes of memory at a time.
    """
    links, unit = [], _unit_rows(features.astype(np.float32))
    for start in range(0, len(unit), block):
        products = unit[start : start + block] @ unit[start:].T
        close = np.triu(products >= cosine, 1)
        for row in np.flatnonzero(close.any(1)).tolist():
            for j in groups.join(start + row, start + np.flatnonzero(close[row])).tolist():
                similarity = float(products[row, j - start])
                links.append(Link(start + row, j, similarity, f"cosine of features {similarity:.3f}"))
    return links


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


# What training would make of a folder.


@dataclass(frozen=True)
class Layout:
    """The splits and classes that a folder's names stand for.

    Attributes:
        split_folders: the folders of splits that exist -> "train", "valid" or "test".
        classes: the class folders' names in train and valid; without these two folders those of the root, sorted.
        table: a file in the folder that can be read as a table of labels; "" where there is none.
    """

    split_folders: dict[str, str]
    classes: tuple[str, ...]
    table: str = ""

    @property
    def is_divided(self) -> bool:
        """Whether there is a folder of train or valid."""
        return not {"train", "valid"}.isdisjoint(self.split_folders.values())

    @property
    def has_folder_labels(self) -> bool:
        """Whether the labels seem to come from folders: a single one may lie among images that are labelled by name."""
        return len(self.classes) > 1 and not self.table

    def place(self, path: str) -> tuple[str, str]:
        """(split, class) of an image; "" where there is none.

        What is still to be divided is "train"; a folder beside train and valid that is named like one to test on is
        a split of its own, with its name and a slash.
        """
        *folders, _ = path.split("/")
        split = self.split_folders.get(folders[0], "") if folders else ""
        if split:
            folders = folders[1:]
        elif self.is_divided:
            is_test = bool(folders) and folders[0].lower().startswith("test")
            return (f"{folders[0]}/" if is_test else "", "")
        return split or "train", folders[0] if folders and folders[0] in self.classes else ""

    def where_ignored(self, path: str) -> str:
        """Where an image is that training ignores; "" for others, and where the folders don't tell."""
        split, label = self.place(path)
        if self.table:
            return ""
        if split not in SPLITS.values():
            return "outside train, valid and test"
        return "in no class folder" if self.has_folder_labels and not label and split != "test" else ""


def find_layout(root: Path) -> Layout:
    """The folders of splits and classes in a folder."""
    folders = subfolders(root)
    split_folders = {name: SPLITS[name] for name in folders if name in SPLITS}
    labelled = [root / name for name, split in split_folders.items() if split != "test"]
    names = {name for top in labelled for name in subfolders(top)} if labelled else set(folders) - set(split_folders)
    return Layout(split_folders, tuple(sorted(names)), _table(root))


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


def _describe(number: Mapping[tuple[str, str], int], layout: Layout) -> str:
    """The splits and classes that the images, by their number in each (split, class), were taken for."""
    parts = []
    for split in ("train", "valid", "test"):
        names = [name for name, of in layout.split_folders.items() if of == split]
        if not names and (split != "train" or layout.is_divided):
            continue
        if not names and not layout.classes:
            parts.append("no class folders")
            continue
        classes = [f"{name} {number[split, name]:,}" for name in layout.classes if number[split, name]]
        if number[split, ""]:
            classes.append(f"{number[split, '']:,} {'without labels' if split == 'test' else 'in no class folder'}")
        parts.append(f"{' and '.join(names) or 'classes'}: {shortened(classes) or 'no images'}")
    parts += [f"{split[:-1]}: {n:,} without labels" for (split, _), n in sorted(number.items()) if split.endswith("/")]
    if not layout.is_divided:
        parts.append("no train/ and valid/")
    if layout.table:
        parts.append(f"{layout.table} has labels too")
    return "; ".join(parts)


def check_class_folders(number: Mapping[tuple[str, str], int], layout: Layout, root: Path) -> Iterator[Finding]:
    """Class folders that are empty, alone, unequal or oddly named; `number` is of images by split and class."""
    classes, split_folders = layout.classes, layout.split_folders
    if not classes or layout.table:  # images without labels, or with others
        return
    tops = {name: s for name, s in split_folders.items() if s != "test"} if layout.is_divided else {".": "train"}
    for name, split in split_folders.items():
        # A test folder with others, as Kaggle's test/test, holds images without labels.
        if split == "test" and set() < set(subfolders(root / name)) <= set(classes):
            tops[name] = split
    folders = {c: [Path(top, c).as_posix() for top in tops if (root / top / c).is_dir()] for c in classes}
    if len(classes) == 1 and not any(number[split, ""] for split in tops.values()):
        yield Finding("only one class", folders[classes[0]])
    same_name = defaultdict(list)
    for c in classes:
        same_name[normalized_name(c)].append(c)
        if c.casefold() in ("training", "testing", *SPLITS):
            yield Finding("class named like a split", folders[c])
    misspelled = set()
    for names in same_name.values():
        # All of them may be classes; where a folder lacks one of them and has another, they are the same.
        if any(0 < sum(number[split, c] > 0 for c in names) < len(names) for split in tops.values()):
            misspelled.update(names)
            detail = f"{' and '.join(map(ascii, names))} differ only in encoding, case or spaces"
            yield Finding("one class spelled in two ways", [folder for c in names for folder in folders[c]], detail)
    for top, split in tops.items():
        for c in classes:
            if not number[split, c] and c not in misspelled:
                yield Finding("class without images", [Path(top, c).as_posix()])
    yield from check_balance({top: {c: number[split, c] for c in classes} for top, split in tops.items()})


def check_training(paths: Sequence[str], layout: Layout, root: Path, *, classes_said: bool) -> Iterator[Finding]:
    """What training would refuse or ignore, by its own code, where the labels come from folders.

    Args:
        classes_said: findings already say what is wrong with the class folders.
    """
    if not layout.has_folder_labels:
        return
    try:
        labelled = find_labels(root, "folders", columns={})
    except UserError as error:
        if not classes_said:
            yield Finding("not laid out for training", ["."], str(error).removeprefix(f"{root}: "))
        return
    ignored = defaultdict(list)
    for path in paths:
        if layout.where_ignored(path) and not layout.place(path)[0].endswith("/"):
            ignored[path.split("/")[0] if "/" in path else "."].append(path)
    for top, inside in ignored.items():
        folder = "the folder itself" if top == "." else f"{top}/"
        yield Finding("ignored by training", inside, f"{len(inside):,} in {folder}, {layout.where_ignored(inside[0])}")
    names = subfolders(root / "test") if layout.is_divided and "test" in layout.split_folders else []
    is_used = any(row.split == "test" for row in labelled.rows)
    if not is_used and {n.casefold() for n in names} & {c.casefold() for c in labelled.classes}:
        try:
            check_classes("test", names, labelled.classes, against="train")
        except UserError as error:
            yield Finding("test folder not used", ["test"], str(error).removeprefix("test: "))
