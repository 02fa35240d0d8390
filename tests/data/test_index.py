import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcats.common.errors import UserError
from jaxcats.common.signals import Stopped
from jaxcats.data import files, index
from jaxcats.data.index import cache_folder, scan, scan_labelled, scan_unlabelled
from jaxcats.data.labels import Labelled, Row


def saved_caches(kind="index"):
    return sorted((cache_folder() / kind).glob("*.json"))


def test_the_two_folder_layout(two_classes):
    index = scan(two_classes)
    assert index.classes == ("cats", "dogs")
    train, valid = index.splits["train"], index.splits["valid"]
    assert train.paths == tuple(f"train/{kind}s/{kind}{i}.jpg" for kind in ("cat", "dog") for i in range(3))
    assert valid.paths == ("valid/cats/x.jpg", "valid/dogs/y.jpg")
    assert (train.labels.tolist(), valid.labels.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1])
    assert train.labels.dtype == np.int32
    assert train.hashes[0] == hashlib.sha256((train.root / train.paths[0]).read_bytes()).hexdigest()
    assert (len(train), index.bad, index.reused) == (6, (), 0)


@pytest.mark.parametrize("name", ["val", "validation"])
def test_other_names_of_the_validation_folder(two_classes, name):
    (two_classes / "valid").rename(two_classes / name)
    assert len(scan(two_classes).splits["valid"]) == 2


def test_nested_folders_odd_extensions_and_hidden_files(two_classes, folder, encoded, photo):
    folder(
        {
            "train/cats/2019/may/b.JPG": 20,
            "train/cats/c.Png": encoded(21, "PNG"),
            "train/cats/lies.jpg": encoded(22, "GIF"),
            "train/cats/.hidden.jpg": b"x",
            "train/cats/.thumbs/d.jpg": b"x",
            "train/cats/notes.txt": b"x",
            "train/.cache/e.jpg": b"x",
            "train/readme.jpg": b"x",
        }
    )
    index = scan(two_classes)
    assert {p.removeprefix("train/cats/") for p in index.splits["train"].paths if "cats" in p} == {
        *("2019/may/b.JPG", "c.Png", "lies.jpg"),
        *("cat0.jpg", "cat1.jpg", "cat2.jpg"),
    }
    assert index.bad == ()


def test_links_that_loop_end_and_broken_ones_are_listed(two_classes):
    cats = two_classes / "train/cats"
    (cats / "again").symlink_to(cats)
    (cats / "up").symlink_to(two_classes)
    (cats / "gone.jpg").symlink_to(two_classes / "nothing.jpg")
    (cats / "itself").symlink_to(cats / "itself")
    index = scan(two_classes)
    assert [(file.path, file.reason) for file in index.bad] == [("train/cats/gone.jpg", "broken link")]
    assert sum(path.startswith("train/cats/cat") for path in index.splits["train"].paths) == 3


