"""Problems of a dataset: `train` prints those of its images in two lines (`findings`, `summary`), `doctor` those of any folder
in full (`examine_folder`).

A `Finding` is one problem of some images or folders, and `KINDS` says what each kind means. The checks are functions that
yield findings: checks of one image, checks of a dataset, look-alikes, and what training would make of a folder.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxcats.common.config import TABLES
from jaxcats.common.errors import UserError
from jaxcats.data import files
from jaxcats.data.images import FORMATS, Decoded, ImageError, is_high_bit_depth, open_image
from jaxcats.data.index import FolderIndex, Split
from jaxcats.data.labels import SPLITS, extensions, find_labels, normalized_name, read_table, shortened

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
    "unreadable": (True, "They can't be decoded and are skipped. Repair, shrink or remove them."),
    "the same image in two splits": (True, "The result on the second split will be too good. Remove one of the copies."),
    "the same image under two classes": (True, "One of their labels is wrong. Keep the copy with the right one."),
    "not laid out for training": (True, "With labels from folders, the default, training refuses the folder with this message."),
    "class named like a split": (True, "Training takes them for classes. If they are splits, name them train, valid or test, in lower case."),
    "class without images": (True, "Add images, or remove the class everywhere."),
    "only one class": (True, "A classifier needs at least two. Add another, or give the folder that the class folders are in."),
    "look-alikes in two splits": (True, "They may show the same scene, and then the result is too good. Compare them; keep them in one split."),
    "file left out": (False, "They can't be decoded, or nothing says their class. Repair or remove them; nothing else is affected."),
    "look-alikes": (False, "Compare them; they may be one image twice, or have two labels."),
    "the same image twice": (False, "They count twice. Remove one of the copies."),
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
    "hidden file": (False, "Training ignores hidden names."),
}  # fmt: skip
COPIES = ("the same image", "look-alikes")  # beginnings of the kinds whose paths all show one image


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
    contents = defaultdict(list)
    for name, split in _splits(index).items():
        for path, label, content in zip(split.paths, split.labels.tolist(), split.hashes, strict=True):
            contents[content].append(PlacedImage(path, name, index.classes[label]))
    number = counts(index)
    grouped = by_kind(
        [
            *check_copies(contents.values()),
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
        The number of images, a sentence about the splits and classes assigned to them, and the findings by kind.
    """
    paths, layout = files.list_images(root, root), find_layout(root)
    found = list(check_other_files(root))
    if not paths and not any(finding.kind == "image without an image extension" for finding in found):
        raise UserError(f"{root}: no images found at any depth; looked for {extensions()}")
    looks = files.map_files(inspect_image, [root / path for path in paths], "examining images", progress=progress)
    contents: dict[str, tuple[Look, list[PlacedImage]]] = {}
    number: Counter[tuple[str, str]] = Counter()
    ignored = []
    for path, look in zip(paths, looks, strict=True):
        found += [Finding(kind, [path], detail) for kind, detail in look.notes]
        if look.sha256:
            image = PlacedImage(path, *layout.place(path))
            number[image.split, image.label] += 1
            if layout.is_ignored(path):
                ignored.append(path)
            else:
                contents.setdefault(look.sha256, (look, []))[1].append(image)
    found += check_copies(copies for _, copies in contents.values())
    found += check_look_alikes([c for c in contents.values() if not c[0].is_uniform], features_of, cosine)
    found += check_class_folders(number, layout, root)
    found += check_training(ignored, layout, root)
    return len(paths), _describe(number, layout), by_kind(found)


# Checks of one image.


