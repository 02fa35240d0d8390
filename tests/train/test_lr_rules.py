"""lr_find's result: equal to fastai's on recorded tests, and silent where there is nothing to trust."""

import json
from pathlib import Path

import numpy as np
import pytest
from lr_records import band_of, result_of

from jaxcats.common.errors import UserError
from jaxcats.common.stats import smooth
from jaxcats.train.lr_finder import ENOUGH_POINTS, RULES, Curve, LRFindResult, minimum, slide, steep, valley

CURVES = json.loads((Path(__file__).parents[1] / "golden" / "lr_find.json").read_text(encoding="utf-8"))["curves"]
# What the rules of fastai answer without a word of warning, and why we don't.
REFUSED = {
    "inf tail": "the loss is infinite: from learning rate 0.25 on",
    "flat": "no descent",
    "monotone up": "the loss diverged from the start",
    "monotone down": "the methods disagree: the valley (0.0012) is more than a factor 30 from the middle",
    "too short": "too few points: 12 of the 16 needed",
}
ANSWERED = sorted(set(CURVES) - set(REFUSED))


def curve(name: str) -> LRFindResult:
    return result_of(CURVES[name])


def made(losses, *, iterations=None, stopped="end") -> LRFindResult:
    losses = np.asarray(losses, float)
    n = iterations or len(losses)
    lrs = 1e-7 * 1e8 ** (np.arange(len(losses)) / n)
    return LRFindResult((Curve(lrs=lrs, losses=losses, smoothed=smooth(losses), iterations=n, stopped=stopped),))


def band_of_results(*results: LRFindResult) -> LRFindResult:
    return LRFindResult(sum((result.curves for result in results), ()))


def falling(m=100, *, at=60, seed=0):
    """A healthy test: flat, then down; divergence is left to the caller."""
    noise = np.random.default_rng(seed).normal(0, 0.03, m)
    return 0.1 + 0.6 / (1 + np.exp((np.arange(m) - at) / 2.5)) + noise


def test_ten_curves_were_recorded():
    assert len(CURVES) == 10
    assert len(ANSWERED) == 5


@pytest.mark.parametrize("name", CURVES)
def test_the_smoothed_losses_equal_fastais(name):
    [result] = curve(name).curves
    ours = smooth(result.losses)
    good = np.isfinite(result.smoothed)
    np.testing.assert_allclose(ours[good], result.smoothed[good], rtol=3e-6)  # fastai averages in float32
    assert not np.isfinite(ours[~good]).any()


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("rule", [valley, steep, minimum, slide], ids=lambda rule: rule.__name__)
def test_the_rules_equal_fastais(name, rule):
    golden, points = CURVES[name]["fastai"][rule.__name__], curve(name).curves[0].points
    if "raised" in golden:
        assert len(points[0]) < ENOUGH_POINTS
    else:
        assert rule(*points) == pytest.approx(golden["lr"], rel=1e-6)


@pytest.mark.parametrize("name", ANSWERED)
def test_healthy_curves_are_answered_as_fastai_does(name):
    result = curve(name)
    assert result.refusal is None
    for method, golden in CURVES[name]["fastai"].items():
        assert result.suggestion(method) == pytest.approx(golden["lr"], rel=1e-6)
    assert result.suggestion() == result.suggestions["valley"]


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_with_the_reason_and_no_number(name):
    result = curve(name)
    assert result.refusal.startswith(REFUSED[name])
    assert "\n" not in result.refusal
    assert result.suggestions == {}
    for method in RULES:
        with pytest.raises(UserError) as raised:
            result.suggestion(method)
        assert result.refusal in str(raised.value)
    assert result.refusal in result.table()
    assert "valley  " not in result.table()


def test_a_record_that_ends_at_its_nan_gives_what_fastai_gives_on_the_whole():
    """fastai records NaN to the end; our driver stops, so the last five iterations must not be cut a second time."""
    result = curve("nan tail")
    [whole] = result.curves
    first = int(np.isnan(whole.losses).argmax())
    for end in (first, first + 1, first + 3):  # with the NaN recorded or not, or a chunk's rest
        parts = (a[:end] for a in (whole.lrs, whole.losses, whole.smoothed))
        assert LRFindResult((Curve(*parts, iterations=100, stopped="nan"),)).suggestions == result.suggestions


@pytest.mark.parametrize("stopped", ["diverged", "nan"])
def test_one_infinite_loss_at_the_end_does_no_harm(stopped):
    """fastai stops at it as at any other divergence."""
    losses = falling()[:90]
    result = made([*losses, np.inf], iterations=100, stopped=stopped)
    assert result.refusal is None
    assert result.suggestions == made([*losses, 50.0], iterations=100, stopped="diverged").suggestions
    if stopped == "nan":
        assert result.why.endswith("the loss was infinite")


def with_suggestions(monkeypatch, valley, steep, minimum, slide):
    """A healthy curve whose rules answer as given."""
    answers = {"valley": valley, "steep": steep, "minimum": minimum, "slide": slide}
    for name, rate in answers.items():
        monkeypatch.setitem(RULES, name, lambda lrs, losses, rate=rate: rate)
    return made(falling())


def test_methods_that_disagree_are_refused(monkeypatch):
    result = with_suggestions(monkeypatch, 1e-4, 1e-5, 1e-1, 1e-2)
    assert "middle two are a factor 100.0 apart" in result.refusal
    assert result.suggestions == {}


