"""Splits: which images are held out, by themselves or in groups, and that none ever changes its split."""

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


def test_an_image_of_two_subjects_keeps_both_together(subjects, encoded):
    for s in range(9):  # a chain: 0-1-2-...-9
        content = encoded(5000 + s)
        (subjects / f"cats/s{s}_pair.jpg").write_bytes(content)
        (subjects / f"cats/s{s + 1}_riap.jpg").write_bytes(content)
    with pytest.raises(UserError, match="class cats: 58 images, but only 1 group"):
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
        ({"valid_fraction": 0.2, "group": "(?P<group>s)"}, "only 1 group"),
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
        with pytest.raises(UserError, match="has a valid split already"):
            scan(subjects, **how)


# Without groups.


@pytest.fixture
def pile(folder):
    """A single folder of class folders: 20 cats, 10 dogs."""
    names = [f"cats/c{i:02d}.jpg" for i in range(20)] + [f"dogs/d{i:02d}.jpg" for i in range(10)]
    return folder({name: seed for seed, name in enumerate(names)})


def forget():
    for path in (cache_folder() / "splits").glob("*"):
        path.unlink()


def test_the_split_is_stratified_and_covers_everything_once(pile):
    index = scan(pile, valid_fraction=0.2)
    train, valid = index.splits["train"], index.splits["valid"]
    assert [(valid.labels == label).sum() for label in (0, 1)] == [4, 2]
    assert len(train) + len(valid) == 30
    assert not set(train.paths) & set(valid.paths)
    assert train.paths == tuple(sorted(train.paths))


def test_train_alone_can_be_split(pile):
    (pile / "train").mkdir()
    for name in ("cats", "dogs"):
        (pile / name).rename(pile / "train" / name)
    assert len(scan(pile, valid_fraction=0.2).splits["valid"]) == 6


def test_seeds_differ_and_repeat_without_the_manifest(pile):
    first = sides(scan(pile, valid_fraction=0.3, seed=0))
    forget()
    assert sides(scan(pile, valid_fraction=0.3, seed=0)) == first
    assert sides(scan(pile, valid_fraction=0.3, seed=1)) != first


def test_names_and_places_dont_matter(pile, tmp_path):
    first = sides(scan(pile, valid_fraction=0.3))
    for i, path in enumerate(sorted((pile / "cats").iterdir())):
        path.rename(path.with_name(f"z{97 * i % 20:02d}.jpg"))
    pile = pile.rename(tmp_path / "elsewhere")
    assert sides(scan(pile, valid_fraction=0.3)) == first


def test_old_images_keep_their_side_when_others_come_and_go(pile, encoded):
    first = sides(scan(pile, valid_fraction=0.2))
    for seed in range(100, 140):
        (pile / "cats" / f"a{seed}.jpg").write_bytes(encoded(seed))
    (pile / "cats/c03.jpg").unlink()
    second = sides(scan(pile, valid_fraction=0.2))
    assert {content: second[content] for content in first if content in second} == {
        content: side for content, side in first.items() if content in second
    }
    assert len(second) == 69
    assert abs(sum(side == "valid" for side in second.values()) - 0.2 * 69) <= 1
    # Without this, an image that returns could have changed sides in between.
    (pile / "cats/c03.jpg").write_bytes(encoded(3))
    third = sides(scan(pile, valid_fraction=0.2))
    assert {content: third[content] for content in first} == first


def test_copies_share_a_side(pile):
    for i in range(20):
        content = (pile / f"cats/c{i:02d}.jpg").read_bytes()
        (pile / f"cats/copy{i:02d}.jpg").write_bytes(content)
        (pile / f"dogs/cat{i:02d}.jpg").write_bytes(content)
    index = scan(pile, valid_fraction=0.25)
    assert not set(index.splits["train"].hashes) & set(index.splits["valid"].hashes)
    assert len(index.splits["train"]) + len(index.splits["valid"]) == 70


def test_each_class_is_on_both_sides_however_small_the_fraction(folder):
    root = folder({"cats/a.jpg": 1, "cats/b.jpg": 2, "dogs/c.jpg": 3, "dogs/d.jpg": 4})
    for fraction in (0.01, 0.99):
        index = scan(root, valid_fraction=fraction)
        assert [split.labels.tolist() for split in index.splits.values()] == [[0, 1], [0, 1]]


def test_a_manifest_of_the_users_own(pile, tmp_path):
    place = tmp_path / "splits/mine.json"
    first = sides(scan(pile, valid_fraction=0.2, manifest=place))
    assert json.loads(place.read_text())["sides"] == first
    written = place.read_bytes()
    assert sides(scan(pile, valid_fraction=0.2, manifest=place)) == first
    assert place.read_bytes() == written
    with pytest.raises(
        UserError, match=r"mine\.json was made with valid_fraction 0\.2 and seed 0, not valid_fraction 0\.3"
    ):
        scan(pile, valid_fraction=0.3, manifest=place)


def test_a_damaged_manifest_is_an_error_if_it_is_the_users_and_a_warning_if_not(pile, tmp_path, capsys):
    place = tmp_path / "mine.json"
    place.write_text('{"fraction": 0.2')
    with pytest.raises(UserError, match=r"mine\.json can't be read .*remove it to split afresh"):
        scan(pile, valid_fraction=0.2, manifest=place)
    first = sides(scan(pile, valid_fraction=0.2))
    (ours,) = (cache_folder() / "splits").glob("*.json")
    ours.write_text("")
    assert sides(scan(pile, valid_fraction=0.2)) == first
    assert "split afresh" in capsys.readouterr().err


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 20])
def test_impossible_fractions(pile, fraction):
    with pytest.raises(UserError, match=r"valid_fraction: .* is not between 0 and 1"):
        scan(pile, valid_fraction=fraction)


def test_a_class_of_one_image_cant_be_split(folder, encoded):
    root = folder({"cats/a.jpg": 1, "cats/b.jpg": 2, "dogs/c.jpg": 3, "dogs/copy.jpg": 3})
    with pytest.raises(UserError, match="class dogs: 2 images, but only 1 distinct"):
        scan(root, valid_fraction=0.5)
