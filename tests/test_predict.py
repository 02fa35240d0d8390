"""Predictions of an exported classifier, from Python and from the command line."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from artefacts import CLASSES, PREPROCESS, export
from PIL import Image

import jaxcats
from jaxcats import predict
from jaxcats.common.cli import run_command
from jaxcats.common.errors import RunError, UserError
from jaxcats.data.images import evaluation_pixels
from jaxcats.export import artifact
from jaxcats.export import classifier as classifier_module


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture(scope="module")
def loaded(model):
    return classifier_module.Classifier(artifact.read(model))


@pytest.fixture(scope="module")
def photos_(tmp_path_factory) -> Path:
    """1.png to 40.png, each of another size and colour."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(1, 41):
        pixels = rng.integers(0, 256, (4, 5 + i % 7, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((30 + i, 50 - i // 2)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def files(photos_) -> list[str]:
    return [str(photos_ / f"{i}.png") for i in range(1, 41)]


def program_output(verified: artifact.Artifact, paths) -> np.ndarray:
    pixels = np.stack([evaluation_pixels(path, PREPROCESS) for path in paths])
    return np.asarray(verified.exported.call(verified.tensors, pixels))


def test_every_kind_of_image_gets_the_programs_answer(model, files, photos_):
    classifier = jaxcats.load(model)
    expected = program_output(artifact.read(model), files[:5])
    first = expected[:1]
    for given in (files[0], Path(files[0]), [files[0]], Path(files[0]).read_bytes(), Image.open(files[0])):
        np.testing.assert_allclose(classifier.predict(given).probabilities, first, atol=1e-5)
    pixels = [np.asarray(Image.open(f)) for f in files[:5]]
    np.testing.assert_allclose(classifier.predict(pixels).probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(
        classifier.predict(np.stack([pixels[0]] * 3)).probabilities, expected[[0] * 3], atol=1e-5
    )
    np.testing.assert_allclose(classifier.predict(np.array(files[:5])).probabilities, expected, atol=1e-5)
    mixed = [files[0], Path(files[1]).read_bytes(), pixels[2], Image.fromarray(pixels[3])]
    np.testing.assert_allclose(classifier.predict(mixed).probabilities, expected[:4], atol=1e-5)
    grey = pixels[0][..., 0]
    assert classifier.predict(grey).labels == classifier.predict(np.stack([grey] * 3, -1)).labels
    assert len(classifier.predict([])) == 0


def test_the_columns_and_rows_say_the_same(loaded, files):
    predictions = loaded.predict(files)
    assert predictions.classes == loaded.classes == CLASSES
    assert predictions.probabilities.shape == (40, 3)
    assert predictions.probabilities.dtype == np.float32
    np.testing.assert_allclose(predictions.probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(predictions.confidence, predictions.probabilities.max(1))
    assert predictions.labels == [CLASSES[i] for i in predictions.probabilities.argmax(1)]
    np.testing.assert_array_equal(predictions.abstain, predictions.confidence < 0.6)
    assert 0 < predictions.abstain.sum() < 40  # or this says nothing
    assert (predictions.paths, predictions.errors) == (files, [None] * 40)
    assert predictions[3].path == files[3]
    assert predictions[3].label == predictions.labels[3]
    assert [row.label for row in predictions] == predictions.labels
    assert predictions[2:4].labels == predictions.labels[2:4]
    assert f"{files[0]}: {predictions.labels[0]} {predictions.confidence[0]:.4f}" in repr(predictions)
    assert "and 20 more" in repr(predictions)
    assert "tiny, 3 classes (cats, dogs" in repr(loaded)


def test_an_images_numbers_are_its_own(loaded, files):
    """Alone or among others, in any order, with any batch size."""
    together = loaded.predict(files).probabilities
    alone = np.concatenate([loaded.predict(f).probabilities for f in files])
    np.testing.assert_allclose(alone, together, atol=1e-5)
    for batch_size in (1, 3, 11, 64):
        turned = loaded.predict(files[::-1], batch_size=batch_size).probabilities
        np.testing.assert_allclose(turned[::-1], together, atol=1e-5)


def test_few_programs_are_compiled_however_many_images(loaded, files, monkeypatch):
    sizes = set()

    def call(tensors, images):
        sizes.add(len(images))
        return np.full((len(images), 3), 1 / 3, np.float32)

    monkeypatch.setattr(loaded, "_call", call)
    for n in range(1, 41, 3):
        loaded.predict(files[:n], batch_size=11)
    assert sizes == {1, 8, 11}


def test_tta_averages_changed_versions_of_an_image_the_same_whatever_comes_with_it(loaded, files):
    plain, four = (loaded.predict(files, batch_size=8, tta=n).probabilities for n in (0, 4))
    np.testing.assert_allclose(four.sum(1), 1, atol=1e-5)
    assert 1e-4 < np.abs(four - plain).mean() < 0.2
    turned = loaded.predict(files[::-1][:39], batch_size=8, tta=4).probabilities
    np.testing.assert_allclose(turned[::-1], four[1:], atol=1e-5)
    np.testing.assert_allclose(loaded.predict(files[3], tta=4).probabilities, four[3:4], atol=1e-5)


@pytest.fixture
def bad(tmp_path) -> dict[str, str]:
    """Paths that can't be used, and a word of the reason."""
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.jpg").touch()
    (folder / "link.jpg").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.jpg")
    Image.effect_noise((64, 64), 90).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:400])
    reasons = {
        "text.jpg": "not an image",
        "empty.jpg": "empty",
        "link.jpg": "broken link",
        "pipe.jpg": "not an ordinary file",
        "cut.jpg": "truncated",
        "missing.jpg": "no such file",
    }
    return {str(folder / name): reason for name, reason in reasons.items()}


def test_bad_files_are_rows_with_their_reason_and_the_rest_is_predicted(loaded, files, bad):
    mixed = [name for pair in zip(bad, files, strict=False) for name in pair]
    predictions = loaded.predict(mixed, batch_size=4)
    np.testing.assert_allclose(
        predictions.probabilities[1::2], loaded.predict(files[: len(bad)]).probabilities, atol=1e-5
    )
    assert np.isnan(predictions.probabilities[::2]).all()
    assert np.isnan(predictions.confidence[::2]).all()
    for error, reason in zip(predictions.errors[::2], bad.values(), strict=True):
        assert reason in error
    assert predictions.errors[1::2] == [None] * len(bad)
    assert predictions.labels[::2] == [None] * len(bad)
    assert not predictions.abstain[::2].any()
    assert "empty" in repr(predictions)
    assert loaded.predict(list(bad)).labels == [None] * len(bad)


@pytest.mark.parametrize(
    "given",
    [[3], np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), [None]],
    ids=["number", "floats", "four channels", "no pixels", "nothing"],
)
def test_what_is_no_image_at_all_is_a_mistake(loaded, given):
    with pytest.raises(UserError, match="is no image"):
        loaded.predict(given)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2.0}, {"tta": -1}, {"tta": True}])
