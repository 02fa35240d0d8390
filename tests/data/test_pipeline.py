import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxcats.common.errors import UserError
from jaxcats.data.images import Preprocess, evaluation_pixels
from jaxcats.data.index import scan, scan_unlabelled
from jaxcats.data.pipeline import evaluation_batches, training_batches

SMALL = Preprocess(size=32)


@pytest.fixture
def images(folder, encoded, photo):
    """11 images of many kinds and shapes, labelled."""
    root = folder(
        {
            "train/cats/a.jpg": encoded(photo(1, 90, 60)),
            "train/cats/b.jpg": encoded(photo(2, 60, 90), orientation=6),
            "train/cats/c.png": encoded(photo(3, 33, 70), "PNG"),
            "train/cats/d.png": encoded(photo(4).convert("RGBA"), "PNG"),
            "train/cats/e.jpg": encoded(photo(5).convert("CMYK")),
            "train/dogs/f.jpg": encoded(photo(6).convert("L")),
            "train/dogs/g.gif": encoded(photo(7), "GIF"),
            "train/dogs/h.jpg": encoded(photo(8, 400, 300), orientation=3),
            "train/dogs/i.jpg": encoded(photo(9, 400, 20)),
            "train/dogs/j.webp": encoded(photo(10), "WEBP"),
            "train/dogs/k.jpg": encoded(photo(11, 32, 32), "MPO", save_all=True, append_images=[photo(12, 32, 32)]),
            "valid/cats/a.jpg": 20,
            "valid/dogs/b.jpg": 21,
        }
    )
    return scan(root, progress=False).splits["train"]


def joined(batches):
    batches = list(batches)
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 16])
def test_every_image_counts_once(images, batch_size, workers):
    batches = list(evaluation_batches(images, preprocess=SMALL, batch_size=batch_size, workers=workers))
    assert len(batches) == -(-11 // batch_size)
    for batch in batches:
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            "image": ((batch_size, 32, 32, 3), np.uint8),
            "label": ((batch_size,), np.int32),
            "mask": ((batch_size,), np.bool_),
            "index": ((batch_size,), np.int32),
        }
    whole = joined(batches)
    mask = whole["mask"]
    assert whole["index"][mask].tolist() == list(range(11))
    assert whole["label"][mask].tolist() == images.labels.tolist()
    assert not whole["image"][~mask].any()
    assert set(whole["index"][~mask]) <= {-1}
    assert set(whole["label"][~mask]) <= {0}


def test_pixels_through_tf_data_are_those_without(images):
    batch = joined(evaluation_batches(images, preprocess=SMALL, batch_size=4))
    for row, path in enumerate(images.paths):
        np.testing.assert_array_equal(batch["image"][row], evaluation_pixels(images.root / path, SMALL))


