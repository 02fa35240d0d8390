"""Counts, intervals and losses, against scikit-learn, other formulas and published values."""

import json
import math

import numpy as np
import pytest

from jaxcats.common.errors import UserError
from jaxcats.common.stats import brier, log_softmax, percent_digits, sentence, summary, wilson_interval
from jaxcats.evaluate.calibration import Calibration, abstain_metrics, assign_folds, fit_temperature
from jaxcats.evaluate.metrics import area_under_roc, evaluation_metrics, table
from jaxcats.train.epoch_table import table_head, table_row


@pytest.mark.parametrize(
    ("errors", "n", "low", "high"),
    [
        (21, 2000, 0.984, 0.993),
        (16, 2000, 0.987, 0.995),
    ],
)
def test_the_lessons_two_results_overlap(errors, n, low, high):
    assert wilson_interval(n - errors, n) == pytest.approx((low, high), abs=5e-4)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_newcombes_examples(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 10, 120, 1000, 23000])
def test_the_bounds_are_where_the_score_test_turns(n):
    """The definition: p is inside while |successes/n - p| <= z * sqrt(p (1 - p) / n)."""
    z = 1.959963984540054
    for successes in {0, 1, n // 3, n - 1, n}:
        low, high = wilson_interval(successes, n)
        assert 0 <= low <= successes / n <= high <= 1
        for bound in (low, high):
            if 0 < bound < 1:
                assert abs(successes / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-9)


def test_the_interval_at_its_ends():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    assert wilson_interval(3, 10) == pytest.approx([1 - x for x in reversed(wilson_interval(7, 10))])


@pytest.mark.parametrize(
    ("errors", "n", "text"),
    [
        (9, 1000, "9 errors of 1,000 (99.1 %, 95 % interval 98.3 to 99.5 %)"),
        (0, 1000, "0 errors of 1,000 (100.0 %, 95 % interval 99.6 to 100.0 %)"),
        (1000, 1000, "1,000 errors of 1,000 (0.0 %, 95 % interval 0.0 to 0.4 %)"),
        (1, 120, "1 error of 120 (99.2 %, 95 % interval 95.4 to 99.9 %)"),
        (0, 1, "0 errors of 1 (100.0 %, 95 % interval 20.7 to 100.0 %)"),
        (1, 1, "1 error of 1 (0.0 %, 95 % interval 0.0 to 79.3 %)"),
        (21, 2000, "21 errors of 2,000 (98.95 %, 95 % interval 98.40 to 99.31 %)"),
    ],
)
def test_the_sentence(errors, n, text):
    assert sentence(errors, n) == text


@pytest.mark.parametrize("n", [5, 99, 1000, 1001, 10_000, 23_262])
def test_one_error_is_never_rounded_away(n):
    assert f"({100:.{percent_digits(n)}f} %" not in sentence(1, n)


def test_log_loss_by_hand():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.25, 0.5, 0.25]]))
    logits += np.array([[5.0], [-300.0], [1000.0]])  # a constant per row changes nothing
    found = summary(logits, np.array([0, 1, 1]))
    assert found["log_loss"] == pytest.approx(-(math.log(0.7) + math.log(0.3) + math.log(0.5)) / 3)
    assert (found["n"], found["errors"], found["accuracy"]) == (3, 1, 2 / 3)
    assert found["interval"] == list(wilson_interval(2, 3))


def test_extreme_logits_stay_finite():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(-1), 1)
    assert summary(logits, np.array([0, 1]))["log_loss"] == 0
    assert summary(logits, np.array([1, 1]))["log_loss"] == pytest.approx(1e4)


def test_probabilities_of_a_half_precision_network_sum_to_one():
    import ml_dtypes

    logits = np.random.default_rng(0).normal(size=(50, 37)).astype(ml_dtypes.bfloat16)
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(-1), 1, rtol=1e-12)


def test_no_images_give_no_number():
    found = summary(np.zeros((0, 2)), np.zeros(0, int))
    assert (found["n"], found["errors"], found["accuracy"], found["log_loss"]) == (0, 0, None, None)
    assert found["interval"] == [0.0, 1.0]


ROWS = [
    {
        "phase": "head",
        "epoch": 0,
        "train_loss": 0.67436,
        "valid_loss": 0.23768,
        "errors": 13,
        "n": 120,
        "seconds": 2.8,
        "images_per_second": 93.1,
    },
    {
        "phase": "all",
        "epoch": 12,
        "train_loss": 12.5,
        "valid_loss": 1.0,
        "errors": 1234,
        "n": 23262,
        "seconds": 1234.5,
        "images_per_second": 12345.6,
    },
]