def test_options_that_cannot_be_are_mistakes(loaded, files, options):
    with pytest.raises(UserError, match="can't be used"):
        loaded.predict(files, **options)


def test_a_stream_holds_few_images_at_a_time(loaded, files):
    taken = []

    def paths():
        for i in range(1000):
            taken.append(i)
            yield files[i % 40]

    rows = loaded.stream(paths(), batch_size=4)
    assert next(rows).label
    assert len(taken) < 40
    rows.close()
    assert len(taken) < 40


def test_probabilities_that_are_not_numbers_stop_it(loaded, files, monkeypatch):
    monkeypatch.setattr(loaded, "_call", lambda *_: np.full((1, 3), np.nan, np.float32))
    with pytest.raises(RunError, match="not numbers"):
        loaded.predict(files[0])


def command(*words) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of predict."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = run_command(predict.main, [str(word) for word in words])
    return code, out.buffer.getvalue().decode("utf-8", "surrogateescape"), err.getvalue()  # type: ignore[attr-defined]


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_the_table_has_a_line_per_image(model, photos_, loaded, files):
    code, out, err = command("--model", model, files[0], photos_ / "2.png", "--batch_size", 4)
    assert (code, len(out.splitlines())) == (0, 2)
    predictions = loaded.predict(files[:2])
    for line, row in zip(out.splitlines(), predictions, strict=True):
        assert line.split()[0] == row.path
        assert f"{row.probability:.4f}" in line
        assert ("unsure" in line) == row.abstain
    assert "\u200b" not in out  # a class's name that can't be seen is escaped
    assert "2 images in" in err


