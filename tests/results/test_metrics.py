"""Counts, intervals and losses, against other formulas and published values."""

import math

import numpy as np
import pytest

from jaxcats.results.metrics import (
    log_softmax,
    percent_digits,
    sentence,
    summary,
    table_head,
    table_row,
    wilson_interval,
)


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


def test_nothing_to_judge_is_no_number():
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
