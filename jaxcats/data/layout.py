"""What a folder of pictures must look like, and what is said where it doesn't."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from jaxcats.data.files import IMAGE_EXTENSIONS, list_pictures
from jaxcats.errors import UserError

VALID_NAMES = ("valid", "val", "validation")


def existing_folder(folder: str | Path) -> Path:
    """The folder with links resolved; UserError where there is none."""
    path = Path(os.path.expanduser(folder))
    if not path.exists():
        raise UserError(f"{path}: no such folder; give the folder that holds the pictures")
    if not path.is_dir():
        raise UserError(f"{path}: not a folder; give the folder that holds the pictures")
    return path.resolve()


def split_folders(root: Path, valid_fraction: float | None) -> tuple[Path, Path | None]:
    """The folder of training classes, and that of validation classes if there is one."""
    if valid_fraction is not None and not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction: {valid_fraction} is not between 0 and 1; 0.2 holds out a fifth")
    train, valid = root / "train", valid_folder(root)
    if train.is_dir() and valid is not None:
        if valid_fraction is not None:
            raise UserError(
                f"valid_fraction: {valid_fraction} given, but {root} has its own {valid.name}/; leave valid_fraction "
                f"out, or give {train} as the folder"
            )
        return train, valid
    if valid_fraction is not None and valid is None:
        return (train if train.is_dir() else root), None
    names = [name + "/" for name in subfolders(root)]
    found = shortened(names) if names else "no folders"
    raise UserError(
        f"{root}: found {found}, looked for train/ and valid/ (or val/, validation/) with a folder per class in each; "
        "for a single folder of class folders set valid_fraction, for example 0.2"
    )


def valid_folder(root: Path) -> Path | None:
    """`valid/`, `val/` or `validation/`, whichever there is; two of them are an error."""
    present = [root / name for name in VALID_NAMES if (root / name).is_dir()]
    if len(present) > 1:
        raise UserError(f"{root}: both {present[0].name}/ and {present[1].name}/ exist; keep one of them")
    return present[0] if present else None


def test_folder(root: Path) -> Path | None:
    """`test/`, where there is one."""
    return root / "test" if (root / "test").is_dir() else None


def subfolders(folder: Path) -> list[str]:
    """The names of the folders inside that aren't hidden, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the folders inside, sorted: the classes in label order."""
    names = tuple(subfolders(folder))
    if not names:
        loose = len(list_pictures(folder, folder))
        found = f"{loose:,} pictures but no class folders" if loose else "no pictures"
        raise UserError(f"{folder}: {found}; expected a folder of pictures per class, for example cats/ and dogs/")
    return names


def check_classes(
    folder: Path, found: Sequence[str], expected: Sequence[str], *, against: str, what: str = "class folders"
) -> None:
    """Raise UserError, saying how, where the two sets of names differ."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [f"missing {shortened(missing)}"] * bool(missing) + [f"unknown {shortened(extra)}"] * bool(extra)
        spelt = [(a, b) for a in missing for b in extra if letters(a) == letters(b)]
        if spelt:
            a, b = map(ascii, spelt[0])
            raise UserError(
                f"{folder}: {b} there is {a} in {against}: they differ in capitals, spaces, or how an accent is "
                f"encoded; rename one."
            )
        raise UserError(
            f"{folder}: its {what} differ from those of {against}: {', '.join(parts)}; "
            f"expected exactly {shortened(expected)}"
        )


def letters(name: str) -> str:
    """What two names have in common that differ in capitals, spaces around them, or how an accent is encoded."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def class_files(root: Path, folder: Path, classes: Sequence[str]) -> list[list[str]]:
    """The pictures of each class, relative to `root`; a class without any is an error."""
    members = [list_pictures(folder / name, root) for name in classes]
    if not any(members):
        raise UserError(f"{folder}: no pictures in its {len(classes)} class folders; looked for {extensions()}")
    for name, paths in zip(classes, members, strict=True):
        if not paths:
            raise UserError(
                f"{folder / name}: no pictures in this class folder; add some, or remove the folder if it is no class "
                f"(looked for {extensions()})"
            )
    return members


def shortened(names: Sequence[str], most: int = 8) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def extensions() -> str:
    """What counts as a picture, for messages."""
    return " ".join(sorted(IMAGE_EXTENSIONS))