def test_csv_and_jsonl_hold_the_numbers(model, photos_, loaded, files, tmp_path, bad):
    gone = next(iter(bad))
    out = tmp_path / "p.csv"
    code, stdout, err = command("--model", model, *files, gone, "--csv", out, "--jsonl", tmp_path / "p.jsonl")
    assert (code, stdout) == (1, "")
    assert "stopped: 1 of 41 images can't be used" in err
    expected = loaded.predict([*files, gone])
    table = rows_of(out.read_text())
    assert [r["path"] for r in table] == expected.paths
    assert [r["label"] or None for r in table] == expected.labels
    assert [r["abstain"] == "yes" for r in table] == expected.abstain.tolist()
    numbers = np.array([[float(r[f"p_{c}"] or "nan") for c in CLASSES] for r in table])
    np.testing.assert_allclose(numbers, expected.probabilities, atol=1e-5)
    assert (table[-1]["error"], table[-1]["abstain"], table[-1]["probability"]) == (expected.errors[-1], "", "")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == expected.labels
    assert lines[-1]["p_cats"] is None
    assert lines[0]["p_cats"] == pytest.approx(float(table[0]["p_cats"]), abs=1e-6)
    code, stdout, _ = command("--model", model, *files, gone, "--csv", "-")
    assert stdout == out.read_text()


def test_folders_patterns_and_runs(model, photos_, tmp_path):
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    shutil.copy(photos_ / "1.png", deep / "x.png")
    shutil.copy(photos_ / "2.png", tmp_path / "a" / "y.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    shutil.copytree(model, tmp_path / "run" / "model")

    def paths(*words) -> list[str]:
        code, out, err = command("--model", tmp_path / "run", *words, "--csv", "-")
        assert code == 0, err
        return [os.path.relpath(r["path"], tmp_path) for r in rows_of(out)]

    assert paths(tmp_path / "a") == ["a/b/x.png", "a/y.png"]
    assert paths(f"{tmp_path}/**/*.png") == ["a/b/x.png", "a/y.png"]
    assert paths(f"{tmp_path}/a/[y]*") == ["a/y.png"]
    (tmp_path / "[1].png").write_bytes((photos_ / "1.png").read_bytes())
    assert paths(tmp_path / "[1].png") == ["[1].png"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\0"])
def test_a_list_on_stdin(model, photos_, tmp_path, monkeypatch, end):
    names = [b"plain.png", "ä, b.png".encode(), b"\xff\xfe.png"] + ([b"two\nlines.png"] if end == b"\0" else [])
    for name in names:
        shutil.copy(os.fsencode(photos_ / "1.png"), os.path.join(os.fsencode(tmp_path), name))
    given = [os.path.join(os.fsencode(tmp_path), name) for name in names]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(end.join(given) + end)))
    code, out, err = command("--model", model, "-", "--csv", "-")
    assert code == 0, err
    assert [os.fsencode(r["path"]) for r in rows_of(out)] == given
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(end.join(given) + end)))
    code, out, _ = command("--model", model, "-")
    assert (code, len(out.splitlines())) == (0, len(names))