def test_bad_files_are_listed_with_their_reasons(two_classes, folder, encoded, photo):
    whole = encoded(photo(60, 300, 300))
    folder(
        {
            "train/dogs/empty.jpg": b"",
            "train/dogs/page.jpg": b"<html>not found</html>",
            "train/dogs/half.jpg": whole[: len(whole) // 2],
            "train/dogs/half.png": encoded(photo(61, 300, 300), "PNG")[:2000],
        }
    )
    if hasattr(os, "mkfifo"):
        os.mkfifo(two_classes / "train/dogs/pipe.jpg")
    before = {path: path.stat() for path in two_classes.rglob("*")}
    index = scan(two_classes)
    reasons = {file.path.rsplit("/")[-1]: file.reason for file in index.bad}
    assert "zero bytes" in reasons["empty.jpg"]
    assert "not an image" in reasons["page.jpg"]
    assert "truncated" in reasons["half.jpg"]
    assert "truncated" in reasons["half.png"]
    assert "not an ordinary file" in reasons.get("pipe.jpg", "not an ordinary file")
    assert len(index.splits["train"]) == 6
    assert {path: path.stat().st_mtime_ns for path in two_classes.rglob("*")} == {
        path: status.st_mtime_ns for path, status in before.items()
    }


def test_on_bad_file_fail_lists_the_first(two_classes, folder):
    folder({f"train/dogs/bad{i}.jpg": b"x" for i in range(7)})
    with pytest.raises(UserError, match=r"7 of 15 images.*bad0\.jpg \(not an image.*and 2 more.*on_bad_file"):
        scan(two_classes, on_bad_file="fail")


def test_unchanged_files_come_from_the_cache_and_changed_ones_dont(two_classes, encoded):
    first = scan(two_classes)
    again = scan(two_classes)
    assert (first.reused, again.reused) == (0, 8)
    assert again.splits["train"].hashes == first.splits["train"].hashes
    changed = two_classes / "train/cats/cat1.jpg"
    changed.write_bytes(encoded(99))
    third = scan(two_classes)
    assert third.reused == 7
    assert third.splits["train"].hashes[1] == hashlib.sha256(changed.read_bytes()).hexdigest()
    assert scan(two_classes, rehash=True).reused == 0


def test_size_and_time_say_whether_a_file_changed(two_classes):
    victim = two_classes / "train/cats/cat1.jpg"
    scan(two_classes)
    content, status = bytearray(victim.read_bytes()), victim.stat()
    content[-100] ^= 1
    victim.write_bytes(content)
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    stale = scan(two_classes)
    assert stale.reused == 8
    fresh = scan(two_classes, rehash=True)
    assert fresh.splits["train"].hashes[1] == hashlib.sha256(content).hexdigest() != stale.splits["train"].hashes[1]
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert scan(two_classes).reused == 7


def test_removed_files_leave_the_cache(two_classes, encoded):
    scan(two_classes)
    (two_classes / "train/cats/cat1.jpg").unlink()
    (two_classes / "train/cats/cat9.jpg").write_bytes(encoded(77))
    index = scan(two_classes)
    assert index.reused == 7
    assert set(json.loads(saved_caches()[0].read_text().splitlines()[1])["files"]) == {
        path for split in index.splits.values() for path in split.paths
    }


def test_what_was_looked_at_before_it_was_asked_to_end_is_kept(two_classes, monkeypatch):
    look = files.inspect_file

    def until_the_fifth(path):
        if path.name == "dog1.jpg":
            raise Stopped(signal.SIGTERM)
        return look(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "inspect_file", until_the_fifth)
        with pytest.raises(Stopped):
            scan(two_classes, workers=1)
    assert scan(two_classes).reused == 4


def test_being_asked_again_while_it_saves_leaves_the_cache_as_it_was(two_classes, folder, monkeypatch):
    scan(two_classes)
    folder({"train/cats/new.jpg": 50})
    with monkeypatch.context() as patch:

        def asked_again(source, target):
            raise Stopped(signal.SIGTERM)

        patch.setattr(os, "replace", asked_again)
        with pytest.raises(Stopped):
            scan(two_classes)
    assert [path.suffix for path in (cache_folder() / "index").iterdir()] == [".json"]
    assert scan(two_classes).reused == 8


def test_while_it_looks_the_cache_is_saved_every_minute(tmp_path, monkeypatch):
    """What a killed process leaves."""
    paths, saved, save = [f"{i}.jpg" for i in range(400)], [], files._save_records
    for path in paths:
        (tmp_path / path).touch()
    time = iter(range(0, 10_000, 7))  # seconds go by between any two looks at the clock
    monkeypatch.setattr(files, "monotonic", lambda: next(time))
    monkeypatch.setattr(files, "inspect_file", lambda path: files.FileRecord(0, path.stat().st_mtime_ns, "0" * 64))

    def noted(store, root, records):
        save(store, root, records)
        saved.append(len(files._load_records(store)))

    monkeypatch.setattr(files, "_save_records", noted)
    files.inspect_files(tmp_path, paths, cache_dir=tmp_path / "cache", progress=False)
    assert saved == sorted(saved)
    assert saved[-1] == 400
    assert len(saved) > 35
    assert saved[0] * 7 <= 70
    assert max(b - a for a, b in itertools.pairwise(saved)) * 7 <= 77


@pytest.mark.parametrize("damage", ["{", "[]", '{"version": 1}', "null", "\x00"])
def test_a_damaged_cache_is_rebuilt_and_said_so(two_classes, damage, capsys):
    scan(two_classes)
    (cache,) = saved_caches()
    cache.write_text(damage)
    capsys.readouterr()
    assert scan(two_classes).reused == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "checked again" in said
    assert scan(two_classes).reused == 8


def test_a_warning_stays_one_line_whatever_the_folder_is_called(folder, capsys):
    root = folder(
        {f"{s}/{c}/{i}.jpg": i for s in ("train", "valid") for c in "ab" for i in range(2)}, under="two\nlines\x1b[31m"
    )
    scan(root)
    (cache,) = saved_caches()
    cache.write_text("damaged")
    scan(root)
    said = capsys.readouterr().err
    assert (said.count("\n"), said.count("\x1b")) == (1, 0)


def test_a_cut_off_image_is_called_that(two_classes, encoded):
    (two_classes / "train/cats/cut.webp").write_bytes(encoded(7, "WEBP")[:300])
    (bad,) = scan(two_classes).bad
    assert bad.reason.startswith("damaged, cut off or")


def test_a_cache_folder_that_cant_be_written_is_a_warning(two_classes, tmp_path, capsys):
    (tmp_path / "in_the_way").write_text("")
    index = scan(two_classes, cache_dir=tmp_path / "in_the_way")
    assert len(index.splits["train"]) == 6
    assert "can't be written" in capsys.readouterr().err


def test_a_file_without_permission_is_tried_again_next_time(two_classes, monkeypatch):
    read = Path.read_bytes

    def refuse(path):
        if path.name == "cat1.jpg":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert [file.reason for file in scan(two_classes).bad] == ["permission denied"]
    again = scan(two_classes)
    assert (again.bad, again.reused) == ((), 7)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("JAXCATS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/jaxcats"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/jaxcats"


def test_the_number_of_workers_changes_nothing(two_classes):
    one, four = scan(two_classes, workers=1, rehash=True), scan(two_classes, workers=4, rehash=True)
    assert one.splits["train"].hashes == four.splits["train"].hashes
    assert one.splits["train"].paths == four.splits["train"].paths


def test_pillows_warnings_stay_off_the_terminal(two_classes, folder, encoded, tmp_path):
    folder({"train/cats/exif.jpg": encoded(1, exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff garbage")})
    code = f"from jaxcats.data.index import scan; print(len(scan({str(two_classes)!r}).bad))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_names_that_are_not_unicode(two_classes, encoded):
    name = os.fsencode(two_classes / "train/cats") + b"/caf\xe9.jpg"
    try:
        with open(name, "wb") as file:
            file.write(encoded(5))
    except OSError:
        pytest.skip("this file system wants UTF-8 names")
    assert len(scan(two_classes).splits["train"]) == 7
    assert scan(two_classes).reused == 9


# What bad folders get: each its own message, with the folder and a way out.


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"absent: no such folder; give the folder"):
        scan(tmp_path / "absent")


def test_a_file_is_not_a_folder(two_classes):
    with pytest.raises(UserError, match=r"cat0\.jpg: no such folder"):
        scan(two_classes / "train/cats/cat0.jpg")


def test_neither_layout_says_what_was_looked_for(folder):
    root = folder({"cats/a.jpg": 1, "dogs/b.jpg": 2})
    with pytest.raises(UserError, match=r"there is no valid/ beside train/.*valid_fraction"):
        scan(root)


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="0 images but no class folders"):
        scan(tmp_path)


def test_images_without_class_folders(folder):
    root = folder({"train/a.jpg": 1, "train/b.jpg": 2, "valid/c.jpg": 3})
    with pytest.raises(UserError, match=r"train: 2 images but no class folders; expected"):
        scan(root)


def test_class_folders_without_images(folder):
    root = folder({f"{part}/{name}/x.txt": b"x" for part in ("train", "valid") for name in ("cats", "dogs")})
    with pytest.raises(UserError, match=r"train/cats: no images in this class folder \(looked for .*\.jpg"):
        scan(root)


def test_one_empty_class(two_classes):
    for path in (two_classes / "train/dogs").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"train/dogs: no images in this class folder.*remove the folder"):
        scan(two_classes)


def test_a_class_without_usable_images(two_classes):
    for path in (two_classes / "train/dogs").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"class dogs: none of its 3 train images can be used: .*dog0\.jpg \(not an image"
    ):
        scan(two_classes)


def test_a_large_class_without_usable_images_is_said_at_once(monkeypatch):
    """Of 30,000 files in one class: not 30,000 times 30,000 steps."""
    rows = [Row("cats/0.jpg", "cats"), *(Row(f"dogs/{i}.jpg", "dogs") for i in range(30_000))]
    records = [files.FileRecord(1, 1, "0" * 64), *[files.FileRecord(1, 1, bad="empty")] * 30_000]
    monkeypatch.setattr(index, "inspect_files", lambda *_, **__: (records, 0))
    started = time.process_time()
    with pytest.raises(UserError, match=r"none of its 30,000 train images can be used: dogs/0\.jpg \(empty\)"):
        index._read_files(Path("photos"), Labelled(("cats", "dogs"), rows, []), {})
    assert time.process_time() - started < 5


def test_every_file_bad(two_classes):
    for path in two_classes.rglob("*.jpg"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="8 of 8 images can't be used"):
        scan(two_classes)


def test_one_class_only(folder):
    with pytest.raises(UserError, match="classes of the training images: cats; a classifier needs at least two"):
        scan(folder({"train/cats/a.jpg": 1, "valid/cats/b.jpg": 2}))


def test_valid_lacks_a_class(two_classes):
    (two_classes / "valid/dogs").rename(two_classes / "gone")
    with pytest.raises(UserError, match=r"valid: its classes differ.*missing dogs.*expected exactly cats, dogs"):
        scan(two_classes)


def test_valid_has_a_class_more(two_classes, folder):
    folder({"valid/mice/a.jpg": 1})
    with pytest.raises(UserError, match=r"valid: its classes differ.*unknown mice"):
        scan(two_classes)


def test_two_validation_folders(two_classes, folder):
    folder({"val/cats/a.jpg": 1})
    with pytest.raises(UserError, match="both valid/ and val/"):
        scan(two_classes)


def test_a_fraction_beside_a_validation_folder(two_classes):
    with pytest.raises(UserError, match=r"has a valid split already; leave valid_fraction out"):
        scan(two_classes, valid_fraction=0.2)


# Other folders: to evaluate on, and to predict on.


def test_labels_follow_the_classifiers_order_of_classes(two_classes):
    for place in (two_classes, two_classes / "valid"):
        split, bad = scan_labelled(place, classes=("dogs", "cats"))
        assert [path[-10:] for path in split.paths] == ["cats/x.jpg", "dogs/y.jpg"]
        assert (split.labels.tolist(), bad) == ([1, 0], ())


def test_a_folder_with_other_classes_is_refused(two_classes):
    with pytest.raises(UserError, match=r"those of the classifier: missing mice, unknown dogs"):
        scan_labelled(two_classes, classes=("cats", "mice"))
    with pytest.raises(UserError, match=r"missing mice, unknown none; expected exactly cats, dogs, mice"):
        scan_labelled(two_classes, classes=("cats", "dogs", "mice"))


def test_a_flat_folder_has_no_labels(two_classes):
    with pytest.raises(UserError, match="1 images but no class folders"):
        scan_labelled(two_classes / "valid/cats", classes=("cats", "dogs"))


def test_any_folder_can_be_predicted_on(folder):
    root = folder({"b.jpg": 1, "deep/er/a.png": 2, "bad.jpg": b"x"})
    split, bad = scan_unlabelled(root)
    assert split.paths == ("b.jpg", "deep/er/a.png")
    assert split.labels.tolist() == [-1, -1]
    assert [file.path for file in bad] == ["bad.jpg"]
    assert Image.open(split.root / split.paths[0]).size == (60, 44)


def test_a_folder_without_images_to_predict_on(tmp_path):
    with pytest.raises(UserError, match="no images found at any depth"):
        scan_unlabelled(tmp_path)