@dataclass
class Look:
    """The result of inspecting one image.

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
            "wrong extension": files.wrong_extension_note(stored, path),
            "rotated by EXIF": f"orientation {decoded.orientation}" if decoded.orientation > 1 else "",
            "tiny": size if short < TINY else "",
            "long and narrow": size if long > LONG * short else "",
            **_range_notes(decoded.image, stored, look.is_uniform),
        }
        look.notes = [(kind, detail) for kind, detail in notes.items() if detail]
        grey = decoded.image.convert("L")
        look.thumbnail = np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
        look.phash = int(str(imagehash.phash(grey)), 16)

    record = files.inspect_file(path, check)
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
        values, full = np.asarray(stored), 1.0 if stored.mode == "F" else 65535.0
        values = values[np.isfinite(values)]
        low, high = (float(values.min()) / full, float(values.max()) / full) if values.size else (0.0, 0.0)
        # Beyond the full range an image is scaled by its own.
        if low >= 0 and high <= 1 and (high - low) * 65535 >= BLANK and (high <= DARK or is_blank):
            detail = f"its values lie between {100 * low:.2g} % and {100 * high:.2g} % of the full range"
            return {"narrow range of values": detail}
    return {"blank": "one uniform colour" if is_blank else ""}


# Checks of files that aren't listed as images.

RAW = (".dng", ".nef", ".nrw", ".arw", ".sr2", ".pef", ".srw", ".cr2")  # cameras' own files, TIFF by their first bytes


def check_other_files(root: Path) -> Iterator[Finding]:
    """A finding for every file that isn't listed as an image."""
    for folder, names in files.walk(root, root, hidden=True):
        for name in sorted(names):
            file = Path(folder, name)
            path, extension = file.relative_to(root), file.suffix.lower()
            if any(part.startswith(".") for part in path.parts):
                yield Finding("hidden file", [path.as_posix()])
            elif extension not in files.IMAGE_EXTENSIONS:
                content = "" if extension in RAW else _extension_by_content(file)
                kind = "image without an image extension" if content else "not an image"
                yield Finding(kind, [path.as_posix()], f"{content} by its content" if content else extension)


def _extension_by_content(file: Path) -> str:
    """The extension that an image file should have; "" if Pillow sees no image in it."""
    if not file.is_file():  # opening a pipe would wait for ever
        return ""
    try:
        with open_image(file) as image:
            return f".{FORMATS[str(image.format)][0]}"
    except (ImageError, MemoryError):
        return ""


# Checks of a dataset.


class PlacedImage(NamedTuple):
    """An image with its split and its label; "" where it has none."""

    path: str
    split: str
    label: str


def check_copies(contents: Iterable[Sequence[PlacedImage]]) -> Iterator[Finding]:
    """Contents that several images have: in two splits, under two classes, or just twice."""
    for copies in contents:
        paths, splits = [image.path for image in copies], sorted({image.split for image in copies} - {""})
        is_conflict = len({image.label for image in copies} - {""}) > 1
        if len(splits) > 1:
            yield Finding("the same image in two splits", paths, f"in {' and '.join(splits)}")
        if is_conflict:
            yield Finding("the same image under two classes", paths)
        if len(copies) > 1 and len(splits) < 2 and not is_conflict:
            yield Finding("the same image twice", paths)


