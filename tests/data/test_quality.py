"""What is said of a folder before training: copies, leaks, conflicts, unequal classes, bad files."""

import shutil
import time

import numpy as np
import pytest
from folders import write_images

from jaxcats.data.index import FolderIndex, Split, scan
from jaxcats.data.quality import FEW, counts, findings

LEAK, CONFLICT = "the same image in two splits", "the same image under two classes"


def found(root) -> dict[str, dict]:
    return {f["what"]: f for f in findings(scan(root))}


@pytest.fixture
def large(tmp_path):
    return write_images(tmp_path / "large", train=70, valid=2 * FEW, size=(12, 10))


def test_a_clean_folder_has_no_findings(large):
    index = scan(large)
    assert findings(index) == []
    assert counts(index) == {"train": {"cats": 35, "dogs": 35}, "valid": {"cats": FEW, "dogs": FEW}}


def test_copies_are_told_apart_by_where_they_are(large):
    shutil.copy(large / "train/cats/cats.0.jpg", large / "valid/cats/leak.jpg")
    shutil.copy(large / "train/cats/cats.1.jpg", large / "train/dogs/conflict.jpg")
    shutil.copy(large / "valid/dogs/dogs.2.jpg", large / "valid/dogs/again.jpg")
    shutil.copy(large / "valid/dogs/dogs.2.jpg", large / "valid/dogs/thrice.jpg")
    (large / "train/cats/broken.jpg").write_bytes(b"no image")
    seen = found(large)
    assert list(seen) == [LEAK, CONFLICT, "file left out", "the same image twice"]
    leak, conflict, bad, twice = seen.values()
    assert leak["examples"] == ["train/cats/cats.0.jpg = valid/cats/leak.jpg: in train and valid"]
    assert conflict["examples"] == ["train/cats/cats.1.jpg = train/dogs/conflict.jpg"]
    assert bad["examples"][0].startswith("train/cats/broken.jpg: ")
    assert twice["examples"] == ["valid/dogs/again.jpg = valid/dogs/dogs.2.jpg = valid/dogs/thrice.jpg"]
    assert [f["grave"] for f in seen.values()] == [True, True, False, False]
    assert all(f["count"] == 1 and f["meaning"] for f in seen.values())


def test_a_leak_across_classes_is_both(large):
    shutil.copy(large / "train/cats/cats.0.jpg", large / "valid/dogs/both.jpg")
    assert {LEAK, CONFLICT} == set(found(large))


def test_many_leaks_take_no_longer_each(tmp_path):
    n = 10_000
    hashes = tuple(str(i) for i in range(n))
    splits = {
        name: Split(tmp_path, tuple(f"{name}/{i}" for i in range(n)), np.zeros(n, np.int32), hashes)
        for name in ("train", "valid")
    }
    index = FolderIndex(tmp_path, ("cats", "dogs"), splits, (), 0.0, 0)
    started = time.perf_counter()
    assert findings(index)[0]["count"] == n
    assert time.perf_counter() - started < 2  # comparing each with each took four seconds


def test_unequal_and_small_classes(large):
    for path in sorted((large / "train/dogs").iterdir())[10:]:
        path.unlink()
    for path in sorted((large / "valid/cats").iterdir())[5:]:
        path.unlink()
    seen = found(large)
    assert seen["class imbalance"]["examples"] == [
        "train: 35 images of cats, 10 of dogs",
        "valid: 30 images of dogs, 5 of cats",
    ]
    assert seen["few validation images"]["examples"] == ["cats: 5"]
