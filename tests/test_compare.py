"""Two runs on the same images: the test, the interval, what is printed, and what a slip gets."""

import csv
import json
import subprocess
import sys
from fractions import Fraction
from math import comb

import numpy as np
import pytest

from jaxcats.common.errors import UserError
from jaxcats.compare import main
from jaxcats.evaluate.comparison import Prediction, compare_predictions, mcnemar_exact, paired_interval


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (0, 5), (6, 0), (3, 3), (2, 9), (10, 25), (400, 460)])
def test_mcnemar_is_the_exact_binomial(b, c):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b) == pytest.approx(theirs)


def test_mcnemar_is_statsmodels():
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    assert mcnemar_exact(3, 14) == pytest.approx(tables.mcnemar([[50, 3], [14, 7]], exact=True).pvalue)


def test_mcnemar_by_hand_and_of_many_pairs():
    assert mcnemar_exact(1, 7) == 2 * (comb(8, 0) + comb(8, 1)) / 2**8
    exact = 2 * sum(Fraction(comb(4000, i)) for i in range(1901)) / 2**4000
    assert mcnemar_exact(1900, 2100) == pytest.approx(float(exact))
    assert mcnemar_exact(0, 5000) == 0.0  # smaller than any float, and no error


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((1, 1, 7, 12), -0.507, -0.026),  # Bentur 2009 and Cavo 2012, in Fagerland, Lydersen, Laake 2017, chapter 8
        ((59, 6, 16, 80), -0.1186, -0.0046),
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe 1998, table II
    ],
)
def test_the_interval_is_the_published_one(counts, low, high):
    assert paired_interval(*counts) == pytest.approx((low, high), abs=6e-5 if abs(low) < 0.5 else 6e-4)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    p = [0.95, 0.03, 0.012, 0.008]  # both, only the first, only the second, neither
    drawn = rng.multinomial(500, p, 2000)
    held = [low <= p[1] - p[2] <= high for low, high in (paired_interval(*map(int, row)) for row in drawn)]
    assert 0.93 <= np.mean(held) <= 0.98


@pytest.mark.parametrize("counts", [(9, 0, 0, 0), (0, 0, 0, 9), (0, 9, 0, 0), (5, 0, 0, 5)])
def test_the_interval_of_a_lopsided_table_holds_its_middle(counts):
    low, high = paired_interval(*counts)
    n = sum(counts)
    assert -1 - 1e-9 <= low <= (counts[1] - counts[2]) / n <= high <= 1 + 1e-9
    assert low < high


