"""Labels and splits where users slip: strange names and paths, what counts as bad, half-made test folders, old manifests."""

import csv
import io
import json
import shutil
import sys
import unicodedata

import pytest

from jaxcats.common.errors import UserError
from jaxcats.data.index import scan

NAME = r"^(?P<label>cat|dog)\."


@pytest.fixture
def heap(folder):
    """Ten cats and ten dogs in one folder, named as Kaggle names them."""
    names = [f"{kind}.{i}.jpg" for kind in ("cat", "dog") for i in range(10)]
    return folder({name: seed for seed, name in enumerate(names)})


def names_of(root):
    return sorted(path.name for path in root.glob("*.jpg"))


def table(root, rows):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("path", "label"), *rows])
    (root / "labels.csv").write_text(out.getvalue(), encoding="utf-8", newline="")
    return "labels.csv"


def sides(index):
    every = [*index.splits.items(), *([("test", index.test)] if index.test else [])]
    return {content: name for name, split in every for content in split.hashes}


def test_an_image_without_a_label_is_as_bad_as_one_that_is_broken(heap, encoded):
    (heap / "catalogue.jpg").write_bytes(encoded(99))
    (heap / "dog.9.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2 of 21 images can't be used: catalogue\.jpg .*; dog\.9\.jpg"):
        scan(heap, labels=NAME, valid_fraction=0.2, on_bad_file="fail")
    rows = [(name, name[:3]) for name in names_of(heap) if name != "catalogue.jpg"]
    with pytest.raises(UserError, match=r"2 of 21 images can't be used: \.\./out\.jpg \(lies outside the folder\)"):
        scan(heap, labels=table(heap, [*rows, ("../out.jpg", "cat")]), valid_fraction=0.2, on_bad_file="fail")


def test_whole_paths_with_and_without_a_link_in_them(heap, tmp_path):
    (tmp_path / "link").symlink_to(heap, target_is_directory=True)
    rows = [((tmp_path / "link" if i % 2 else heap) / name, name[:3]) for i, name in enumerate(names_of(heap))]
    index = scan(tmp_path / "link", labels=table(heap, rows), valid_fraction=0.2)
    assert (len(sides(index)), index.bad) == (20, ())


def test_names_with_commas_quotes_line_breaks_and_letters_of_all_kinds(heap):
    strange = ["a,b.jpg", 'say "cat".jpg', "two\nlines.jpg", "Kätzchen 猫.jpg", " space.jpg"]
    for old, new in zip(names_of(heap), strange, strict=False):
        (heap / old).rename(heap / new)
    index = scan(
        heap, labels=table(heap, [(n, "dog" if n[:3] == "dog" else "cat") for n in names_of(heap)]), valid_fraction=0.2
    )
    found = {path for split in index.splits.values() for path in split.paths}
    assert set(strange) - {" space.jpg"} <= found
    assert [b.path for b in index.bad] == ["space.jpg"]  # spaces around a cell are none of its name


def test_utf16_without_its_mark(heap):
    (heap / "labels.csv").write_bytes("path,label\ncat.0.jpg,cat\n".encode("utf-16-le"))
    with pytest.raises(UserError, match="has no column 'path'"):
        scan(heap, labels="labels.csv", valid_fraction=0.2)


def test_parquet_beside_a_column_of_whole_images(heap):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = names_of(heap)
    columns = {"image": [(heap / n).read_bytes() for n in names], "path": names, "label": [int(n < "d") for n in names]}
    pq.write_table(pa.table(columns), heap / "labels.parquet")
    index = scan(heap, labels="labels.parquet", valid_fraction=0.2)
    assert (index.classes, len(sides(index))) == (("0", "1"), 20)
    with pytest.raises(UserError, match="no column 'file'; it has image, path, label"):
        scan(heap, labels="labels.parquet", columns={"path": "file"}, valid_fraction=0.2)


