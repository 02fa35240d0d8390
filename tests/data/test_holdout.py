import json

import pytest

from jaxcats.common.errors import UserError
from jaxcats.data.index import cache_folder, scan


@pytest.fixture
def pile(folder):
    """A single folder of class folders: 20 cats, 10 dogs."""
    names = [f"cats/c{i:02d}.jpg" for i in range(20)] + [f"dogs/d{i:02d}.jpg" for i in range(10)]
    return folder({name: seed for seed, name in enumerate(names)})


def sides(index):
    return {content: name for name, split in index.splits.items() for content in split.hashes}


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
    with pytest.raises(UserError, match="class dogs: 2 images, but only one distinct"):
        scan(root, valid_fraction=0.5)