def test_a_method_that_stands_alone_gives_no_number_and_the_others_do(monkeypatch):
    """One noisy batch throws `steep` off: that says nothing against the rest."""
    result = with_suggestions(monkeypatch, 2e-3, 3e-6, 5e-2, 1e-3)
    assert result.refusal is None
    assert result.outliers == ("steep", "minimum")
    assert result.suggestion() == 2e-3
    with pytest.raises(UserError, match="no trustworthy rate by steep"):
        result.suggestion("steep")
    assert result.table().count("not to be trusted") == 2
    assert set(result.suggestions) == set(RULES)


def test_a_valley_that_is_outvoted_is_refused(monkeypatch):
    assert "the valley (1e-05)" in with_suggestions(monkeypatch, 1e-5, 1e-2, 2e-2, 1e-2).refusal


def test_noise_alone_is_refused():
    rng = np.random.default_rng(1)
    refused = [made(rng.normal(0.7, 0.1, 100)).refusal for _ in range(40)]
    assert sum(r is not None and r.startswith("no descent") for r in refused) >= 38


@pytest.mark.parametrize("seed", range(10))
def test_a_descent_is_seen_through_noise(seed):
    noise = np.random.default_rng(seed).normal(0, 0.2, 100)
    refusal = made(falling(seed=seed) + noise).refusal
    assert refusal is None or refusal.startswith("the methods disagree")


def test_a_trained_model_that_diverges_late_has_no_descent():
    losses = np.r_[0.05 + 0.005 * np.random.default_rng(0).normal(size=80), np.linspace(0.05, 3, 10)]
    assert made(losses, iterations=100, stopped="diverged").refusal.startswith("no descent")


@pytest.mark.parametrize("m", [2, 5, 19, 40])
@pytest.mark.parametrize(("stopped", "last"), [("diverged", 90.0), ("nan", np.nan)])
def test_divergence_from_the_start(m, stopped, last):
    losses = np.r_[np.linspace(0.7, 2, m - 1), last]
    refusal = made(losses, iterations=100, stopped=stopped).refusal
    assert refusal.startswith("the loss diverged from the start")
    assert f"stopped at iteration {m} of 100" in refusal


@pytest.mark.parametrize("m", [1, 6, 20])
def test_too_few_points_says_how_many(m):
    assert made(np.linspace(1, 0.5, m)).refusal.startswith(
        f"too few points: {max(0, m - m // 10 - 5)} of the 16 needed"
    )


def test_where_and_why_it_stopped():
    assert made(falling(63), iterations=100, stopped="diverged").why == (
        "stopped at iteration 63 of 100 (learning rate 0.0091): the smoothed loss passed 4 x its best"
    )
    assert made([*falling(62), np.nan], iterations=100, stopped="nan").why.endswith("the loss was not a number")
    assert made(falling()).why == "ran all 100 iterations (learning rate 1e-07 to 8.3)"


def test_an_unknown_method_names_the_four():
    with pytest.raises(UserError, match=r"'vally' is not one of valley, steep, minimum, slide"):
        curve("nan tail").suggestion("vally")


@pytest.mark.parametrize("name", CURVES)
def test_json_and_back(name):
    result = curve(name)
    text = json.dumps(result.to_dict(), allow_nan=False)
    back = result_of(json.loads(text))
    for array in ("lrs", "losses", "smoothed"):
        np.testing.assert_array_equal(getattr(back.curves[0], array), getattr(result.curves[0], array))
    assert (back.curves[0].iterations, back.curves[0].stopped, back.why) == (
        result.curves[0].iterations,
        result.curves[0].stopped,
        result.why,
    )
    assert (back.refusal, back.suggestions) == (result.refusal, result.suggestions)


def test_the_table_shows_all_four():
    result = curve("noisy valley")
    assert repr(result) == result.table()
    for method, lr in result.suggestions.items():
        assert [line.split() for line in result.table().splitlines()].count([method, f"{lr:.2g}"]) == 1
    assert result.why in result.table()


def test_a_band_is_the_median_of_its_seeds():
    losses = [np.r_[falling(80, at=at, seed=at), np.linspace(0.2, 9, 9)] for at in (52, 55, 58, 61, 64)]
    results = [made(x, iterations=100, stopped="diverged") for x in losses]
    band = band_of_results(*results, curve("flat"))
    assert band.refusal is None
    answers = [r.suggestion() for r in results if not r.refusal]
    assert len(answers) >= 3
    assert band.suggestion() == np.median(answers)
    assert band.ranges["valley"] == (min(answers), max(answers))
    assert f"under 6 seeds, of which {len(answers)} give a rate" in repr(band)
    assert "seed 5: no descent" in repr(band)
    back = band_of(json.loads(json.dumps(band.to_dict(), allow_nan=False)))
    assert back.suggestions == band.suggestions
    assert len(back.curves) == 6


def test_a_band_needs_half_of_its_seeds():
    good, flat = curve("late divergence"), curve("flat")
    assert band_of_results(good, flat).suggestion("steep") == good.suggestion("steep")
    band = band_of_results(good, flat, flat)
    assert band.refusal == "1 of 3 seeds give a rate, fewer than half; 2 times no descent"
    with pytest.raises(UserError, match="1 of 3 seeds"):
        band.suggestion()
    assert band.suggestions == band.ranges == {}


def test_notebooks_get_the_table_and_the_image():
    for result in (curve("late divergence"), curve("flat"), band_of_results(curve("flat"), curve("nan tail"))):
        shown = result._repr_html_()
        assert "learning rate range test" in shown
        assert "data:image/png;base64,iVBOR" in shown
