"""doctor: two hundred planted faults are found, none is invented, and no file changes."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxcats import doctor
from jaxcats.command import run_command
from jaxcats.data.examine import place
from jaxcats.data.findings import findings, summary
from jaxcats.data.index import scan

EACH = 16


def picture(seed, size=(96, 80)):
    small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def healthy(root, n=32):
    for k, (split, name) in enumerate((s, c) for s in ("train", "valid") for c in ("cats", "dogs")):
        (root / split / name).mkdir(parents=True)
        for i in range(n):
            picture(1000 * k + i).save(root / split / name / f"{i}.jpg")
    return root


def plant(root):
    """Thirteen kinds of fault, EACH times; returns kind -> sets of names that belong to each."""
    planted = {}

    def note(kind, *names):
        planted.setdefault(kind, set()).add(frozenset(names))

    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(EACH):
        cats, new = root / "train/cats", 100_000 + 100 * i
        whole = (cats / f"{i}.jpg").read_bytes()
        (cats / f"cut{i}.jpg").write_bytes(picture(new).tobytes()[: 900 + i] if i % 2 else whole[:900])
        note("unreadable", f"train/cats/cut{i}.jpg")
        (root / f"valid/cats/leak{i}.jpg").write_bytes(whole)
        note("leak", f"train/cats/{i}.jpg", f"valid/cats/leak{i}.jpg")
        (root / f"train/dogs/conflict{i}.jpg").write_bytes((root / f"train/cats/{EACH + i}.jpg").read_bytes())
        note("label conflict", f"train/cats/{EACH + i}.jpg", f"train/dogs/conflict{i}.jpg")
        (root / f"train/dogs/twice{i}.jpg").write_bytes((root / f"train/dogs/{i}.jpg").read_bytes())
        note("the same twice", f"train/dogs/{i}.jpg", f"train/dogs/twice{i}.jpg")
        picture(3000 + i).resize((60, 50)).save(root / f"valid/dogs/near{i}.jpg", quality=60)
        note("look alike", f"valid/dogs/{i}.jpg", f"valid/dogs/near{i}.jpg")
        scene = picture(3000 + EACH + i).crop((1, 1, 96, 79)).point([min(255, v + 9) for v in range(256)] * 3)
        scene.resize((150, 120)).save(root / f"train/dogs/scene{i}.jpg", quality=70)
        note("look alike in two splits", f"train/dogs/scene{i}.jpg", f"valid/dogs/{EACH + i}.jpg")
        picture(new + 1).save(cats / f"really{i}.jpg", format="PNG")
        note("wrong extension", f"train/cats/really{i}.jpg")
        odd = picture(new + 2).convert(("CMYK", "RGBA", "P")[i % 3])
        if odd.mode == "RGBA":
            odd.putalpha(100)
        name = f"odd{i}.{'jpg' if odd.mode == 'CMYK' else 'png'}"
        odd.save(cats / name, **({"transparency": 0} if odd.mode == "P" else {}))
        note("unusual picture", f"train/cats/{name}")
        picture(new + 3).save(cats / f"turned{i}.jpg", exif=exif)
        note("turned by EXIF", f"train/cats/turned{i}.jpg")
        picture(new + 4, (20 + i % 12, 24)).save(cats / f"tiny{i}.jpg")
        note("tiny", f"train/cats/tiny{i}.jpg")
        picture(new + 5, (330 + i, 40)).save(cats / f"long{i}.jpg")
        note("long and narrow", f"train/cats/long{i}.jpg")
        Image.new("RGB", (80, 80), (10 * i, 200, 90)).save(cats / f"blank{i}.jpg")
        note("blank", f"train/cats/blank{i}.jpg")
        (cats / f"notes{i}.txt").write_text("x")
        note("no picture", f"train/cats/notes{i}.txt")
    for kind, name in (("left by an operating system", "train/Thumbs.db"), ("hidden", "train/cats/.hidden.jpg")):
        (root / name).write_bytes(b"x")
        note(kind, name)
    return planted


def test_a_healthy_folder_has_no_findings(tmp_path, capsys):
    assert doctor.diagnose(healthy(tmp_path, 8), progress=False)["findings"] == []
    assert run_command(doctor.main, [str(tmp_path)]) == 0
    assert "Nothing to report." in capsys.readouterr().out


def test_two_hundred_planted_faults_are_found_and_none_is_invented(tmp_path, capsys):
    root = healthy(tmp_path / "pictures")
    planted = plant(root)
    assert sum(map(len, planted.values())) >= 200
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}
    argv = [str(root), "--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert run_command(doctor.main, argv) == 1
    said = capsys.readouterr()
    assert "GRAVE: leak: 16." in said.out
    assert "GRAVE: look alike in two splits: 16." in said.out
    report = json.loads((tmp_path / "out.json").read_text())
    found = {f["kind"]: {frozenset(item["paths"]) for item in f["items"]} for f in report["findings"]}
    assert found.pop("unequal classes", None) in (None, {frozenset({"train"})})
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
    assert sorted(item["paths"][0] for item in found["class without pictures"]) == missing
    assert found["unequal classes"][0]["paths"] == ["train"]


@pytest.mark.parametrize(
    ("path", "where"),
    [("train/cats/a/b.jpg", ("train", "cats")), ("val/dogs/1.jpg", ("valid", "dogs")), ("cats/1.jpg", ("", "cats")), ("1.jpg", ("", ""))],
)  # fmt: skip
def test_where_a_picture_stands(path, where):
    assert place(path) == where


def test_a_flat_folder_without_labels(tmp_path):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    assert doctor.diagnose(tmp_path, progress=False)["findings"] == []


def test_missing_folder_is_a_user_error(tmp_path, capsys):
    assert run_command(doctor.main, [str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_train_says_two_lines_at_most(tmp_path):
    root = healthy(tmp_path / "pictures", 8)
    index = scan(root, cache_dir=tmp_path / "cache")
    assert summary(findings(index)) == ["note: classes with fewer than 30 validation pictures (2)."]
    plant_few = {"valid/cats/leak.jpg": "train/cats/1.jpg", "train/dogs/conflict.jpg": "train/cats/2.jpg"}
    for new, old in plant_few.items():
        (root / new).write_bytes((root / old).read_bytes())
    said = summary(findings(scan(root, cache_dir=tmp_path / "cache")))
    assert (
        said[0]
        == "WARNING: the same picture in train and valid (1), the same picture under two classes (1): the result is in doubt."
    )
    assert len(said) == 2