@pytest.mark.parametrize("row", ROWS)
def test_the_table_lines_up_under_its_head(row):
    row = row | {"interval": wilson_interval(row["n"] - row["errors"], row["n"])}
    head, line = table_head(), table_row(row)
    assert "\n" not in line
    for name, shown in (
        ("phase", row["phase"]),
        ("epoch", row["epoch"]),
        ("train loss", f"{row['train_loss']:.5f}"),
        ("valid loss", f"{row['valid_loss']:.5f}"),
        ("errors", f"{row['errors']:,}"),
        ("images/s", f"{row['images_per_second']:,.0f}"),
    ):
        end = head.index(name) + len(name)
        assert line[:end].endswith(str(shown)), name
    assert line[head.index("accuracy") :].startswith(
        f"{100 * (1 - row['errors'] / row['n']):.{percent_digits(row['n'])}f} %"
    )
    assert line[: head.index("time") + len("time")].endswith(f"{row['seconds']:.1f}")
    assert f"of {row['n']:,} " in line


@pytest.mark.parametrize(("right", "n"), [(0, 5), (1, 1), (7, 10), (990, 1000), (1000, 1000)])
def test_wilson_is_scipys(right, n):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson_interval(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_brier_by_hand():
    p = np.log([[0.9, 0.1], [0.4, 0.6]])
    assert brier(p, np.array([0, 0])) == pytest.approx((0.1**2 + 0.6**2) / 2)
    p = np.log([[0.7, 0.2, 0.1]])
    assert brier(p, np.array([1])) == pytest.approx(0.7**2 + 0.8**2 + 0.1**2)


def test_brier_is_scikit_learns():
    from sklearn.metrics import brier_score_loss

    logits, labels = drawn(200, 2)
    p = log_softmax(logits)
    assert brier(p, labels) == pytest.approx(brier_score_loss(labels, np.exp(p[:, 1])))


def test_auc_by_hand():
    # Of the four pairs of a first-class and a second-class image, three are in order and one is a tie.
    assert area_under_roc(np.array([1.0, 2.0, 2.0, 3.0]), np.array([0, 0, 1, 1])) == pytest.approx(3.5 / 4)
    assert area_under_roc(np.array([1.0, 2.0]), np.array([1, 1])) is None


def drawn(n, classes, *, seed=0, signal=4.0):
    """Logits of a classifier that is sometimes wrong, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(0, 2, (n, classes))
    logits[np.arange(n), labels] += signal
    return logits.astype(np.float32), labels


def named(classes):
    return [f"class{i:03}" for i in range(classes)]


@pytest.mark.parametrize("classes", [2, 3, 7, 100])
def test_the_metrics_agree_with_scikit_learn(classes):
    import sklearn.metrics as theirs

    logits, labels = drawn(600, classes)
    found, _ = evaluation_metrics(logits, labels, named(classes))
    predicted, p = logits.argmax(1), np.exp(log_softmax(logits))
    every = np.arange(classes)
    assert found["accuracy"] == pytest.approx(theirs.accuracy_score(labels, predicted))
    assert found["log_loss"] == pytest.approx(theirs.log_loss(labels, p, labels=every))
    assert found["balanced_accuracy"] == pytest.approx(theirs.balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(theirs.f1_score(labels, predicted, average="macro"))
    assert list(found["top_k"]) == [str(k) for k in (2, 3, 5) if k < classes]
    for k, top in found["top_k"].items():
        right = theirs.top_k_accuracy_score(labels, logits, k=int(k), labels=every, normalize=False)
        assert top == {"errors": 600 - right, "interval": list(wilson_interval(int(right), 600))}
    assert ("auc" in found) == (classes == 2)
    if classes == 2:
        assert found["auc"] == pytest.approx(theirs.roc_auc_score(labels, p[:, 1]))


def test_rows_and_columns_of_the_confusion_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    logits = np.eye(4)[[0, 1, 1, 1, 0, 0]]  # no image is predicted as 2; class 3 has no image
    found, _ = evaluation_metrics(logits, labels, ["ant", "bee", "cow", "dog"])
    assert found["confusion"] == [[1, 2, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    ant, bee, cow, dog = found["per_class"]
    assert (ant["n"], ant["predicted"], ant["right"]) == (3, 3, 1)
    assert (ant["precision"], ant["recall"], ant["f1"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert ant["recall_interval"] == list(wilson_interval(1, 3))
    assert (bee["precision"], bee["recall"], bee["f1"]) == pytest.approx((1 / 3, 1 / 2, 0.4))
    assert (cow["precision"], cow["recall"], cow["f1"]) == (None, 0, 0)
    assert (dog["n"], dog["precision"], dog["recall"], dog["f1"]) == (0, None, None, None)
    assert found["balanced_accuracy"] == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)
    assert found["macro_f1"] == pytest.approx((1 / 3 + 0.4 + 0) / 3)
    assert found["most_confused"] == [
        {"actual": "ant", "predicted": "bee", "n": 2},
        {"actual": "bee", "predicted": "ant", "n": 1},
        {"actual": "cow", "predicted": "ant", "n": 1},
    ]


ODD = {
    "one image": (*drawn(1, 2), 2),
    "one image, wrong": (np.array([[9.0, -9.0]]), np.array([1]), 2),
    "all of one class": (drawn(30, 2)[0], np.zeros(30, int), 2),
    "fewer images than folds": (*drawn(3, 3), 3),
    "fewer images than classes": (*drawn(20, 100), 100),
    "always right and sure": (np.repeat([[800.0, -800.0], [-800.0, 800.0]], 10, 0), np.repeat([0, 1], 10), 2),
    "always wrong and sure": (np.repeat([[800.0, -800.0], [-800.0, 800.0]], 10, 0), np.repeat([1, 0], 10), 2),
    "no opinion": (np.zeros((12, 3)), np.arange(12) % 3, 3),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD)
def test_odd_sets_give_plain_numbers_and_a_table(name):
    logits, labels, classes = ODD[name]
    found, calibration = evaluation_metrics(logits, labels, named(classes))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert 0.05 <= calibration.temperature <= 20
    assert "nan" not in table(found)
    again, same = evaluation_metrics(logits, labels, named(classes), calibration=calibration)
    json.dumps(again, allow_nan=False)
    assert same is calibration
    assert table(again)


def test_nothing_to_evaluate_is_said():
    with pytest.raises(UserError, match="no images"):
        evaluation_metrics(np.zeros((0, 2)), np.zeros(0, int), ["a", "b"])


def test_what_is_fitted_here_is_reported_out_of_fold():
    logits, labels = drawn(500, 2)
    logits *= 3
    found, calibration = evaluation_metrics(logits, labels, named(2), max_error=0.02)
    fold = assign_folds(labels)
    scaled = logits.astype(np.float64)
    for k in range(5):
        scaled[fold == k] /= fit_temperature(logits[fold != k], labels[fold != k])
    told = found["calibration"]
    assert calibration.temperature == told["temperature"] == fit_temperature(logits, labels)
    assert told["after"]["log_loss"] == pytest.approx(summary(scaled, labels)["log_loss"])
    assert told["before"]["log_loss"] == found["log_loss"] > told["after"]["log_loss"]
    assert told["before"]["ece"] > told["after"]["ece"]
    assert (told["fitted_on_these_pictures"], told["folds"], len(told["fold_temperatures"])) == (True, 5, 5)
    abstain = found["abstain"]
    sure = np.exp(log_softmax(logits / calibration.temperature)).max(1)
    here = abstain_metrics(calibration.is_answered(sure), logits.argmax(1) == labels)
    assert {k: abstain[k] for k in here} == here
    assert abstain["error"] <= abstain["max_error"] == calibration.max_error == 0.02
    assert abstain["out_of_fold"] != {k: here[k] for k in abstain["out_of_fold"]}


def test_what_was_chosen_elsewhere_is_applied_as_it_is():
    logits, labels = drawn(400, 3)
    chosen = Calibration(temperature=2.0, threshold=0.8, max_error=0.01)
    found, same = evaluation_metrics(logits, labels, named(3), calibration=chosen, max_error=0.5)
    told, abstain = found["calibration"], found["abstain"]
    assert same is chosen
    assert told["after"]["log_loss"] == pytest.approx(summary(logits / 2, labels)["log_loss"])
    assert (told["fitted_on_these_pictures"], told["folds"], told["fold_temperatures"]) == (False, None, None)
    assert abstain["max_error"] == 0.01
    assert abstain["answered"] == int((np.exp(log_softmax(logits / 2)).max(1) >= 0.8).sum())
    assert "out_of_fold" not in abstain
    assert "out of fold" not in table(found)


def test_the_table_names_the_worst_classes_and_fits_the_screen():
    logits, labels = drawn(900, 40)
    names = [f"a class\nwith a long name that goes on, and on, and on, number {i:02}" for i in range(40)]
    found, _ = evaluation_metrics(logits, labels, names)
    text = table(found)
    assert max(map(len, text.split("\n"))) <= 100
    f1 = sorted(row["f1"] for row in found["per_class"])
    assert [f"{x:.4f}" for x in f1[:10]] == [line[-6:] for line in text.split("\n") if line[-7:-4] == " 0."]
    assert "30 more" in text
    assert sum(" taken for " in line for line in text.split("\n")) == 5
    worst = min(found["per_class"], key=lambda row: row["f1"])["class"]
    assert f"number {worst[-2:]}" in text


@pytest.mark.parametrize(
    ("threshold", "words"),
    [
        (0.87654, "at a probability of 0.87654 or more"),
        (0.99987, "at a probability of 0.99987 or more"),
        (0.99999987, "at a probability of 0.99999987 or more"),
        (0.0, "at a probability of 0 or more"),
        (None, "Every prediction is given; there is no threshold"),
    ],
)
def test_the_table_says_when_answers_are_given(threshold, words):
    logits, labels = drawn(50, 2)
    text = table(evaluation_metrics(logits, labels, named(2), calibration=Calibration(1.0, threshold))[0])
    assert words in text


def test_the_table_says_when_no_threshold_will_do():
    logits, labels = np.array([[9.0, 0.0], [8.0, 0.0]]), np.array([1, 1])
    found, calibration = evaluation_metrics(logits, labels, named(2))
    assert calibration.threshold is None
    assert (found["abstain"]["answered"], found["abstain"]["errors"]) == (2, 2)
    assert "there is no threshold for at most 0.5 % errors" in table(found)
