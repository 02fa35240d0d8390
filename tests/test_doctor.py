"""doctor: two hundred planted faults are found, none is invented, and no file changes."""

import json
import os
import shutil
import time
import unicodedata

import jax
import numpy as np
import pytest
import tiny  # noqa: F401
from PIL import Image, ImageOps

from jaxcats import doctor, models
from jaxcats.common.cli import run_command
from jaxcats.data import files
from jaxcats.data.files import list_images
from jaxcats.data.index import scan
from jaxcats.data.quality import Layout, correlations, cosines, findings, join_alike, summary

EACH = 16
LEAK, CONFLICT = "the same image in two splits", "the same image under two classes"
REFUSED = "not laid out for training"


def drawn(seed, size=(96, 80)):
    small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def healthy(root, n=32):
    for k, (split, name) in enumerate((s, c) for s in ("train", "valid") for c in ("cats", "dogs")):
        (root / split / name).mkdir(parents=True)
        for i in range(n):
            drawn(1000 * k + i).save(root / split / name / f"{i}.jpg")
    return root


def plant(root):
    """Sixteen kinds of fault, EACH times; returns kind -> sets of names that belong to each."""
    planted = {}

    def note(kind, *names):
        planted.setdefault(kind, set()).add(frozenset(names))

    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(EACH):
        cats, new = root / "train/cats", 100_000 + 100 * i
        whole = (cats / f"{i}.jpg").read_bytes()
        (cats / f"cut{i}.jpg").write_bytes(drawn(new).tobytes()[: 900 + i] if i % 2 else whole[:900])
        note("unreadable", f"train/cats/cut{i}.jpg")
        (root / f"valid/cats/leak{i}.jpg").write_bytes(whole)
        note(LEAK, f"train/cats/{i}.jpg", f"valid/cats/leak{i}.jpg")
        (root / f"train/dogs/conflict{i}.jpg").write_bytes((root / f"train/cats/{EACH + i}.jpg").read_bytes())
        note(CONFLICT, f"train/cats/{EACH + i}.jpg", f"train/dogs/conflict{i}.jpg")
        (root / f"train/dogs/twice{i}.jpg").write_bytes((root / f"train/dogs/{i}.jpg").read_bytes())
        note("the same image twice", f"train/dogs/{i}.jpg", f"train/dogs/twice{i}.jpg")
        drawn(3000 + i).resize((60, 50)).save(root / f"valid/dogs/near{i}.jpg", quality=60)
        note("look-alikes", f"valid/dogs/{i}.jpg", f"valid/dogs/near{i}.jpg")
        scene = drawn(3000 + EACH + i).crop((1, 1, 96, 79)).point([min(255, v + 9) for v in range(256)] * 3)
        scene.resize((150, 120)).save(root / f"train/dogs/scene{i}.jpg", quality=70)
        note("look-alikes in two splits", f"train/dogs/scene{i}.jpg", f"valid/dogs/{EACH + i}.jpg")
        drawn(new + 1).save(cats / f"really{i}.jpg", format="PNG")
        note("wrong extension", f"train/cats/really{i}.jpg")
        odd = drawn(new + 2).convert(("CMYK", "RGBA", "P")[i % 3])
        if odd.mode == "RGBA":
            odd.putalpha(100)
        name = f"odd{i}.{'jpg' if odd.mode == 'CMYK' else 'png'}"
        odd.save(cats / name, **({"transparency": 0} if odd.mode == "P" else {}))
        note("unusual image", f"train/cats/{name}")
        drawn(new + 3).save(cats / f"turned{i}.jpg", exif=exif)
        note("rotated by EXIF", f"train/cats/turned{i}.jpg")
        drawn(new + 4, (20 + i % 12, 24)).save(cats / f"tiny{i}.jpg")
        note("tiny", f"train/cats/tiny{i}.jpg")
        drawn(new + 5, (330 + i, 40)).save(cats / f"long{i}.jpg")
        note("long and narrow", f"train/cats/long{i}.jpg")
        Image.new("RGB", (80, 80), (10 * i, 200, 90)).save(cats / f"blank{i}.jpg")
        note("blank", f"train/cats/blank{i}.jpg")
        framed = [drawn(new + k) for k in (6, 7)]
        deep = Image.fromarray(np.random.default_rng(new).integers(0, 2**16, (64, 64), dtype=np.uint16))
        name = f"odd{i}.{('tif', 'gif', 'png')[i % 3]}"
        (deep if i % 3 == 2 else framed[0]).save(
            root / "valid/cats" / name, **({} if i % 3 == 2 else {"save_all": True, "append_images": framed[1:]})
        )
        note("unusual image", f"valid/cats/{name}")
        drawn(new + 8).save(cats / f"flipped{i}.png")
        damaged = bytearray((cats / f"flipped{i}.png").read_bytes())
        damaged[200 + i] ^= 0xFF
        (cats / f"flipped{i}.png").write_bytes(damaged)
        note("unreadable", f"train/cats/flipped{i}.png")
        name = (f"noext{i}", f"photo{i}.jpg.bak", f"jpegas{i}.txt")[i % 3]
        drawn(new + 9).save(cats / name, format=("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")[i % 6])
        note("image without an image extension", f"train/cats/{name}")
        (cats / f"notes{i}.txt").write_text(("x", "BMW and others", "")[i % 3])
        note("not an image", f"train/cats/notes{i}.txt")
    (root / "train/cats/.hidden.jpg").write_bytes(b"x")
    note("hidden file", "train/cats/.hidden.jpg")
    return planted


