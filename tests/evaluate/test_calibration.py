"""Temperature, calibration error and thresholds, against slow versions, closed cases and known truths."""

import math

import numpy as np
import pytest

from jaxcats.common.stats import log_softmax, wilson_interval
from jaxcats.evaluate import calibration
from jaxcats.evaluate.calibration import (
    Calibration,
    abstain_metrics,
    assign_folds,
    calibration_metrics,
    choose_threshold,
    cross_fit,
    ece_interval,
    expected_calibration_error,
    fit_calibration,
    fit_temperature,
    reliability,
    risk_coverage,
)


def at_threshold(confidence, correct, threshold):
    return abstain_metrics(Calibration(1.0, threshold).is_answered(confidence), correct)


def drawn(n, classes, *, scale, seed=0):
    """Logits that are `scale` times those the labels were drawn from: the right temperature is `scale`."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 3, (n, classes))
    labels = (honest + rng.gumbel(size=honest.shape)).argmax(-1)
    return scale * honest, labels


def log_loss(logits, labels, temperature):
    return -log_softmax(logits / temperature)[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5, 8.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_the_temperature_that_spoiled_the_logits_is_found(scale, classes):
    logits, labels = drawn(20_000 if classes == 2 else 4000, classes, scale=scale)
    assert fit_temperature(logits, labels) == pytest.approx(scale, rel=0.08)


def test_without_the_prior_no_other_temperature_is_better():
    logits, labels = drawn(500, 5, scale=3)
    found = fit_temperature(logits, labels, prior=0)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 4001))
    losses = [log_loss(logits, labels, t) for t in grid]
    assert log_loss(logits, labels, found) <= min(losses) + 1e-9
    assert found == pytest.approx(grid[np.argmin(losses)], rel=2e-3)


def test_the_prior_does_not_show_among_a_thousand_images():
    logits, labels = drawn(1000, 2, scale=2)
    assert fit_temperature(logits, labels) == pytest.approx(fit_temperature(logits, labels, prior=0), rel=0.03)


def test_a_few_right_answers_do_not_make_a_classifier_certain():
    logits, labels = np.tile([[math.log(9.0), 0.0]], (20, 1)), np.zeros(20, int)  # 20 of 20 right, each 0.9 sure
    sure = np.exp(log_softmax(logits / fit_temperature(logits, labels)))[0, 0]
    assert 0.9 < sure < 0.995
    assert fit_temperature(logits, labels, prior=0) < 0.07  # the bound, where log loss alone ends


@pytest.mark.parametrize("logits", [[[1e4, -1e4]], [[-1e4, 1e4]], [[0.0, 0.0]], [[-1e-30, 1e-30]]])
def test_one_image_however_extreme_gives_a_usable_temperature(logits):
    found = fit_temperature(np.array(logits), np.array([0]))
    assert 0.05 <= found <= 20
    assert fit_temperature(np.zeros((0, 2)), np.zeros(0, int)) == 1


def test_float32_and_bfloat16_logits_are_the_same_to_it():
    import ml_dtypes

    logits, labels = drawn(300, 4, scale=2)
    logits = logits.astype(ml_dtypes.bfloat16)
    wide = fit_temperature(logits.astype(np.float64), labels)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(wide, rel=1e-4)
    assert fit_temperature(logits, labels) == pytest.approx(wide, rel=1e-4)


@pytest.mark.parametrize("counts", [(500, 500), (3, 997), (1, 1, 1), (7, 2, 0, 13), (1,)])
def test_folds_share_every_class_evenly(counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    fold = assign_folds(labels)
    folds = min(5, len(labels))
    assert set(fold) == set(range(folds))
    for c, n in enumerate(counts):
        each = np.bincount(fold[labels == c], minlength=folds)
        assert each.sum() == n
        assert np.ptp(each) <= 1
    assert np.ptp(np.bincount(fold)) <= 1
    assert (fold == assign_folds(labels)).all()


def test_each_fold_is_calibrated_by_the_other_folds_alone(monkeypatch):
    logits, labels = drawn(300, 2, scale=2)
    fold = np.arange(300) % 3
    monkeypatch.setattr(calibration, "assign_folds", lambda labels, **_: fold)
    log_probs, given, temperatures = cross_fit(logits, labels, max_error=0.03)
    for k in range(3):
        rest = fold != k
        assert temperatures[k] == fit_temperature(logits[rest], labels[rest])
        np.testing.assert_allclose(log_probs[~rest], log_softmax(logits[~rest] / temperatures[k]))
        sure = np.exp(log_softmax(logits / temperatures[k])).max(1)
        limit = choose_threshold(sure[rest], (logits.argmax(1) == labels)[rest], max_error=0.03)
        np.testing.assert_array_equal(given[~rest], sure[~rest] >= limit)
    spoiled = np.where(fold == 1, 1 - labels, labels)  # every label of one fold is wrong now
    again, given_again, other = cross_fit(logits, spoiled, max_error=0.03)
    np.testing.assert_array_equal(again[fold == 1], log_probs[fold == 1])
    np.testing.assert_array_equal(given_again[fold == 1], given[fold == 1])
    assert (again[fold != 1] != log_probs[fold != 1]).any(-1).all()
    assert other[1] == temperatures[1]
    assert given_again.sum() < given.sum()


def slow_ece(confidence, correct, bins):
    """Sorted, cut into parts of equal size, averaged; needs different confidences and a number the bins divide."""
    order, total = sorted(range(len(confidence)), key=lambda i: confidence[i]), 0.0
    each = len(order) // bins
    for start in range(0, len(order), each):
        part = order[start : start + each]
        accuracy = sum(bool(correct[i]) for i in part) / len(part)
        total += abs(accuracy - sum(confidence[i] for i in part) / len(part)) * len(part) / len(order)
    return total


@pytest.mark.parametrize(("n", "bins"), [(150, 15), (15, 15), (1000, 10), (7, 1)])
def test_calibration_error_is_the_slow_one(n, bins):
    rng = np.random.default_rng(n)
    confidence, correct = rng.uniform(0.5, 1, n), rng.random(n) < 0.8
    assert expected_calibration_error(confidence, correct, bins=bins) == pytest.approx(
        slow_ece(confidence, correct, bins)
    )


def test_calibration_error_by_hand():
    confidence = np.array([0.6, 0.6, 0.8, 0.8, 0.9, 0.9])
    correct = np.array([True, False, True, True, True, False])
    # By threes of equal mass: |0.5 - 0.6|, |1 - 0.8|, |0.5 - 0.9|.
    assert expected_calibration_error(confidence, correct, bins=3) == pytest.approx((0.1 + 0.2 + 0.4) / 3)


def test_the_order_of_the_images_does_not_matter_even_among_equals():
    rng = np.random.default_rng(3)
    confidence, correct = rng.choice([0.7, 0.99, 1.0], 400, p=[0.1, 0.2, 0.7]), rng.random(400) < 0.9
    found = expected_calibration_error(confidence, correct)
    for order in (np.argsort(correct), rng.permutation(400)):
        assert expected_calibration_error(confidence[order], correct[order]) == pytest.approx(found)
    rows = reliability(confidence, correct)
    assert [row["confidence"] for row in rows] == pytest.approx([0.7, 0.99, 1.0])


def test_equals_go_to_the_bin_of_their_middle():
    rows = reliability(np.array([0.6] + 9 * [0.9]), np.full(10, True), bins=2)  # most of the nine are in the upper half
    assert [row["n"] for row in rows] == [1, 9]
    rows = reliability(np.array(9 * [0.6] + [0.9]), np.full(10, True), bins=2)
    assert [row["n"] for row in rows] == [9, 1]


def test_reliability_accounts_for_every_image_once():
    rng = np.random.default_rng(4)
    confidence, correct = rng.uniform(0.5, 1, 1003), rng.random(1003) < 0.8
    rows = reliability(confidence, correct)
    assert [row["n"] for row in rows] == pytest.approx([1003 / 15] * 15, abs=1)
    assert sum(row["n"] for row in rows) == 1003
    in_bins = np.split(np.argsort(confidence), np.cumsum([row["n"] for row in rows])[:-1])
    for row, inside in zip(rows, in_bins, strict=True):
        assert row["confidence"] == pytest.approx(confidence[inside].mean())
        assert row["accuracy"] == pytest.approx(correct[inside].mean())
        assert (row["low"], row["high"]) == wilson_interval(int(correct[inside].sum()), len(inside))
    gaps = sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / 1003
    assert gaps == pytest.approx(expected_calibration_error(confidence, correct))


def test_the_bootstrap_is_what_a_plain_loop_finds():
    rng = np.random.default_rng(5)
    confidence, correct = rng.uniform(0.5, 1, 120), rng.random(120) < 0.6
    found = ece_interval(confidence, correct, resamples=2000)
    plain = []
    for _ in range(2000):
        rows = rng.integers(0, 120, 120)
        plain.append(expected_calibration_error(confidence[rows], correct[rows]))
    low, high = np.percentile(plain, [2.5, 97.5])
    middle = expected_calibration_error(confidence, correct)
    assert found == pytest.approx((max(0, min(low, 2 * middle - high)), max(high, 2 * middle - low)), abs=0.01)
    assert found == ece_interval(confidence, correct, resamples=2000)


def test_the_bootstrap_of_many_images_goes_in_parts():
    n = 250_000  # of which eight samples go at once
    rng = np.random.default_rng(6)
    confidence, correct = rng.uniform(0.5, 1, n), rng.random(n)
    low, high = ece_interval(confidence, correct < confidence, resamples=20)
    assert 0 <= low <= expected_calibration_error(confidence, correct < confidence) <= high < 0.01


def test_the_interval_of_good_probabilities_comes_near_zero_and_that_of_bad_ones_stays_away():
    logits, labels = drawn(1000, 2, scale=1)
    good, bad = (calibration_metrics(log_softmax(s * logits), labels) for s in (1, 4))
    assert good["ece_interval"][0] < 0.005
    assert bad["ece_interval"][0] > 0.03
    assert bad["ece_interval"][0] <= bad["ece"] <= bad["ece_interval"][1]


def test_the_threshold_gives_the_most_answers_with_few_enough_errors():
    sure = np.array([0.99, 0.95, 0.9, 0.8, 0.7, 0.6])
    right = np.array([True, True, False, True, True, False])
    assert choose_threshold(sure, right, max_error=0.2) == pytest.approx(0.65)  # one wrong of five
    assert choose_threshold(sure, right, max_error=0.19) == pytest.approx(0.925)  # none wrong of two
    assert choose_threshold(sure, right, max_error=0.0) == pytest.approx(0.925)
    assert choose_threshold(sure, right, max_error=1 / 3) == 0.0  # all may be answered
    assert choose_threshold(sure[2:], right[2:], max_error=0.1) is None
    assert choose_threshold(sure[:0], right[:0], max_error=0.1) is None


def test_equal_confidences_are_answered_together_or_not_at_all():
    sure, right = np.array([1.0, 1.0, 1.0, 0.9, 0.9, 0.5]), np.array([True, True, True, True, False, True])
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]):
        limit = choose_threshold(sure[order], right[order], max_error=0.1)
        assert limit == pytest.approx(0.95)
        assert at_threshold(sure[order], right[order], limit)["answered"] == 3
    assert choose_threshold(np.ones(4), np.array([True, True, True, False]), max_error=0.1) is None
    assert choose_threshold(np.ones(4), np.array([True, True, True, False]), max_error=0.25) == 0.0


def test_neighbouring_numbers_are_told_apart():
    sure = np.array([np.nextafter(0.75, 1), 0.75])
    limit = choose_threshold(sure, np.array([True, False]), max_error=0)
    assert (sure >= limit).tolist() == [True, False]


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    sure, right, limit = rng.choice(np.linspace(0.5, 1, 12), n), rng.random(n) < 0.8, float(rng.choice([0, 0.05, 0.2]))
    found = choose_threshold(sure, right, max_error=limit)
    tried = {t: (sure >= t) for t in sure}
    best = max((int(g.sum()) for g in tried.values() if (~right[g]).mean() <= limit), default=0)
    assert (0 if found is None else at_threshold(sure, right, found)["answered"]) == best


def test_what_is_answered():
    sure, right = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    found = at_threshold(sure, right, 0.7)
    interval = list(wilson_interval(1, 3))
    assert found == {
        "answered": 3,
        "coverage": 0.75,
        "errors": 1,
        "error": 1 / 3,
        "interval": interval,
    }
    assert at_threshold(sure, right, None)["answered"] == 4
    nothing = at_threshold(sure, right, 0.95)
    assert (nothing["answered"], nothing["error"], nothing["interval"]) == (0, None, [0.0, 1.0])


def test_risk_and_coverage_by_hand():
    sure, right = np.array([0.6, 0.9, 0.9, 0.8]), np.array([False, True, False, True])
    coverage, risk = risk_coverage(sure, right)
    assert coverage == pytest.approx([0.5, 0.75, 1])
    assert risk == pytest.approx([1 / 2, 1 / 3, 1 / 2])


def test_a_calibration_is_fitted_as_a_whole():
    logits, labels = drawn(800, 3, scale=3)
    found = fit_calibration(logits, labels, max_error=0.02)
    sure = np.exp(log_softmax(logits / found.temperature)).max(1)
    assert found.temperature == fit_temperature(logits, labels)
    assert at_threshold(sure, logits.argmax(1) == labels, found.threshold)["error"] <= 0.02
    assert found.max_error == 0.02
    assert Calibration() == Calibration(temperature=1.0, threshold=None, max_error=0.005)
