"""Test splits and groups: who is held out, and that nobody ever changes sides."""

import json

import pytest

from jaxcats.common.errors import UserError
from jaxcats.data.index import cache_folder, scan
from jaxcats.data.quality import counts, findings

SUBJECT = r"/s(?P<group>\d+)_"


def every(index):
    return index.splits | {"test": index.test}


def sides(index):
    return {content: name for name, split in every(index).items() if split for content in split.hashes}


@pytest.fixture
def subjects(folder):
    """Forty images of ten subjects in each of two classes."""
    names = [
        f"{kind}/s{s}_{i}.jpg"
        for k, kind in enumerate(("cats", "dogs"))
        for s in range(10 * k, 10 * k + 10)
        for i in range(4)
    ]
    return folder({name: seed for seed, name in enumerate(names)})


def groups_of(index):
    found = {}
    for name, split in every(index).items():
        for path in split.paths if split else ():
            found.setdefault(path.split("/s")[1].split("_")[0], set()).add(name)
    return found


def test_three_ways_stratified_and_the_validation_images_of_two(subjects):
    two = scan(subjects, valid_fraction=0.2)
    three = scan(subjects, valid_fraction=0.2, test_fraction=0.1)
    assert two.test is None
    assert counts(three) == {
        "train": {"cats": 28, "dogs": 28},
        "valid": {"cats": 8, "dogs": 8},
        "test": {"cats": 4, "dogs": 4},
    }
    assert three.splits["valid"].paths == two.splits["valid"].paths
    assert list(three.splits) == ["train", "valid"]  # what training is given


def test_a_subject_is_on_one_side(subjects):
    index = scan(subjects, valid_fraction=0.2, test_fraction=0.2, group=SUBJECT)
    assert all(len(where) == 1 for where in groups_of(index).values())
    assert counts(index)["valid"] == {"cats": 8, "dogs": 8} == counts(index)["test"]
    without = scan(subjects, valid_fraction=0.2, test_fraction=0.2)
    assert any(len(where) > 1 for where in groups_of(without).values())


def test_later_images_of_a_known_subject_join_it_and_old_ones_stay(subjects, encoded):
    how = {"valid_fraction": 0.2, "test_fraction": 0.1, "group": SUBJECT}
    first = scan(subjects, **how)
    before, where = sides(first), groups_of(first)
    for s in range(25):
        for i in range(3):
            (subjects / ("cats" if s < 10 or s > 19 else "dogs") / f"s{s}_new{i}.jpg").write_bytes(
                encoded(1000 + 10 * s + i)
            )
    (subjects / "cats/s0_0.jpg").unlink()
    later = scan(subjects, **how)
    assert all(sides(later)[content] == side for content, side in before.items() if content in sides(later))
    assert all(groups_of(later)[subject] == known for subject, known in where.items())
    assert all(len(found) == 1 for found in groups_of(later).values())
    assert len(sides(later)) == 80 - 1 + 75


def test_renamed_images_keep_their_side(subjects, tmp_path):
    how = {"valid_fraction": 0.2, "test_fraction": 0.1, "group": SUBJECT}
    first = sides(scan(subjects, **how))
    for number, path in enumerate(sorted(subjects.glob("*/*.jpg"))):
        path.rename(path.with_name(f"s{number}_x.jpg"))
    assert sides(scan(subjects, **how)) == first


def test_a_image_of_two_subjects_keeps_both_together(subjects, encoded):
    for s in range(9):  # a chain: 0-1-2-...-9
        content = encoded(5000 + s)
        (subjects / f"cats/s{s}_pair.jpg").write_bytes(content)
        (subjects / f"cats/s{s + 1}_riap.jpg").write_bytes(content)
    with pytest.raises(UserError, match="class cats: 58 images, but only one group"):
        scan(subjects, valid_fraction=0.2, group=SUBJECT)


def test_a_column_of_the_table_groups(subjects):
    lines = ["path,label,animal"]
    lines += [
        f"{p.relative_to(subjects)},{p.parent.name},{p.name.split('_')[0]}" for p in sorted(subjects.glob("*/*.jpg"))
    ]
    (subjects / "labels.csv").write_text("\n".join(lines))
    index = scan(subjects, labels="labels.csv", group="animal", valid_fraction=0.2)
    assert all(len(where) == 1 for where in groups_of(index).values())
    assert len(index.splits["valid"]) == 16
    with pytest.raises(UserError, match=r"has no column 'animals'.*Did you mean 'animal'.*data.group"):
        scan(subjects, labels="labels.csv", group="animals", valid_fraction=0.2)


def test_the_manifest_remembers_and_refuses_another_rule(subjects, tmp_path):
    place = tmp_path / "split.json"
    how = {"valid_fraction": 0.2, "manifest": place, "group": SUBJECT}
    first = sides(scan(subjects, **how))
    saved = json.loads(place.read_text())
    assert saved["sides"] == first
    assert len(saved["groups"]) == 20
    with pytest.raises(UserError, match=r"made with valid_fraction 0.2 and seed 0 and group .*, not"):
        scan(subjects, valid_fraction=0.2, manifest=place)


def test_a_default_manifest_is_per_rule(subjects):
    scan(subjects, valid_fraction=0.2)
    scan(subjects, valid_fraction=0.2, test_fraction=0.1)
    scan(subjects, valid_fraction=0.2, group=SUBJECT)
    assert len(list((cache_folder() / "splits").glob("*.json"))) == 3


def test_a_test_folder_with_the_classes_is_a_test_split(folder):
    names = [
        f"{part}/{kind}/{i}.jpg" for part in ("train", "valid", "test") for kind in ("cats", "dogs") for i in range(2)
    ]
    root = folder({name: seed for seed, name in enumerate(names)})
    assert len(scan(root).test) == 4
    (root / "test/more").mkdir()
    assert scan(root).test is None  # other folders than the classes: images without labels


def test_the_same_image_in_test_and_train_is_a_finding(folder):
    names = [
        f"{part}/{kind}/{i}.jpg" for part in ("train", "valid", "test") for kind in ("cats", "dogs") for i in range(2)
    ]
    files = {name: seed for seed, name in enumerate(names)} | {"test/cats/0.jpg": 0}
    (grave,) = [f for f in findings(scan(folder(files))) if f["grave"]]
    assert grave["what"] == "the same image in two splits"
    assert grave["examples"] == ["train/cats/0.jpg = test/cats/0.jpg: in test and train"]


def test_what_cannot_be_held_out_is_said(subjects):
    for how, words in (
        ({"valid_fraction": 0.6, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"valid_fraction": 0.2, "group": "(?P<group>nobody)"}, "no image is in a group"),
        ({"valid_fraction": 0.2, "group": "(?P<group>s)"}, "only one group"),
    ):
        with pytest.raises(UserError, match=words):
            scan(subjects, **how)
    for part in ("train", "valid"):
        (subjects / part).mkdir()
    for kind in ("cats", "dogs"):
        (subjects / kind).rename(subjects / "train" / kind)
        (subjects / "valid" / kind).mkdir()
        (subjects / "train" / kind / f"s{9 if kind == 'cats' else 19}_0.jpg").rename(
            subjects / "valid" / kind / "v.jpg"
        )
    for how in ({"test_fraction": 0.1}, {"group": SUBJECT}):
        with pytest.raises(UserError, match="has its own validation images"):
            scan(subjects, **how)