def test_a_healthy_folder_has_no_findings(tmp_path, capsys):
    assert doctor.diagnose(healthy(tmp_path, 8), progress=False)["findings"] == []
    assert run_command(doctor.main, [str(tmp_path)]) == 0
    assert "Nothing to report." in capsys.readouterr().out


def test_two_hundred_planted_faults_are_found_and_none_is_invented(tmp_path, capsys):
    root = healthy(tmp_path / "photos")
    planted = plant(root)
    assert sum(map(len, planted.values())) >= 200
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}
    argv = [str(root), "--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert run_command(doctor.main, argv) == 1
    said = capsys.readouterr()
    assert "GRAVE: the same image in two splits: 16." in said.out
    assert "GRAVE: look-alikes in two splits: 16." in said.out
    report = json.loads((tmp_path / "out.json").read_text())
    found = {f["kind"]: {frozenset(item["paths"]) for item in f["items"]} for f in report["findings"]}
    assert found.pop("class imbalance", None) in (None, {frozenset({"train"})})
    assert found == planted
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}
    page = (tmp_path / "out.html").read_text()
    assert page.count("<h2") == len(report["findings"])
    assert 'src="data:image/webp' in page
    assert "http" not in page


def test_classes_that_are_missing_or_unequal(tmp_path):
    root = healthy(tmp_path, 8)
    for path in (root / "valid/dogs").iterdir():
        path.unlink()
    for i in range(2, 8):
        (root / f"train/dogs/{i}.jpg").unlink()
    (root / "train/birds").mkdir()
    found = {f["kind"]: f["items"] for f in doctor.diagnose(root, progress=False)["findings"]}
    missing = ["train/birds", "valid/birds", "valid/dogs"]
    assert sorted(item["paths"][0] for item in found["class without images"]) == missing
    assert found["class imbalance"][0]["paths"] == ["train"]


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("train/cats/a/b.jpg", ("train", "cats")),
        ("val/dogs/1.jpg", ("valid", "dogs")),
        ("train/1.jpg", ("train", "")),
        ("test/dogs/1.jpg", ("test", "dogs")),
        ("test/test/1.jpg", ("test", "")),
        ("test1/1.jpg", ("", "")),
        ("cats/1.jpg", ("", "")),
        ("1.jpg", ("", "")),
    ],
)
def test_where_an_image_stands(path, where):
    assert Layout({"train": "train", "val": "valid", "test": "test"}, ("cats", "dogs")).place(path) == where


@pytest.mark.parametrize(
    ("path", "where"),
    [("cats/a/1.jpg", ("train", "cats")), ("test/1.jpg", ("test", "")), ("1.jpg", ("train", ""))],
)
def test_where_an_image_stands_in_a_folder_still_to_be_divided(path, where):
    assert Layout({"test": "test"}, ("cats", "dogs")).place(path) == where


def kinds(root):
    return {f["kind"]: f["items"] for f in doctor.diagnose(root, progress=False)["findings"]}


def copied(old, new):
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(old, new)