def check_balance(number: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    """Splits in which one class has many times the images of another; `number` counts images by split and class."""
    for split, by_class in number.items():
        filled = sorted((n, name) for name, n in by_class.items() if n)
        if filled and filled[-1][0] >= IMBALANCE * filled[0][0]:
            (least, rare), (most, common) = filled[0], filled[-1]
            yield Finding("class imbalance", [split], f"{most:,} images of {common}, {least:,} of {rare}")


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
    phashes = np.array([look.phash for look in looks], np.uint64)
    thumbnails = np.stack([look.thumbnail for look in looks])
    groups = np.arange(len(contents))
    links = join_alike(groups, correlations(phashes, thumbnails), MIN_CORRELATION, "correlation of thumbnails")
    if features_of:
        features = features_of([copies[0].path for copies in copies_of], [look.sha256 for look in looks])
        links += join_alike(groups, cosines(features.astype(np.float32)), cosine, "cosine of features")
    links_of = defaultdict(list)
    for link in links:
        links_of[groups[link.i]].append(link)
    for links in links_of.values():
        copies = [copies_of[i] for i in sorted({n for link in links for n in (link.i, link.j)})]
        detail = f"{min(links).measure} {min(links).similarity:.3f}"
        if classes := _differing([{image.label for image in same} for same in copies]):
            detail += f", in the classes {shortened(classes)}: perhaps a label is wrong"
        is_leak = _differing([{image.split for image in same} for same in copies])
        paths = sorted(same[0].path for same in copies)
        yield Finding("look-alikes in two splits" if is_leak else "look-alikes", paths, detail)


def _differing(values: Sequence[set[str]]) -> list[str]:
    """The splits, or the classes, of several contents, if different contents differ in them."""
    every = sorted(set().union(*values) - {""})
    return every if len(every) > 1 and sum(bool(value - {""}) for value in values) > 1 else []


class Link(NamedTuple):
    """Two images i < j that look alike, how much, and by which measure."""

    similarity: float
    measure: str
    i: int
    j: int


def join_alike(groups: np.ndarray, blocks: Iterable[np.ndarray], least: float, measure: str) -> list[Link]:
    """Joins the groups of images that look alike, and returns the links that do it.

    A pair gets no link if earlier links have joined its images already: N - 1 links join N images that all look the
    same, whatever the number of pairs.

    Args:
        groups: int [N], the group of each image; updated.
        blocks: similarities of the images of some rows with the image of the first of these rows and all later ones.
        least: similarity from which two images count as alike.
        measure: the name of the similarity.
    """
    links, start = [], 0
    for similarity in blocks:
        close = np.triu(similarity >= least, 1)
        for row in np.flatnonzero(close.any(1)).tolist():
            i, others = start + row, start + np.flatnonzero(close[row])
            others = others[groups[others] != groups[i]]
            joined, first = np.unique(groups[others], return_index=True)
            groups[np.isin(groups, joined)] = groups[i]
            for j in np.sort(others[first]).tolist():
                links.append(Link(float(similarity[row, j - start]), measure, i, j))
        start += len(similarity)
    return links


def correlations(phashes: np.ndarray, thumbnails: np.ndarray, *, block: int = 512) -> Iterator[np.ndarray]:
    """Correlations of thumbnails in blocks of rows, as `join_alike` takes them; 0 where perceptual hashes differ much.

    Args:
        phashes: uint64 [N].
        thumbnails: uint8 [N, 32, 32].
    """
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    unit = _unit_rows(flat - flat.mean(1, keepdims=True))
    for start in range(0, len(unit), block):
        close = np.triu(np.bitwise_count(phashes[start : start + block, None] ^ phashes[None, start:]) <= MAX_BITS, 1)
        # Most images resemble no other, so the products are computed for the rest only.
        rows, columns = np.flatnonzero(close.any(1)), np.flatnonzero(close.any(0))
        similarity = np.zeros(close.shape, np.float32)
        similarity[np.ix_(rows, columns)] = unit[start + rows] @ unit[start + columns].T
        yield np.where(close, similarity, 0)


def cosines(features: np.ndarray, *, block: int = 512) -> Iterator[np.ndarray]:
    """Cosines of features, float32 [N, F], in blocks of rows, as `join_alike` takes them."""
    unit = _unit_rows(features)
    for start in range(0, len(unit), block):
        yield unit[start : start + block] @ unit[start:].T


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
        """(split, class) of an image, "" where there is none; images that are not divided yet count as "train"."""
        *folders, _ = path.split("/")
        if folders and folders[0] in self.split_folders:
            split, folders = self.split_folders[folders[0]], folders[1:]
        elif self.is_divided:
            return "", ""
        else:
            split = "train"
        return split, folders[0] if folders and folders[0] in self.classes else ""

    def is_ignored(self, path: str) -> bool:
        """Whether training ignores an image; also False where the folders don't determine it."""
        split, label = self.place(path)
        return not self.table and (not split or (self.has_folder_labels and not label and split != "test"))


def find_layout(root: Path) -> Layout:
    """The folders of splits and classes in a folder."""
    folders = files.subfolders(root)
    split_folders = {name: SPLITS[name] for name in folders if name in SPLITS}
    labelled = [root / name for name, split in split_folders.items() if split != "test"]
    names = set(folders) - set(split_folders)
    if labelled:
        names = {name for top in labelled for name in files.subfolders(top)}
        split_folders |= {name: "test" for name in folders if name.lower().startswith("test")}  # as Kaggle's test1/
    return Layout(split_folders, tuple(sorted(names)), _table(root))


def _table(root: Path) -> str:
    """The first file in a folder that training could read labels of its images from, with the usual names of columns."""
    for file in sorted(p for p in root.iterdir() if p.suffix.lower() in TABLES and p.is_file()):
        with contextlib.suppress(UserError):
            rows, _ = read_table(root, str(file), {})
            if any((root / row.path).is_file() for row in rows[:100]):
                return file.name
    return ""


def _describe(number: Mapping[tuple[str, str], int], layout: Layout) -> str:
    """The splits and classes assigned to the images; `number` counts images by (split, class)."""
    classes_of = defaultdict(list)
    for (split, label), n in sorted(number.items()):
        classes_of[split or "elsewhere"].append(f"{label or 'no class'} {n:,}")
    parts = [f"{split}: {shortened(classes)}" for split, classes in classes_of.items()]
    if not layout.is_divided:
        parts.append("no train/ and valid/")
    if layout.table:
        parts.append(f"{layout.table} has labels too")
    return "; ".join(parts)


def check_class_folders(number: Mapping[tuple[str, str], int], layout: Layout, root: Path) -> Iterator[Finding]:
    """Class folders that are empty, alone, unequal or oddly named; `number` counts images by split and class."""
    classes, split_folders = layout.classes, layout.split_folders
    if not classes or layout.table:  # images without labels, or with others
        return
    tops = {name: split for name, split in split_folders.items() if split != "test"} or {".": "train"}
    for name, split in split_folders.items():
        # A test folder with other subfolders, such as Kaggle's test/test, holds images without labels.
        if split == "test" and set() < set(files.subfolders(root / name)) <= set(classes):
            tops[name] = split
    folders = {c: [Path(top, c).as_posix() for top in tops if (root / top / c).is_dir()] for c in classes}
    if len(classes) == 1 and not any(number[split, ""] for split in tops.values()):
        yield Finding("only one class", folders[classes[0]])
    for c in classes:
        if c.casefold() in ("training", "testing", *SPLITS):
            yield Finding("class named like a split", folders[c])
    for top, split in tops.items():
        # If only the spelling of the class differs in this split, training reports that.
        present = {normalized_name(c) for c in classes if number[split, c]}
        for c in classes:
            if normalized_name(c) not in present:
                yield Finding("class without images", [Path(top, c).as_posix()])
    yield from check_balance({top: {c: number[split, c] for c in classes} for top, split in tops.items()})


def check_training(ignored: Sequence[str], layout: Layout, root: Path) -> Iterator[Finding]:
    """What training's own code would refuse, and the images it would ignore, where the labels come from folders."""
    if not layout.has_folder_labels:
        return
    try:
        labelled = find_labels(root, "folders", columns={})
    except UserError as error:
        yield Finding("not laid out for training", ["."], str(error).removeprefix(f"{root}: "))
        return
    by_folder = defaultdict(list)
    for path in ignored:
        by_folder[path.split("/")[0] if "/" in path else "the folder itself"].append(path)
    for folder, inside in by_folder.items():
        yield Finding("ignored by training", inside, f"{len(inside):,} in {folder}")
    names = set(files.subfolders(root / "test")) if "test" in layout.split_folders else set()
    if names & set(labelled.classes) and not any(row.split == "test" for row in labelled.rows):
        detail = f"it has {shortened(sorted(names))}; train has {shortened(labelled.classes)}"
        yield Finding("test folder not used", ["test"], detail)