def predictions(file, rows, *, classes=("cats", "dogs"), extra=()):
    """Writes a predictions.csv: rows of (path, label, probability of the second of two classes)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        table = csv.writer(out)
        table.writerow(["path", "label", "predicted", *extra, *(f"p_{c}" for c in classes)])
        for path, label, p in rows:
            table.writerow([path, label, classes[int(p > 0.5)], *("no" for _ in extra), 1 - p, p])
    return file


def answers(wrong, n=100):
    """n images of cats, those of `wrong` taken for dogs."""
    return {
        f"valid/{i}.jpg": Prediction("cats", "dogs" if i in wrong else "cats", 0.2 if i in wrong else 0.9)
        for i in range(n)
    }


def test_the_four_kinds_of_images_are_counted():
    found = compare_predictions(answers({1, 2, 3, 4, 5}), answers({5, 6, 7}))
    assert (found.both_right, found.only_a_wrong, found.only_b_wrong, found.both_wrong) == (93, 4, 2, 1)
    assert (found.n, found.only_in_a, found.only_in_b) == (100, 0, 0)
    assert found.p == mcnemar_exact(4, 2)
    assert found.interval == paired_interval(93, 4, 2, 1)
    assert found.interval[0] < 0.02 < found.interval[1]
    assert sorted(path for path, _, _ in found.changed) == [f"valid/{i}.jpg" for i in (1, 2, 3, 4, 6, 7)]


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (set(range(20)), {1, 2}, "B is better (p < 0.0001)."),
        ({1}, set(range(7)) | {9, 10}, "A is better (p = 0.0078)."),
        ({1, 2, 3, 4, 5}, set(), "A and B can't be told apart (p = 0.062)."),
        ({1, 2}, {1, 2}, "A and B can't be told apart (p = 1)."),
    ],
)
def test_the_verdict_names_the_better_one_or_none(a, b, verdict):
    assert compare_predictions(answers(a), answers(b)).verdict == verdict


def test_another_wrong_class_is_no_change_of_sides():
    a, b = ({"x": Prediction("ant", guess, 0.1)} for guess in ("bee", "cow"))
    found = compare_predictions(a, b)
    assert (found.both_wrong, found.changed) == (1, [])


def test_the_command_prints_counts_verdict_and_changes(tmp_path, capsys):
    a = [(f"valid/{i}.jpg", "cats", 0.9 if i < 4 else 0.1) for i in range(1000)]
    b = [(f"valid/{i}.jpg", "cats", 0.6 if i == 9 else 0.2) for i in range(998)] + [("valid/new.jpg", "dogs", 1.0)]
    predictions(tmp_path / "a" / "predictions.csv", a)
    file = predictions(tmp_path / "b.csv", b, extra=("probability", "abstain"))
    main([str(tmp_path / "a"), str(file), "--out", str(tmp_path / "sides.csv")])
    said = capsys.readouterr().out
    assert "a: 4 errors of 998 (" in said
    assert "b.csv: 1 error of 998 (" in said
    assert "998 images compared; left out: 2 only in A, 1 only in B." in said
    for line in ("993  both right", "4  only A wrong", "1  only B wrong", "0  both wrong"):
        assert line in said
    assert "A and B can't be told apart (p = 0.38)." in said
    assert "+0.3 points" in said
    assert "only A wrong  A 0.1000  B 0.8000  valid/0.jpg" in said
    rows = list(csv.reader((tmp_path / "sides.csv").open(newline="")))
    assert rows[0] == ["path", "label", "predicted_a", "predicted_b", "probability_a", "probability_b"]
    assert [row[0] for row in rows[1:]] == [f"valid/{i}.jpg" for i in (0, 1, 2, 3, 9)]
    assert rows[5][1:4] == ["cats", "cats", "dogs"]


def test_at_most_twenty_changes_are_printed_the_largest_first(tmp_path, capsys):
    a = predictions(tmp_path / "a.csv", [(f"{i}.jpg", "dogs", 0.51 + i / 100) for i in range(30)])
    b = predictions(tmp_path / "b.csv", [(f"{i}.jpg", "dogs", 0.2) for i in range(30)])
    main([str(a), str(b), "--out", str(tmp_path / "all.csv")])
    shown = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "only B wrong  A" in line]
    assert shown == [f"{i}.jpg" for i in range(29, 9, -1)]
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 31


def test_strange_names_keep_to_their_line(tmp_path):
    names = ["two\nlines.jpg", "a,comma.jpg", "\udcff\udcfe.jpg", 'quo"te.jpg']
    a = predictions(tmp_path / "a.csv", [(name, "cats", 0.9) for name in names])
    b = predictions(tmp_path / "b.csv", [(name, "cats", 0.1) for name in names])
    command = [sys.executable, "-X", "utf8", "-m", "jaxcats.compare", str(a), str(b), "--out", str(tmp_path / "c.csv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("  only A wrong  ")]
    assert [line.split("  ")[-1] for line in shown] == [
        "two\\nlines.jpg",
        "a,comma.jpg",
        "\\udcff\\udcfe.jpg",
        'quo"te.jpg',
    ]
    with (tmp_path / "c.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [row["path"] for row in csv.DictReader(file)] == names


def test_a_best_epoch_chosen_on_these_images_is_said(tmp_path, capsys):
    for name, used in (("a", ["choosing the best epoch"]), ("b", [])):
        predictions(tmp_path / name / "predictions.csv", [("x.jpg", "cats", 0.1)])
        (tmp_path / name / "config.yaml").write_text("{}")
        (tmp_path / name / "metrics.json").write_text(json.dumps({"checkpoint": {"valid_used_for": used}}))
    main([str(tmp_path / "a"), str(tmp_path / "b")])
    said = capsys.readouterr().out
    assert "A's best epoch was chosen on its validation images" in said
    assert "B's best epoch" not in said


GOOD = [("x.jpg", "cats", 0.1), ("y.jpg", "dogs", 0.9)]
HEAD = "path,label,predicted,p_cats,p_dogs\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + "x.jpg,dogs,cats,1,0\n", "x.jpg: is 'cats' in A and 'dogs' in B"),
        (HEAD + "z.jpg,cats,cats,1,0\n", "no image in common"),
        (HEAD, "no image in common"),
        (HEAD + "x.jpg,,cats,1,0\n", "x.jpg has no label"),
        (HEAD + "x.jpg,cats,cats,1,0\nx.jpg,cats,cats,1,0\n", "damaged at line 3"),
        ("path,label,predicted,p_ants,p_bees\nx.jpg,ants,ants,1,0\n", "A has the classes cats, dogs; B has ants, bees"),
        ("", "not a predictions.csv"),
        ("id,label\n1,cat\n", "not a predictions.csv"),
        (HEAD + "x.jpg,cats,cats\n", "damaged at line 2"),
        (HEAD + "x.jpg,cats,cats,nan,nan\n", "damaged at line 2"),
        (HEAD + "x.jpg,cats,cats,1,0\ny.jpg,cows,cats,1,0\n", "damaged at line 3"),
        (HEAD + "x.jpg,cats,cows,1,0\n", "damaged at line 2"),
        (HEAD + '"x.jpg,cats,cats,1,0\n', "damaged at line 2"),
    ],
)
def test_what_can_not_be_compared_is_one_line(tmp_path, text, words):
    a = predictions(tmp_path / "a.csv", GOOD)
    b = tmp_path / "b.csv"
    b.write_text(text)
    with pytest.raises(UserError) as e:
        main([str(a), str(b)])
    assert words in str(e.value)


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"predictions\.csv"):
        main([str(tmp_path), str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="no_such"):
        main([str(tmp_path / "no_such"), str(tmp_path)])


def test_it_starts_without_jax_or_scikit_learn():
    code = "import sys, jaxcats.compare; print(sorted({'jax', 'sklearn', 'scipy', 'tensorflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"