@pytest.mark.parametrize(
    ("where", "is_leak"),
    [
        ("test/1.jpg", True),
        ("test/test/1.jpg", True),
        ("test1/1.jpg", True),
        ("1.jpg", False),
        ("sample/cats/1.jpg", False),
        ("train/1.jpg", False),
    ],
)
def test_a_copy_without_a_label_is_no_conflict_and_one_that_training_ignores_no_leak(tmp_path, where, is_leak):
    root = healthy(tmp_path, 4)
    copied(root / "train/cats/0.jpg", root / where)
    found = kinds(root)
    if is_leak:
        assert found == {LEAK: [{"paths": sorted([where, "train/cats/0.jpg"]), "detail": "in test and train"}]}
    else:
        assert [item["paths"] for item in found.pop("ignored by training")] == [[where]]
        assert found == {}


def test_a_labelled_test_folder_is_looked_at(tmp_path):
    root = healthy(tmp_path, 4)
    for i in range(3):
        copied(root / f"train/cats/{i}.jpg", root / f"test/dogs/{i}.jpg")
    (root / "test/cats").mkdir()
    found = kinds(root)
    assert {kind: len(items) for kind, items in found.items()} == {
        LEAK: 3,
        CONFLICT: 3,
        REFUSED: 1,
        "class without images": 1,
    }
    assert found["class without images"][0]["paths"] == ["test/cats"]


def test_a_valid_folder_without_classes_lacks_them(tmp_path):
    root = healthy(tmp_path, 2)
    shutil.rmtree(root / "valid")
    (root / "valid").mkdir()
    paths = [item["paths"] for item in kinds(root)["class without images"]]
    assert paths == [["valid/cats"], ["valid/dogs"]]


def test_leaks_through_linked_folders_are_found(tmp_path):
    whole, part = healthy(tmp_path / "a", 2), healthy(tmp_path / "b", 2)
    shutil.rmtree(whole / "valid")
    (whole / "valid").symlink_to("train")
    assert {kind: len(items) for kind, items in kinds(whole).items()} == {LEAK: 4}
    shutil.rmtree(part / "valid/cats")
    (part / "valid/cats").symlink_to("../train/cats")
    (part / "valid/cats/notes.txt").write_text("x")
    found = kinds(part)
    assert {kind: len(items) for kind, items in found.items()} == {LEAK: 2, "not an image": 2}
    assert found[LEAK][0]["paths"] == ["train/cats/0.jpg", "valid/cats/0.jpg"]