def test_parquet_without_pyarrow_says_what_to_install(heap, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (heap / "labels.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r'pip install "jaxcats\[parquet\]", or save it as CSV'):
        scan(heap, labels="labels.parquet", valid_fraction=0.2)


def test_one_split_whatever_gives_the_labels(heap, tmp_path):
    how = {"valid_fraction": 0.2, "test_fraction": 0.2}
    first = sides(scan(heap, labels=NAME, **how))
    assert sides(scan(heap, labels=table(heap, [(n, n[:3]) for n in reversed(names_of(heap))]), **how)) == first
    for name in names_of(heap):
        place = tmp_path / "tree" / name[:3]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(heap / name, place / name)
    assert sides(scan(tmp_path / "tree", **how)) == first
    (tmp_path / "deep").mkdir()
    (tmp_path / "tree").rename(tmp_path / "deep/2018")
    assert sides(scan(tmp_path / "deep", labels="parent", **how)) == first


def test_a_manifest_from_before_test_splits_and_groups_is_obeyed(heap, tmp_path):
    place = tmp_path / "old.json"
    how = {"labels": NAME, "valid_fraction": 0.5, "manifest": place}
    first = sides(scan(heap, **how))
    assert json.loads(place.read_text()) == {"version": 1, "fraction": 0.5, "seed": 0, "sides": first}
    other = {content: {"train": "valid", "valid": "train"}[side] for content, side in first.items()}
    place.write_text(json.dumps({"version": 1, "fraction": 0.5, "seed": 0, "sides": other}), encoding="utf-8")
    assert sides(scan(heap, **how)) == other


def test_a_test_folder_that_is_still_empty_is_none(two_classes, encoded):
    for name in ("cats", "dogs"):
        (two_classes / "test" / name).mkdir(parents=True)
    assert scan(two_classes).test is None
    for kind in ("cats", "dogs"):
        (two_classes / f"test/{kind}/1.jpg").write_bytes(encoded(len(kind) + ord(kind[0])))
    assert scan(two_classes).test.paths == ("test/cats/1.jpg", "test/dogs/1.jpg")


@pytest.mark.parametrize("name", ["test1/1.jpg", "test/1.jpg", "test/unknown/1.jpg", "test/cats/1.jpg"])
def test_other_test_folders_are_left_alone(two_classes, encoded, name):
    (two_classes / name).parent.mkdir(parents=True)
    (two_classes / name).write_bytes(encoded(50))
    index = scan(two_classes)
    assert (index.test, index.bad) == (None, ())


def test_groups_made_too_late_are_said(heap, capsys, tmp_path):
    how = {
        "labels": NAME,
        "valid_fraction": 0.3,
        "group": r"^...\.(?P<group>\w+)\.",
        "manifest": tmp_path / "split.json",
    }
    first = sides(scan(heap, **how))
    assert "warning" not in capsys.readouterr().err
    for kind in ("cat", "dog"):
        for i in range(10):  # nine of a kind turn out to be the same animal
            (heap / f"{kind}.{i}.jpg").rename(heap / f"{kind}.{kind * (i > 0) or 'other'}.{i}.jpg")
    assert sides(scan(heap, **how)) == first  # old images never change sides
    assert "2 groups have images in several splits, for example cat: they were split before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "apart"),
    [
        ("folders", "test"),
        *[(kind, name) for kind in ("parent", r"(?P<label>cat|dog)s/") for name in ("test", "valid", "val")],
    ],
)
def test_a_folder_set_apart_is_not_trained_on_for_want_of_a_train_folder(folder, labels, apart):
    names = [f"{top}{kind}s/{i}.jpg" for top in ("", f"{apart}/") for kind in ("cat", "dog") for i in range(4)]
    root = folder({name: seed for seed, name in enumerate(names)})
    with pytest.raises(UserError, match=f"has {apart}/ but no train/"):
        scan(root, labels=labels, valid_fraction=0.25)


def test_each_way_of_labelling_is_held_out_for_itself(heap):
    names = names_of(heap)
    coarse = [(name, name[:3]) for name in names]
    fine = [(name, name[:3] + str(int(name.split(".")[1]) % 3)) for name in names]
    for name, rows in (("coarse.csv", coarse), ("fine.csv", fine)):
        table(heap, rows)
        (heap / "labels.csv").rename(heap / name)
    assert len(scan(heap, labels="coarse.csv", valid_fraction=0.2).splits["valid"]) == 4
    index = scan(heap, labels="fine.csv", valid_fraction=0.2)
    assert sorted(index.splits["valid"].labels.tolist()) == [0, 1, 2, 3, 4, 5]


def test_a_class_that_shares_its_groups_with_a_larger_one_gets_its_share(folder):
    """Ten keepers of cats, two of whom have all six dogs; the cats, first by name, must not take both for one side."""
    names = [f"cat.k{i // 2}.{i}.jpg" for i in range(20)] + [f"dog.k{i % 2}.{i}.jpg" for i in range(6)]
    root = folder({name: seed for seed, name in enumerate(names)})
    for seed in range(8):
        index = scan(root, labels=NAME, group=r"\.(?P<group>k\d+)\.", valid_fraction=0.2, seed=seed)
        assert set(index.splits["valid"].labels.tolist()) == {0, 1}
        assert set(index.splits["train"].labels.tolist()) == {0, 1}
    one = r"(?P<group>dog|cat\.k[01])\."  # all dogs in one group: no side is left for them
    with pytest.raises(UserError, match="only 1 group; 2 splits need at least 2"):
        scan(root, labels=NAME, group=one, valid_fraction=0.2)


def test_what_leaves_a_class_without_a_side_is_not_a_manifest_that_is_not_there(folder):
    """Three classes of two groups each, in a ring: whichever side the three groups take, one class has only one."""
    rings = {"a": "xy", "b": "yz", "c": "zx"}
    root = folder(
        {
            f"{kind}.{g}.{i}.jpg": n
            for n, (kind, g, i) in enumerate((k, g, i) for k in rings for g in rings[k] for i in (0, 1))
        }
    )
    with pytest.raises(
        UserError, match=r"no \w+ images because of images that it shares with other classes; try another split_seed"
    ):
        scan(root, labels=r"^(?P<label>\w)\.", group=r"^\w\.(?P<group>\w)\.", valid_fraction=0.5)


@pytest.mark.parametrize("fractions", [(0.2, -0.1), (0.2, 0.0), (1.5, None), (0.6, 0.4)])
def test_fractions_that_are_none(heap, fractions):
    with pytest.raises(UserError, match="fraction"):
        scan(heap, labels=NAME, valid_fraction=fractions[0], test_fraction=fractions[1])


def test_bad_files_know_their_split_where_the_table_says_it(heap):
    rows = [
        (name, name[:3], "test" if ".9." in name else "valid" if ".8." in name else "train") for name in names_of(heap)
    ]
    rows += [("gone.jpg", "cat", "test"), ("lost.jpg", "dog", "valid")]
    with (heap / "l.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    found = {b.path: b.split for b in scan(heap, labels="l.csv").bad}
    assert found == {"gone.jpg": "test", "lost.jpg": "valid"}
    (heap / "dog.9.jpg").write_bytes(b"no image")
    assert [b.split for b in scan(heap, labels=NAME, valid_fraction=0.2).bad] == [""]  # nobody can know


def test_a_name_that_no_file_can_have_is_one_bad_row(heap):
    rows = [(name, name[:3]) for name in names_of(heap)]
    index = scan(heap, labels=table(heap, [*rows, ("x" * 300 + ".jpg", "cat")]), valid_fraction=0.2)
    assert [bad.reason for bad in index.bad] == ["file name too long"]
    assert sum(map(len, index.splits.values())) == 20


@pytest.mark.parametrize("table", ["~nobody_of_that_name/labels.csv", "x" * 300 + ".csv"])
def test_a_table_at_a_place_that_cannot_be_is_not_there(heap, table):
    with pytest.raises(UserError, match="no such file"):
        scan(heap, labels=table, valid_fraction=0.2)


@pytest.mark.parametrize("other", [unicodedata.normalize("NFD", "café"), "Café", "café "])
def test_two_spellings_of_a_class_are_told_apart(folder, other):
    names = [*("train/café/1.jpg", "train/dogs/1.jpg"), *(f"valid/{other}/1.jpg", "valid/dogs/1.jpg")]
    with pytest.raises(UserError, match="rename one") as said:
        scan(folder({name: seed for seed, name in enumerate(names)}))
    assert ascii(other) in str(said.value)
    assert ascii("café") in str(said.value)


def test_a_folder_with_a_long_name_of_long_letters_is_remembered(folder, capsys):
    """File systems count bytes: 120 letters that take two each leave little room for what is added to the name."""
    root = folder(
        {f"{kind}/{i}.jpg": len(kind) * 10 + i for kind in ("cat", "hound") for i in range(5)}, under="é" * 120
    )
    first = scan(root, valid_fraction=0.2)
    again = scan(root, valid_fraction=0.2)
    assert (again.reused, sides(again)) == (10, sides(first))
    assert capsys.readouterr().err == ""


def test_a_manifest_of_brackets_is_damaged(heap, tmp_path):
    (tmp_path / "split.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="can't be read"):
        scan(heap, labels=NAME, valid_fraction=0.2, manifest=tmp_path / "split.json")
