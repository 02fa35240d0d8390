"""One look at each file of any folder, for what may be wrong with it: `examine_folder` finds, doctor prints."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.data.duplicates import alike_features, group_of, near_links
from jaxcats.data.files import list_pictures
from jaxcats.data.findings import IMBALANCE
from jaxcats.data.labels import find_labels
from jaxcats.data.layout import check_classes, extensions, letters, shortened, subfolders
from jaxcats.data.look import NAMELESS, Look, look, other_files
from jaxcats.data.table import SPLITS, TABLES, read_table
from jaxcats.errors import UserError

Features = Callable[[Sequence[str], Sequence[str]], np.ndarray]
SPELT = "one class spelt in two ways"
LIKE_SPLITS = ("training", "testing", *SPLITS)
Found = dict[str, list[dict[str, Any]]]


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
        """Whether the labels seem to come from folders: a single one may lie among pictures that are labelled by name."""
        return len(self.classes) > 1 and not self.table

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

    def unseen(self, path: str) -> str:
        """Where a picture is that training doesn't see; "" for others, and where the folders don't tell."""
        split, name = self.place(path)
        if self.table:
            return ""
        if split not in SPLITS.values():
            return "outside train, valid and test"
        return "in no class folder" if self.by_folders and not name and split != "test" else ""

    def outside(self, paths: Sequence[str]) -> str:
        """What to say of those of the pictures that training doesn't see; "" for nothing."""
        said = [
            f"{path} is {why}: training does not see it{', but a test on it would flatter' * self.to_test_on(path)}"
            for path in paths
            if (why := self.unseen(path))
        ]
        return shortened(said, 3)

    def to_test_on(self, path: str) -> bool:
        """Whether a picture is in a folder beside train and valid that is named like one to test on."""
        return self.place(path)[0].endswith("/")


def find_layout(root: Path) -> Layout:
    """The folders of splits and classes in a folder."""
    there = subfolders(root)
    tops = {name: SPLITS[name] for name in there if name in SPLITS}
    labelled = [root / name for name, split in tops.items() if split != "test"]
    names = [name for top in labelled for name in subfolders(top)] if labelled else [n for n in there if n not in tops]
    return Layout(tops, tuple(sorted(set(names))), _table(root))


def _table(root: Path) -> str:
    """The first file in a folder that training could read labels of its pictures from, with the usual names of columns."""
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
) -> tuple[int, str, Found]:
    """How many pictures there are, what they were taken for, and what was found: kind -> items {"paths", "detail"}.

    Args:
        features_of: from paths and content hashes to features [N, F]: pairs of pictures with a cosine of at least
            `cosine` are found as well.
        workers: decoding threads; None is one per core.
    """
    from tqdm import tqdm

    found: Found = defaultdict(list)
    paths, layout = list_pictures(root, root), find_layout(root)
    for kind, path, detail in other_files(root):
        found[kind].append({"paths": [path], "detail": detail})
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
    _alike(found, [s for p, s in good if not s.even and same[s.sha256][0] == p], same, layout, features_of, cosine)
    seen = [p for p, _ in good]
    counts = Counter(layout.place(p) for p in seen)
    _classes(found, counts, layout, root)
    _training(found, seen, layout, root)
    return len(paths), _understood(counts, layout), found


def _understood(counts: Mapping[tuple[str, str], int], layout: Layout) -> str:
    """The splits and classes that the pictures were taken for."""
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
        said.append(f"{top}: {shortened(numbers + loose) or 'no pictures'}")
    said += [f"{split[:-1]}: {n:,} without labels" for (split, _), n in sorted(counts.items()) if split.endswith("/")]
    said += ["no train/ and valid/"] * (not layout.divided)
    return "; ".join(said + [f"{layout.table} has labels too"] * bool(layout.table))


def _crossing(contents: Sequence[Sequence[str]], layout: Layout) -> tuple[list[str], list[str]]:
    """The splits and the classes that pictures are in, where different contents, each with its copies, differ in them."""

    def across(n: int) -> list[str]:
        of = [{layout.place(p)[n] for p in copies} - {""} for copies in contents]
        every = sorted(set().union(*of))
        return every if len(every) > 1 and sum(map(bool, of)) > 1 else []

    return across(0), across(1)


def _same(found: Found, same: Mapping[str, list[str]], layout: Layout) -> None:
    for copies in same.values():
        if len(copies) > 1:
            splits, classes = _crossing([[path] for path in copies], layout)
            once = (
                "copy that training does not see" if sum(not layout.unseen(p) for p in copies) < 2 else "the same twice"
            )
            for kind in ["leak"] * bool(splits) + ["label conflict"] * bool(classes) or [once]:
                found[kind].append({"paths": copies, "detail": layout.outside(copies)})


def _alike(
    found: Found,
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


def _classes(found: Found, counts: Mapping[tuple[str, str], int], layout: Layout, root: Path) -> None:
    classes = layout.classes
    if not classes or layout.table:  # pictures without labels, or with others
        return
    tops = {name: split for name, split in layout.tops.items() if split != "test"} if layout.divided else {".": "train"}
    # A test folder with others, as Kaggle's test/test, holds pictures without labels.
    tops |= {n: s for n, s in layout.tops.items() if s == "test" and set() < set(subfolders(root / n)) <= set(classes)}
    folders = {c: [Path(top, c).as_posix() for top in tops if (root / top / c).is_dir()] for c in classes}
    if len(classes) == 1 and not any(n for (split, name), n in counts.items() if split in tops.values() and not name):
        found["one class only"].append({"paths": folders[classes[0]], "detail": ""})
    found["class named like a split"] += [
        {"paths": folders[c], "detail": ""} for c in classes if c.casefold() in LIKE_SPLITS
    ]
    spelt = defaultdict(list)
    for c in classes:
        spelt[letters(c)].append(c)
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
        found["class without pictures"] += [
            {"paths": [Path(top, c).as_posix()], "detail": ""} for c, n in numbers.items() if not n and c not in twins
        ]
        if filled and max(filled.values()) >= IMBALANCE * min(filled.values()):
            detail = ", ".join(f"{c}: {n:,}" for c, n in filled.items())
            found["unequal classes"].append({"paths": [top], "detail": detail})


def _training(found: Found, paths: Sequence[str], layout: Layout, root: Path) -> None:
    """What training would make of the folder, by its own code, where the labels come from folders."""
    if not layout.by_folders:
        return
    whole = {"train", "valid"} <= set(layout.tops.values())
    try:
        labelled = find_labels(root, "folders", valid_fraction=None if whole else 0.2, columns={})
    except UserError as error:
        said = str(error).removeprefix(f"{root}: ")
        # What it says of a folder inside is said already, of every class.
        if said != str(error) or not (found["class without pictures"] or found[SPELT]):
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