def test_loops_of_links_end(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        drawn(0).save(folder / "1.jpg")
    (a / "b").symlink_to(b)
    (b / "a").symlink_to(a)
    (a / "up").symlink_to(tmp_path)
    assert list_images(tmp_path, tmp_path) == ["a/1.jpg", "a/b/1.jpg", "b/1.jpg", "b/a/1.jpg"]
    assert list_images(a, tmp_path) == ["a/1.jpg", "a/b/1.jpg"]


def test_folders_that_all_link_to_each_other_are_refused(tmp_path, capsys):
    names = [f"{n:02}" for n in range(12)]
    for name in names:
        (tmp_path / name).mkdir()
    for name in names:
        for other in names:
            (tmp_path / name / other).symlink_to(f"../{other}")
    assert run_command(doctor.main, [str(tmp_path)]) == 2
    assert "links lead to the same folders over and over" in capsys.readouterr().err


def test_an_empty_folder_is_a_user_error(tmp_path, capsys):
    (tmp_path / "train/cats").mkdir(parents=True)
    assert run_command(doctor.main, [str(tmp_path)]) == 2
    assert "no images found at any depth" in capsys.readouterr().err


@pytest.mark.parametrize("parts", [("train", "valid"), ("train",), ("",)])
def test_one_class_only(tmp_path, parts):
    for k, part in enumerate(parts):
        (tmp_path / part / "cats").mkdir(parents=True)
        for i in range(3):
            drawn(10 * k + i).save(tmp_path / part / f"cats/{i}.jpg")
    found = kinds(tmp_path)
    assert list(found) == ["only one class"]
    assert found["only one class"][0]["paths"] == [f"{part}/cats".lstrip("/") for part in parts]
    assert run_command(doctor.main, [str(tmp_path)]) == 1


def test_a_tiff_that_is_turned_as_it_is_decoded(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn(1).save(tmp_path / "a.tif", exif=exif)
    assert kinds(tmp_path) == {"rotated by EXIF": [{"paths": ["a.tif"], "detail": "orientation 6"}]}


def test_only_images_without_an_ending(tmp_path):
    drawn(1).save(tmp_path / "noext", format="JPEG")
    drawn(1).save(tmp_path / "camera.nef", format="TIFF")
    found = kinds(tmp_path)
    assert found.keys() == {"image without an image extension", "not an image"}
    assert found["image without an image extension"] == [{"paths": ["noext"], "detail": ".jpg by its content"}]


def test_odd_files_never_stop_the_page(tmp_path, capsys):
    root = healthy(tmp_path / "photos", 2)
    os.mkfifo(root / "train/cats/pipe.jpg")
    (root / "train/cats/gone.jpg").symlink_to("nowhere.jpg")
    (root / "train/cats/folder.jpg").mkdir()
    frames = [drawn(70), drawn(71)]
    frames[0].save(root / "train/cats/frames.tif", save_all=True, append_images=frames[1:])
    page = tmp_path / "page.html"
    assert run_command(doctor.main, [str(root), "--html", str(page)]) == 1
    assert "pipe.jpg: not an ordinary file" in capsys.readouterr().out
    assert page.read_text().count("<img") == 1  # the first of two frames


def test_an_output_never_replaces_an_image_and_is_checked_first(tmp_path, capsys, monkeypatch):
    root = healthy(tmp_path / "photos", 2)
    photo = root / "train/cats/0.jpg"
    (tmp_path / "link.json").symlink_to(photo)
    copied(photo, tmp_path / "photo.txt")
    os.mkfifo(tmp_path / "pipe")
    before = photo.read_bytes()
    monkeypatch.setattr(doctor, "diagnose", None)  # never reached
    for flag in ("--json", "--html"):
        for target in (photo, *(tmp_path / name for name in ("link.json", "photo.txt", "pipe", "none/d.json", "."))):
            assert run_command(doctor.main, [str(root), flag, str(target)]) == 2
            assert f"{flag} {target}: " in capsys.readouterr().err
    assert photo.read_bytes() == (tmp_path / "photo.txt").read_bytes() == before
    both = str(tmp_path / "x")
    assert run_command(doctor.main, [str(root), "--json", both, "--html", both]) == 2
    assert "is an input or another output already" in capsys.readouterr().err


def test_the_folder_is_required(capsys):
    assert run_command(doctor.main, []) == 2
    assert "folder: is required" in capsys.readouterr().err


def test_images_of_two_classes_that_look_alike(tmp_path):
    root = healthy(tmp_path, 4)
    drawn(0).resize((60, 50)).save(root / "train/dogs/small.jpg")
    item = kinds(root)["look-alikes"][0]
    assert item["paths"] == ["train/cats/0.jpg", "train/dogs/small.jpg"]
    assert item["detail"].endswith("in the classes cats, dogs: perhaps a label is wrong")


def test_many_alike_images_are_one_finding(tmp_path):
    frame = drawn(5)
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        drawn(len(name) + ord(name[0])).save(tmp_path / name / "other.jpg")
    for i in range(40):
        frame.putpixel((i, 40), (i, i, i))
        frame.save(tmp_path / f"cats/{i:02}.png")
        copied(tmp_path / f"cats/{i:02}.png", tmp_path / f"cats/{i:02}again.png")
    report = doctor.diagnose(tmp_path, progress=False)
    found = {f["kind"]: f["items"] for f in report["findings"]}
    assert len(found["the same image twice"]) == 40
    assert [len(item["paths"]) for item in found["look-alikes"]] == [40]
    said = next(line for line in doctor.lines(report) if "and 35 more" in line)
    assert "cats/00.png = cats/00again.png" not in said
    assert said.endswith(found["look-alikes"][0]["detail"])


def test_ten_thousand_alike_images_are_linked_not_paired():
    rng = np.random.default_rng(0)
    thumbs = rng.integers(0, 255, (1, 32, 32), np.uint8).repeat(10_000, 0)
    thumbs[:, 0, 0] = np.arange(10_000) % 200
    thumbs[-2:] = rng.integers(0, 255, (1, 32, 32), np.uint8)
    hashes = np.zeros(10_000, np.uint64)
    started = time.perf_counter()
    assert len(join_alike(np.arange(10_000), correlations(hashes, thumbs), 0.95, "correlation")) == 9_998
    assert time.perf_counter() - started < 60
    features = np.ones((3000, 4), np.float32)
    features[-2:] = (1, -1, 1, -1)
    links = join_alike(np.arange(3000), cosines(features), 0.99, "cosine")
    assert [(link.i, link.j) for link in links][-2:] == [(0, 2997), (2998, 2999)]


def test_links_join_what_pairs_would():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(12, 1, 6)) + 0.1 * rng.normal(size=(12, 5, 6))
    features = rng.permutation(features.reshape(60, 6)).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    reached = unit @ unit.T >= 0.97
    for _ in range(60):
        reached = reached @ reached
    groups = np.arange(60)
    links = join_alike(groups, cosines(features, block=16), 0.97, "cosine")
    np.testing.assert_array_equal(groups[:, None] == groups, reached)
    assert len(links) == 60 - len(set(groups.tolist()))


def test_a_flat_folder_without_labels(tmp_path):
    for i in range(4):
        drawn(i).save(tmp_path / f"{i}.png")
    assert doctor.diagnose(tmp_path, progress=False)["findings"] == []


def test_features_find_a_pair_that_the_hash_does_not_see(tmp_path, monkeypatch):
    """A pooled feature hardly cares where in the image something is; six colours are told apart even at random."""
    rng = np.random.default_rng(5)

    def weights(leaf):
        return np.asarray(rng.normal(size=leaf.shape) if len(leaf.shape) > 1 else np.ones(leaf.shape), leaf.dtype)

    monkeypatch.setattr(models, "load_pretrained", lambda model: jax.tree.map(weights, models.shapes(model)))
    monkeypatch.setattr(doctor, "COSINE", 0.99)
    colours = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]
    pixels = [np.asarray(drawn(i, (64, 64)).convert("L"))[..., None] * np.uint8(c) for i, c in enumerate(colours)]
    for i, each in enumerate(pixels):
        Image.fromarray(each).save(tmp_path / f"{i}.png")
    Image.fromarray(np.roll(pixels[0], (32, 32), (0, 1))).save(tmp_path / "moved.png")
    assert kinds(tmp_path) == {}
    items = doctor.diagnose(tmp_path, backbone="tiny", progress=False)["findings"][0]["items"]
    assert [item["paths"] for item in items] == [["0.png", "moved.png"]]
    assert items[0]["detail"].startswith("cosine of features 0.99")