def test_real_photos_through_tf_data_are_plain_pillow(real_photos):
    split, _ = scan_unlabelled(real_photos / "valid", progress=False)
    rows = np.arange(0, len(split), 25)
    batch = joined(evaluation_batches(split, preprocess=Preprocess(), batch_size=16, indices=rows))
    for row, pixels in zip(rows, batch["image"], strict=False):
        image = Image.open(split.root / split.paths[row])
        width, height = image.size
        wide, high = (224, int(224 * height / width)) if width <= height else (int(224 * width / height), 224)
        left, top = round((wide - 224) / 2), round((high - 224) / 2)
        resized = image.resize((wide, high), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(pixels, np.asarray(resized.crop((left, top, left + 224, top + 224))))


def test_indices_choose_and_order(images):
    batch = joined(evaluation_batches(images, preprocess=SMALL, batch_size=2, indices=[7, 0, 3]))
    assert batch["index"].tolist() == [7, 0, 3, -1]
    np.testing.assert_array_equal(batch["image"][0], evaluation_pixels(images.root / images.paths[7], SMALL))


def test_nothing_to_evaluate_gives_no_batches(images):
    assert list(evaluation_batches(images, preprocess=SMALL, batch_size=2, indices=[])) == []


ORDER = np.array([[3, 9, 0], [6, 1, 10], [2, 5, 8]])


@pytest.mark.parametrize("workers", [1, 4])
def test_training_sees_evaluations_pixels_in_the_order_given(images, workers):
    batches = list(training_batches(images, preprocess=SMALL, order=ORDER, workers=workers))
    assert [batch["index"].tolist() for batch in batches] == ORDER.tolist()
    batch = joined(batches)
    assert {key: value.dtype for key, value in batch.items()} == {
        "image": np.uint8,
        "label": np.int32,
        "mask": np.bool_,
        "index": np.int32,
    }
    assert batch["mask"].all()
    assert batch["label"].tolist() == images.labels[ORDER.ravel()].tolist()
    for row, pixels in zip(ORDER.ravel(), batch["image"], strict=True):
        np.testing.assert_array_equal(pixels, evaluation_pixels(images.root / images.paths[row], SMALL))


def test_an_epoch_continues_from_its_middle(images):
    whole, rest = (joined(training_batches(images, preprocess=SMALL, order=order)) for order in (ORDER, ORDER[1:]))
    for key in whole:
        np.testing.assert_array_equal(rest[key], whole[key][3:])


def test_training_images_come_in_the_size_asked_for(images):
    """Augmentation cuts its window from an image larger than the network's."""
    larger = Preprocess(size=37)
    batch = joined(training_batches(images, preprocess=larger, order=ORDER))
    assert batch["image"].shape == (9, 37, 37, 3)
    path = images.root / images.paths[3]
    np.testing.assert_array_equal(batch["image"][0], evaluation_pixels(path, larger))


def both_kinds(split):
    yield training_batches(split, preprocess=SMALL, order=ORDER)
    yield evaluation_batches(split, preprocess=SMALL, batch_size=4)


def test_a_file_that_went_away_is_named(images):
    (images.root / images.paths[1]).unlink()
    for batches in both_kinds(images):
        with pytest.raises(UserError, match=r"train/cats/b\.jpg: .*can't be now \(no such file"):
            list(batches)


@pytest.mark.parametrize("name", ["a.jpg", "d.png"])
def test_a_file_that_was_spoilt_is_named(images, name):
    path = images.root / "train/cats" / name
    path.write_bytes(path.read_bytes()[:200])
    for batches in both_kinds(images):
        with pytest.raises(UserError, match=f"train/cats/{name}: ") as caught:
            list(batches)
        assert "\n" not in str(caught.value)


def test_batches_asked_for_while_the_interpreter_exits_are_quiet(folder):
    """Python ends its thread pools before it calls what was registered for its exit; TensorFlow goes on in between."""
    root = folder({f"{i:02d}.jpg": i for i in range(40)})
    code = f"""
import atexit, time
from jaxcats.data import pipeline
from jaxcats.data.index import scan_unlabelled
from jaxcats.data.images import Preprocess, evaluation_pixels

def slowly(path, preprocess):
    time.sleep(0.05)
    return evaluation_pixels(path, preprocess)

pipeline.evaluation_pixels = slowly
split, _ = scan_unlabelled({str(root)!r})
batches = pipeline.evaluation_batches(split, preprocess=Preprocess(size=32), batch_size=2, workers=1)
print(next(batches)["index"].tolist())
atexit.register(time.sleep, 0.5)
"""
    env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "1"}  # JAX's own setting, which shows TensorFlow's warnings
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1]\n", "")


def test_stopping_early_is_quiet_and_leaves_tensorflow_without_a_gpu(folder):
    root = folder({f"{i:02d}.jpg": i for i in range(40)})
    code = f"""
import sys
from jaxcats.data.index import scan_unlabelled
from jaxcats.data.pipeline import evaluation_batches, training_batches
from jaxcats.data.images import Preprocess
split, _ = scan_unlabelled({str(root)!r})
batches = evaluation_batches(split, preprocess=Preprocess(size=32), batch_size=2)
assert "tensorflow" not in sys.modules
print(next(batches)["index"].tolist())
order = [[i, i + 1] for i in range(0, 40, 2)]
training = training_batches(split, preprocess=Preprocess(size=32), order=order)
print(next(training)["index"].tolist())
import tensorflow as tf
print(tf.config.get_visible_devices("GPU"))
del batches
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1]\n[0, 1]\n[]\n", "")