@pytest.mark.parametrize("words", [["empty"], ["empty/*.png"], ["-"]])
def test_nothing_to_predict_is_a_mistake(model, tmp_path, monkeypatch, words):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    code, out, err = command("--model", model, *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere", "x.png"], "not an exported classifier"),
        (["x.png"], "--model: is required"),
        (["--model", "M", "--csv", "-", "--jsonl", "-", "x.png"], "only one"),
        (["--model", "M", "--csv", "/nowhere/x.csv", "x.png"], "can't be written"),
        (["--model", "M", "--csv", ".", "x.png"], "can't be written"),
        (["--model", "M", "--tta", "-1", "x.png"], "tta: -1"),
        (["--model", "M", "--batch_size", "0", "x.png"], "batch_size: 0"),
        (["--model", "M", "--kaggle", "s.csv", "x.png"], "number in the file's name"),
        (["--model", "M", "--kaggle", "s.csv", "1.png", "cat.1.png"], "has the same id as 1.png"),
        (["--model", "M", "--kaggle", "s.csv", "1.png"], "two classes"),
        (["--model", "M", "--show", "s.png", "x.png"], "none of the images"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(model, words, message):
    code, _, err = command(*[model if word == "M" else word for word in words])
    assert code == 2
    assert message in err.splitlines()[-1]


def test_a_submission_has_every_id_once_in_order(model, photos_, tmp_path, monkeypatch, bad):
    folder = tmp_path / "test"
    folder.mkdir()
    for name in ("10.png", "2.png", "dog.3.png"):
        shutil.copy(photos_ / "1.png", folder / name)
    (folder / "7.png").write_text("no image")

    class Two:
        classes = ("cats", "dogs")

        def stream(self, paths, **_):
            for path in paths:
                p = {"10.png": 1.0, "2.png": 0.25, "dog.3.png": 1e-9}.get(Path(path).name)
                error = None if p is not None else "not an image"
                both = np.array([1 - (p or 0), p or 0], np.float32)
                yield classifier_module.Prediction(path, "dogs", float(both.max()), False, error, both)

    monkeypatch.setattr(classifier_module, "load", lambda _: Two())
    code, out, _ = command("--model", model, folder, "--kaggle", tmp_path / "s.csv")
    assert (code, out) == (1, "")
    assert (tmp_path / "s.csv").read_text() == "id,label\n2,0.25\n3,0.005\n7,0.5\n10,0.995\n"


def test_a_contact_sheet_shows_the_images(model, files, tmp_path):
    code, out, _ = command("--model", model, *files[:3], "--show", tmp_path / "sheet.png")
    assert (code, len(out.splitlines())) == (0, 3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.asarray(sheet.convert("L")).std() > 5


def test_ctrl_c_leaves_no_half_file(model, files, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(classifier_module.Classifier, "_rows", stop)
    code, *_ = command("--model", model, *files, "--csv", tmp_path / "p.csv")
    assert (code, list(tmp_path.iterdir())) == (130, [])


HEAVY = [
    "flax",
    "optax",
    "orbax",
    "tensorflow",
    "yaml",
    "jsonargparse",
    "sklearn",
    "scipy.optimize",
    "tqdm",
    "matplotlib",
]


def test_predicting_needs_none_of_the_libraries_that_training_needs(model, files, own_cache):
    """And a reader that goes away early (`| head`) is no error."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"  # None there makes the import fail
        "from jaxcats import predict; from jaxcats.common.cli import run_command; sys.exit(run_command(predict.main))"
    )
    words = [sys.executable, "-c", code, "--model", str(model), *files[:2], "--csv", "-"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 3), done.stderr
    closed = '"$@" | true; exit "${PIPESTATUS[0]}"'
    done = subprocess.run(["bash", "-c", closed, "_", *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_ten_lines_without_jaxcats_give_the_same(model, files, loaded):
    script = Path(__file__).parents[1] / "scripts" / "standalone_predict.py"
    done = subprocess.run([sys.executable, script, model, *files[:2]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for line, row in zip(done.stdout.splitlines(), loaded.predict(files[:2]), strict=True):
        path, _, stdout = line.partition(" ")
        numbers = list(jax.tree.leaves(eval(stdout)))  # a dictionary of our own printing
        assert path == row.path
        np.testing.assert_allclose(sorted(numbers), sorted(row.probabilities), atol=1e-5)


@pytest.mark.parametrize("flag", ["--csv", "--jsonl", "--kaggle", "--show"])
def test_an_output_never_replaces_an_image_or_a_device(flag, tmp_path, capfd):
    photo, pipe = tmp_path / "a.png", tmp_path / "pipe.png"
    photo.write_bytes(b"a photo")
    os.mkfifo(pipe)
    for target in (photo, pipe):
        assert run_command(predict.main, ["--model", str(tmp_path), str(photo), flag, str(target)]) == 2
        assert flag in capfd.readouterr().err
    assert photo.read_bytes() == b"a photo"
    assert pipe.is_fifo()


def test_two_outputs_can_not_share_a_file(tmp_path, capfd):
    both = str(tmp_path / "x.csv")
    assert run_command(predict.main, ["--model", str(tmp_path), "a.jpg", "--csv", both, "--jsonl", both]) == 2
    assert "is an input or another output already" in capfd.readouterr().err