@pytest.mark.slow
def test_features_find_mirrored_photos(tmp_path, photos):
    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        for i, path in enumerate(sorted((photos / "valid" / label).iterdir())[:8]):
            shutil.copy(path, tmp_path / label / f"{i}.jpg")
            with Image.open(path) as photo:
                ImageOps.mirror(photo).save(tmp_path / label / f"{i}mirrored.jpg", quality=90)
    assert kinds(tmp_path) == {}
    found = doctor.diagnose(tmp_path, backbone="efficientnet_lite0", progress=False)["findings"]
    assert [f["kind"] for f in found] == ["look-alikes"]
    pairs = [item["paths"] for item in found[0]["items"]]
    assert len(pairs) >= 4  # of 16: not every photo is above the bound, which is set so that none is false
    assert all(b == a.replace(".jpg", "mirrored.jpg") for a, b in pairs)


def test_missing_folder_is_a_user_error(tmp_path, capsys):
    assert run_command(doctor.main, [str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_train_says_two_lines_at_most(tmp_path):
    root = healthy(tmp_path / "photos", 8)
    index = scan(root, cache_dir=tmp_path / "cache")
    assert summary(findings(index)) == ["note: few validation images (2)."]
    plant_few = {"valid/cats/leak.jpg": "train/cats/1.jpg", "train/dogs/conflict.jpg": "train/cats/2.jpg"}
    for new, old in plant_few.items():
        (root / new).write_bytes((root / old).read_bytes())
    said = summary(findings(scan(root, cache_dir=tmp_path / "cache")))
    assert said[0] == f"WARNING: {LEAK} (1), {CONFLICT} (1): the result is in doubt."
    assert len(said) == 2


def test_an_output_replaces_an_earlier_one_and_nothing_else(tmp_path, capsys):
    root = healthy(tmp_path / "photos", 2)
    table, report, page = root / "labels.csv", tmp_path / "d.json", tmp_path / "d.html"
    table.write_text("path,label\n")
    report.touch()
    argv = [str(root), "--json", str(report), "--html", str(page)]
    for _ in range(2):
        assert run_command(doctor.main, argv) == 0
    assert json.loads(report.read_text())["pictures"] == 8
    other = tmp_path / "other.json"
    other.write_text('{"folder": "mine"}')
    for flag, file in (("--json", table), ("--html", table), ("--json", other), ("--json", page), ("--html", report)):
        before = file.read_bytes()
        assert run_command(doctor.main, [str(root), flag, str(file)]) == 2
        assert "name another file to write" in capsys.readouterr().err
        assert file.read_bytes() == before


def test_the_formats_of_files_without_an_image_extension(tmp_path):
    for name in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000"):
        drawn(1).save(tmp_path / name, format=name)
    for name, text in (("poem", b"P1 is the first of the patients"), ("cars", b"BMW and others"), ("cut", b"\x89PNG")):
        (tmp_path / name).write_bytes(text)
    found = kinds(tmp_path)
    assert [item["paths"] for item in found["not an image"]] == [["cars"], ["cut"], ["poem"]]
    details = {item["paths"][0]: item["detail"].split()[0] for item in found["image without an image extension"]}
    assert (len(details), details["AVIF"], details["JPEG2000"]) == (9, ".avif", ".jp2")


def test_a_copy_elsewhere_hides_no_leak_of_near_copies(tmp_path):
    root = healthy(tmp_path, 4)
    drawn(0).resize((60, 50)).save(root / "valid/dogs/near.jpg")
    copied(root / "train/cats/0.jpg", root / "sample/cats/0.jpg")
    found = kinds(root)
    assert found.keys() == {"look-alikes in two splits", "ignored by training"}
    item = found["look-alikes in two splits"][0]
    assert item["paths"] == ["train/cats/0.jpg", "valid/dogs/near.jpg"]
    assert item["detail"].endswith("in the classes cats, dogs: perhaps a label is wrong")


def test_what_only_exact_copies_cross_is_said_once(tmp_path):
    root = healthy(tmp_path, 4)
    copied(root / "train/cats/0.jpg", root / "valid/cats/leak.jpg")
    (root / "sample").mkdir()
    drawn(0).resize((60, 50)).save(root / "sample/near.jpg")
    assert kinds(root).keys() == {LEAK, "ignored by training"}


def test_little_on_an_even_ground_is_not_blank(tmp_path):
    rng = np.random.default_rng(0)
    sheet = np.full((1400, 1000), 255, np.uint8)
    sheet[300:320, 400:404] = 0
    stars = np.zeros((1000, 1000), np.uint8)
    stars.flat[rng.choice(stars.size, 300, replace=False)] = 255
    for name, pixels in (("sheet", sheet), ("stars", stars), ("board", np.indices((512, 512)).sum(0) % 2 * 255)):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{name}.png")
    noisy = rng.normal(120, 2, (300, 400, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(tmp_path / "noisy.jpg")
    assert {kind: [item["paths"] for item in items] for kind, items in kinds(tmp_path).items()} == {
        "blank": [["noisy.jpg"]]
    }


def test_deep_greys_that_fill_little_of_their_range(tmp_path):
    photo = np.asarray(drawn(3).convert("L")).astype(np.uint16)
    photo = (photo - photo.min()) * 4
    for name, pixels in (("dark", photo), ("narrow", photo + 30_000), ("blank", photo * 0 + 900), ("full", photo * 60)):
        Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / f"{name}.png")
    found = kinds(tmp_path)
    assert [item["paths"] for item in found["blank"]] == [["blank.png"]]
    dark, narrow = found["narrow range of values"]
    assert (dark["paths"], narrow["paths"]) == (["dark.png"], ["narrow.png"])
    assert dark["detail"] == f"its values lie between 0 % and {100 * int(photo.max()) / 65535:.2g} % of the full range"
    assert narrow["detail"].startswith(f"its values lie between {100 * 30_000 / 65535:.2g} % and ")


def test_an_image_too_large_for_the_memory_is_not_called_damaged(tmp_path, monkeypatch):
    def short(*_):
        raise MemoryError

    drawn(0).save(tmp_path / "large.jpg")
    monkeypatch.setattr(files, "decode", short)
    assert kinds(tmp_path)["unreadable"][0]["detail"] == "too large for the memory that is free"


def put(root, *paths):
    for k, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        drawn(500_000 + k).save(root / path)


FOUR = tuple(f"{name}/{i}.jpg" for name in ("cats", "dogs") for i in range(2))


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ([f"{s}/{p}" for s in ("train", "valid", "val") for p in FOUR], "both valid/ and val/ exist"),
        ([f"valid/{p}" for p in FOUR], "has valid/ but no train/"),
        ([*FOUR, "test/cats/1.jpg", "test/dogs/1.jpg"], "has test/ but no train/"),
    ],
)
def test_a_folder_that_training_refuses(tmp_path, paths, said):
    put(tmp_path, *paths)
    found = kinds(tmp_path)
    assert list(found) == ["not laid out for training"]
    assert found["not laid out for training"][0]["detail"].startswith(said)
    assert run_command(doctor.main, [str(tmp_path)]) == 1


def test_images_that_training_does_not_see(tmp_path, capsys):
    root = healthy(tmp_path, 2)
    put(root, "1.jpg", "train/2.jpg", "valid/3.jpg", "extra/cats/4.jpg", "extra/dogs/5.jpg", "test1/6.jpg")
    found = kinds(root)
    assert list(found) == ["ignored by training"]
    assert [(item["paths"], item["detail"]) for item in found["ignored by training"]] == [
        (["1.jpg"], "1 in the folder itself"),
        (["extra/cats/4.jpg", "extra/dogs/5.jpg"], "2 in extra"),
        (["train/2.jpg"], "1 in train"),
        (["valid/3.jpg"], "1 in valid"),
    ]
    assert run_command(doctor.main, [str(root)]) == 0
    assert "    extra/cats/4.jpg, extra/dogs/5.jpg: 2 in extra" in capsys.readouterr().out


def test_a_test_folder_that_training_leaves_alone(tmp_path):
    root = healthy(tmp_path, 2)
    put(root, "test/cats/1.jpg", "test/dogs/2.jpg", "test/unknown/3.jpg")
    assert [item["paths"] for item in kinds(root)["test folder not used"]] == [["test"]]
    shutil.rmtree(root / "test")
    put(root, "test/test/1.jpg")  # without labels, as Kaggle has it
    assert kinds(root) == {}


@pytest.mark.parametrize(
    "paths",
    [
        ["train/cat.1.jpg", "train/dog.1.jpg", "valid/cat.2.jpg", "test/3.jpg", "4.jpg"],
        ["cat.1.jpg", "dog.1.jpg", "more/cat.2.jpg"],
        ["a/1.jpg", "b/2.jpg", "3.jpg", "test/4.jpg"],
        ["images/1.jpg", "images/2.jpg"],
    ],
)
def test_nothing_is_said_of_folders_labelled_in_another_way(tmp_path, paths):
    put(tmp_path, *paths)
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(f"{path},x{len(path)}\n" for path in paths))
    assert kinds(tmp_path).keys() == {"not an image"}


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ([f"{s}/{p}" for s in ("train", "valid") for p in FOUR], "train: cats 2, dogs 2; valid: cats 2, dogs 2"),
        (FOUR, "train: cats 2, dogs 2; no train/ and valid/"),
        (["1.jpg"], "train: no class 1; no train/ and valid/"),
        (["Train/a/1.jpg", "Test/a/2.jpg"], "train: Test 1, Train 1; no train/ and valid/"),
    ],
)
def test_what_was_understood_is_said(tmp_path, capsys, paths, said):
    put(tmp_path / "photos", *paths)
    doubtful = "Train/a/1.jpg" in paths
    argv = [str(tmp_path / "photos"), "--json", str(tmp_path / "out.json")]
    assert run_command(doctor.main, argv) == int(doubtful)
    assert capsys.readouterr().out.splitlines()[1] == f"Understood as {said}."
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["understood"] == said
    assert [f["kind"] for f in report["findings"]] == ["class named like a split"] * doubtful


@pytest.mark.parametrize("other", [unicodedata.normalize("NFD", "café"), "Café", "café "])
def test_one_class_spelt_in_two_ways(tmp_path, other):
    put(tmp_path, "train/café/1.jpg", "train/dogs/2.jpg", f"valid/{other}/3.jpg", "valid/dogs/4.jpg")
    found = kinds(tmp_path)
    assert list(found) == [REFUSED]
    assert ascii("café") in found[REFUSED][0]["detail"]
    assert ascii(other) in found[REFUSED][0]["detail"]
