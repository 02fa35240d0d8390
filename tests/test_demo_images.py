"""scripts/demo_images.py: the images that it draws, and the folders that it leaves alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from demo_images import draw
from PIL import Image

from jaxcats.common.errors import UserError
from jaxcats.data.index import scan


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("demo") / "photos", n_train=160, n_valid=80)


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.jpg")}


def test_the_demo_is_a_sound_folder_with_enough_to_validate_on(drawn):
    index = scan(drawn, on_bad_file="fail", progress=False)
    assert index.classes == ("cats", "dogs")
    assert [np.bincount(split.labels).tolist() for split in index.splits.values()] == [[80, 80], [40, 40]]
    assert len({content for split in index.splits.values() for content in split.hashes}) == 240


def test_colours_and_places_dont_tell_cats_from_dogs(drawn):
    """A linear classifier on thumbnails must not do the job, or the demo would show nothing."""
    linear_model = pytest.importorskip("sklearn.linear_model")

    def thumbnails(part):
        paths = sorted((drawn / part).glob("*/*.jpg"))
        pixels = [np.asarray(Image.open(path).resize((16, 16), Image.Resampling.BILINEAR)).ravel() for path in paths]
        return np.array(pixels) / 255 - 0.5, [path.parent.name for path in paths]

    train, valid = thumbnails("train"), thumbnails("valid")
    for strength in (1e-3, 1e-2, 1e-1, 1):
        classifier = linear_model.LogisticRegression(C=strength, max_iter=2000).fit(*train)
        assert classifier.score(*valid) < 0.8


def test_a_seed_gives_the_same_images_and_another_gives_others(tmp_path):
    first = contents(draw(tmp_path / "a", n_train=5, n_valid=2, seed=1))
    assert sorted(first) == [
        *("train/cats/cat.0000.jpg", "train/cats/cat.0001.jpg", "train/cats/cat.0002.jpg"),
        *("train/dogs/dog.0000.jpg", "train/dogs/dog.0001.jpg"),
        *("valid/cats/cat.0000.jpg", "valid/dogs/dog.0000.jpg"),
    ]
    assert contents(draw(tmp_path / "b", n_train=5, n_valid=2, seed=1)) == first
    other = contents(draw(tmp_path / "c", n_train=5, n_valid=2, seed=2))
    assert not set(other.values()) & set(first.values())


def test_a_complete_folder_is_left_alone_and_a_broken_one_mended(tmp_path):
    root = draw(tmp_path / "a", n_train=4, n_valid=2)
    whole = contents(root)
    image = root / "train/cats/cat.0001.jpg"
    time = image.stat().st_mtime_ns
    draw(root, n_train=4, n_valid=2)
    assert image.stat().st_mtime_ns == time
    image.unlink()
    draw(root, n_train=4, n_valid=2)
    assert contents(root) == whole


def test_other_numbers_draw_anew_and_keep_what_isnt_ours(tmp_path):
    root = draw(tmp_path / "a", n_train=6, n_valid=2)
    (root / "train/cats/mine.jpg").write_bytes(b"mine")
    draw(root, n_train=2, n_valid=2)
    assert sorted(path.name for path in root.rglob("train/*/*.jpg")) == ["cat.0000.jpg", "dog.0000.jpg", "mine.jpg"]


def test_a_folder_of_the_users_is_never_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other than demo images; give a new or an empty folder"):
        draw(tmp_path)
    with pytest.raises(UserError, match="other than demo images"):
        draw(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_too_few_images(tmp_path):
    with pytest.raises(UserError, match="at least two images in each"):
        draw(tmp_path / "a", n_train=1)


def test_the_command(tmp_path):
    script = Path(__file__).parents[1] / "scripts" / "demo_images.py"

    def run(folder):
        command = [sys.executable, str(script), str(folder), "--n_train", "2", "--n_valid", "2"]
        return subprocess.run(command, capture_output=True, text=True)

    done = run(tmp_path / "a")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 training and 2 validation images" in done.stdout
    (tmp_path / "mine.txt").write_text("")
    done = run(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
