"""Figures of an evaluated split: few and many classes, few and many images, and awkward names."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import StepPatch
from matplotlib.text import Text
from test_plots import assert_apart, png, random_image

from jaxcats import plots
from jaxcats.common import stats
from jaxcats.evaluate import calibration
from jaxcats.plots.base import INK, RIGHT, WRONG
from jaxcats.plots.galleries import overlay

AWKWARD = [
    "Staffordshire bull terrier with a long name",
    "сибирская кошка",
    "柴犬 (しばいぬ)",
    "a$b_c^2",
    "n02099712_" * 4,
]
SVG = "{http://www.w3.org/2000/svg}"


def names(c):
    return (AWKWARD + [f"class {i:03d}" for i in range(c)])[:c]


def counts(c, *, per_class=100, accuracy=0.99, seed=0):
    """A confusion matrix int [c, c]."""
    share = np.full((c, c), (1 - accuracy) / max(c - 1, 1)) + (accuracy - (1 - accuracy) / max(c - 1, 1)) * np.eye(c)
    return np.random.default_rng(seed).multinomial(per_class, share / share.sum(1, keepdims=True))


def answers(n, *, accuracy, seed=0):
    """(confidence [n], right [n]) of a well calibrated network that is mostly sure."""
    rng = np.random.default_rng(seed)
    confidence = 1 - rng.beta(0.05, 0.05 * accuracy / (1 - accuracy), n) / 2
    return confidence, rng.random(n) < confidence


def texts(figure):
    """Every text that is drawn."""
    figure.draw_without_rendering()
    shown = [*figure.texts, *([figure._suptitle] if figure._suptitle else [])]
    for legend in figure.legends:
        shown += legend.get_texts()
    for ax in [*figure.axes, *(child for parent in figure.axes for child in parent.child_axes)]:
        if ax.axison:
            for axis in (ax.xaxis, ax.yaxis):
                shown += [axis.label, *(label for t in axis._update_ticks() for label in (t.label1, t.label2))]
        shown += [ax.title, ax._left_title, *ax.texts]
    return list({id(t): t for t in shown if isinstance(t, Text) and t.get_visible() and t.get_text()}.values())


def words(figure):
    return [t.get_text() for t in texts(figure)]


@pytest.mark.parametrize("c", [1, 2, 4, 15, 30, 31])
def test_a_confusion_matrix_of_any_size_keeps_its_words_apart(c):
    figure = plots.confusion(counts(c), names(c))
    drawn = texts(figure)
    assert_apart(figure, drawn)
    labels = [t.get_text() for t in drawn]
    assert {"actual", "predicted"} <= set(labels)
    numbers = [w for w in labels if re.fullmatch(r"\d+(\n.*)?", w)]
    assert bool(numbers) == (c <= 15)


def test_a_confusion_matrix_has_actual_classes_in_rows_and_their_shares():
    figure = plots.confusion([[497, 3], [7, 1493]], ["cats", "dogs"])
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["cats", "dogs"]
    cells = {tuple(t.get_position()): t.get_text() for t in ax.texts}
    assert cells == {(0, 0): "497\n99.4 %", (1, 0): "3\n0.6 %", (0, 1): "7\n0.467 %", (1, 1): "1,493\n99.5 %"}
    assert "the darkest is 0.6 % of its row" in figure._suptitle.get_text()


def test_one_error_of_a_hundred_is_seen_in_a_colour_of_its_own():
    matrix = 100 * np.eye(100, dtype=int)
    matrix[3, 40], matrix[3, 3], matrix[7, 8], matrix[50] = 1, 99, 9, 0
    figure = plots.confusion(matrix, names(100))
    shown = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(shown[3, 40, :3], to_rgb(WRONG))
    np.testing.assert_allclose(shown[4, 4, :3], to_rgb(RIGHT))
    assert shown[7, 8, 3] == 1  # the worst
    assert 0.2 <= shown[3, 40, 3] < 1
    assert (shown[..., 3] > 0).sum() == 101  # nothing where there is nothing


def test_no_errors_and_no_images_are_drawn_too():
    assert "none here" in plots.confusion([[5, 0], [0, 0]], ["a", "b"])._suptitle.get_text()
    assert png(plots.confusion(np.zeros((40, 40), int), names(40))).width > 100


def test_reliability_shows_each_bin_with_its_interval_before_and_after():
    confidence, right = np.repeat([0.6, 0.8], 50), np.arange(100) % 2 == 0
    before = calibration.reliability(confidence, right)
    after = calibration.reliability(confidence - 0.1, right)
    panels = {"as trained": (before, 0.2, confidence), "with the temperature": (after, 0.1, confidence - 0.1)}
    figure = plots.reliability(panels)
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == [
        "as trained: calibration error 20 %",
        "with the temperature: calibration error 10 %",
    ]
    for ax, bins in zip(figure.axes, (before, after), strict=False):
        line = ax.lines[1]
        np.testing.assert_allclose(line.get_xdata(), [b["confidence"] for b in bins])
        np.testing.assert_allclose(line.get_ydata(), [b["accuracy"] for b in bins])
        spans = [s[:, 1] for s in ax.collections[0].get_segments()]
        np.testing.assert_allclose(spans, [(b["low"], b["high"]) for b in bins])
    assert_apart(figure, texts(figure))


@pytest.mark.parametrize(("n", "accuracy"), [(1, 0.9), (40, 0.99), (1000, 0.99), (1000, 0.6), (100_000, 0.999)])
def test_reliability_is_readable_however_sure_the_answers_are(n, accuracy):
    confidence, right = answers(n, accuracy=accuracy)
    bins = calibration.reliability(confidence, right)
    figure = plots.reliability({"before": (bins, 0.001, confidence), "after": (bins, 0.01, confidence)})
    assert_apart(figure, texts(figure))
    labels = [t.get_text() for t in figure.axes[2].get_xticklabels()]
    assert labels[0] == "0"
    assert labels[-1] == "100 %"
    stretched = "99.9" in labels
    assert stretched == (np.median(confidence) > 0.95)
    assert figure.axes[0].get_xlim() == figure.axes[0].get_ylim()
    (bars,) = figure.axes[2].findobj(StepPatch)
    assert bars.get_data().values.sum() == n  # every answer is in the histogram, those at 100 % too


def test_a_sure_networks_bins_do_not_lie_on_one_another():
    bins = [{"n": 50, "confidence": p, "accuracy": 0.98, "low": 0.9, "high": 0.99} for p in (0.7, 0.99, 0.999, 0.9999)]
    confidence = np.array([b["confidence"] for b in bins])
    x = plots.reliability({"as trained": (bins, 0.01, confidence)}).axes[0].lines[1].get_xdata()
    np.testing.assert_allclose(np.diff(x)[1:], 1, atol=1e-6)  # equal steps from 99 to 99.9 to 99.99


def test_risk_by_coverage_marks_the_threshold_and_what_was_wanted():
    coverage = np.arange(1, 1001) / 1000
    wrong = np.isin(np.arange(1, 1001), [400, 930, 960, *range(985, 999, 2)])
    risk = wrong.cumsum() / np.arange(1, 1001)
    figure = plots.risk_coverage(coverage, risk, n=1000, point=(0.984, risk[983]), max_error=0.005)
    (ax,) = figure.axes
    assert {"chosen: 98.4 % predicted, 0.3 % of them wrong", "wanted: at most 0.5 %"} <= set(words(figure))
    low, high = ax.get_ylim()
    assert low == 0
    assert 0.01 < high < 0.03  # ten errors of a thousand fill the figure
    assert ax.get_xlim()[0] < 0.984
    band = ax.collections[0].get_paths()[0].vertices
    _, end = stats.wilson_interval(10, 1000)
    assert np.isclose(band[np.isclose(band[:, 0], 1), 1].max(), end)
    assert_apart(figure, texts(figure))


@pytest.mark.parametrize(("n", "accuracy"), [(1, 0.9), (2, 0.9), (300, 0.5), (100_000, 0.999)])
def test_risk_by_coverage_for_few_and_many_images(n, accuracy):
    confidence, right = answers(n, accuracy=accuracy)
    coverage, risk = calibration.risk_coverage(confidence, right)
    figure = plots.risk_coverage(coverage, risk, n=n, point=(coverage[0], risk[0]), max_error=0.01)
    line = figure.axes[0].lines[0]
    assert len(line.get_xdata()) <= 1000
    assert (line.get_xdata()[-1], line.get_ydata()[-1]) == (1.0, risk[-1])
    left, right_end = figure.axes[0].get_xlim()
    assert left <= coverage[0] <= right_end
    assert_apart(figure, texts(figure))


def class_rows(c, *, n=60, seed=0):
    hits = np.random.default_rng(seed).binomial(n, 0.93, c)
    return [
        {"class": name, "n": n, "recall": k / n, "recall_interval": stats.wilson_interval(int(k), n)}
        for name, k in zip(names(c), hits, strict=True)
    ]


@pytest.mark.parametrize(("c", "n"), [(1, 1), (2, 100_000), (10, 60), (100, 60)])
def test_recall_by_class_shows_the_worst_first_and_thirty_at_most(c, n):
    rows = class_rows(c, n=n)
    figure = plots.per_class([*rows, {"class": "empty", "n": 0, "recall": None, "recall_interval": None}])
    drawn = texts(figure)
    assert_apart(figure, drawn)
    (ax,) = figure.axes
    shown = list(ax.lines[0].get_xdata())
    assert shown == sorted(row["recall"] for row in rows)[:30]
    assert ax.get_title(loc="left") == f"{min(c, 30)} of the {c} classes with images, worst first"
    worst = min(rows, key=lambda row: row["recall"])
    assert f"{n - round(worst['recall'] * n):,} of {n:,} missed" in [t.get_text() for t in drawn]
    left, right = ax.get_xlim()
    assert right == 1
    assert all(left <= row["recall_interval"][0] + 1e-9 for row in rows)


def test_heat_lies_on_its_image():
    photo = np.full((64, 64, 3), 100, np.uint8)
    heat = np.zeros((4, 4))
    heat[0, 3] = 1.0
    laid = overlay(photo, heat)
    assert laid.shape == photo.shape
    assert laid.dtype == np.uint8
    light = laid.astype(int).sum(-1)
    assert np.unravel_index(light.argmax(), light.shape)[0] < 16
    assert np.unravel_index(light.argmax(), light.shape)[1] >= 48
    assert light[40:, :24].max() < 300  # darker where there is none
    assert np.ptp(light[40:, :24]) == 0
    assert np.abs(np.diff(light[8])).max() < 60  # smooth, no blocks of sixteen pixels
    assert (photo == 100).all()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_heat_maps_stand_beside_their_images(n):
    titles = ["dogs 97.2 % (is cats)", AWKWARD[0] * 3, "柴犬" * 20, "a", "b"][:n]
    heats = [np.random.default_rng(i).random((7, 7)) for i in range(n)]
    figure = plots.heat_maps(
        [random_image(64, 64, i) for i in range(n)], heats, titles, wrong=[True] * n, heading="Where"
    )
    shown = [ax for ax in figure.axes if ax.images]
    assert len(shown) == n
    both = np.asarray(shown[0].images[0].get_array())
    np.testing.assert_array_equal(both[:, :64], random_image(64, 64, 0))
    np.testing.assert_array_equal(both[:, -64:], overlay(random_image(64, 64, 0), heats[0]))
    assert_apart(figure, [*(ax.title for ax in shown), figure._suptitle])
    assert "no images to show" in words(plots.heat_maps([], [], [], [], "none"))


def test_top_losses_are_titled_as_in_fastai():
    log_probs = np.log([[0.9, 0.1], [0.25, 0.75], [0.0004, 0.9996]])
    titles = plots.top_loss_titles(log_probs, np.array([1, 1, 0]), ["cats", "dogs"], [2, 0, 1])
    assert titles == ["dogs / cats / 7.82 / 0.9996", "cats / dogs / 2.30 / 0.90", "dogs / dogs / 0.29 / 0.75"]


def every_figure(wanted=None):
    confidence, right = answers(300, accuracy=0.97)
    bins = calibration.reliability(confidence, right)
    lrs, losses = np.geomspace(1e-5, 1, 40), np.linspace(1, 0.5, 40)
    kinds = {
        "confusion": lambda: plots.confusion(counts(5), [*AWKWARD[:4], "<b>&amp;\x01\udce9"]),
        "many classes": lambda: plots.confusion(counts(20), names(20)),
        "reliability": lambda: plots.reliability({"as trained": (bins, 0.01, confidence)}),
        "risk": lambda: plots.risk_coverage(*calibration.risk_coverage(confidence, right), n=300, max_error=0.01),
        "per_class": lambda: plots.per_class(class_rows(4)),
        "losses": lambda: plots.losses([0, 1, 2], [1, 0.5, 0.4], [1, 2], [0.5, 0.6], best=0),
        "lr_find": lambda: plots.lr_find([(lrs, losses, losses)], suggestions={"slide": 1e-3}),
    }
    return {name: kinds[name]() for name in wanted or kinds}


def test_a_figure_for_a_page_is_one_svg_in_the_colours_of_the_page():
    for name, figure in every_figure().items():
        text = plots.to_svg(figure)
        root = ElementTree.fromstring(text)
        assert root.tag == SVG + "svg"
        assert re.fullmatch(r"0 0 [\d.]+ [\d.]+", root.get("viewBox", ""))
        assert root.get("width") is root.get("height") is None
        assert "#000000" not in text, name
        assert INK not in text, name
        assert "currentColor" in text
        assert "style" not in text, name  # what a strict Content-Security-Policy forbids
        assert not re.findall(r'(?:href|src)="(?!#|data:)', text)
        assert not re.findall(r"\d{4}-\d\d-\d\d|matplotlib", text)
        ids = re.findall(r' id="([^"]+)"', text)
        assert set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text)) <= set(ids), name
        assert len(ids) == len(set(ids))
        assert any(True for _ in root.iter(SVG + "text")), name
    first, again = (plots.to_svg(every_figure(["risk"])["risk"]) for _ in range(2))
    assert first == again


def test_words_in_a_page_are_words():
    root = ElementTree.fromstring(plots.to_svg(every_figure(["confusion"])["confusion"]))
    said = "".join(t.text or "" for t in root.iter(SVG + "text"))
    assert "сибирская" in said
    assert "柴犬" in said
    assert "a$b_c^2" in said
    assert "<b>&amp;??" in said


def test_a_figure_is_written_whole(tmp_path):
    plots.write(plots.per_class(class_rows(2)), tmp_path / "figures" / "a.png", dpi=50)
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["a.png"]
    assert (tmp_path / "figures" / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_names_no_font_has_are_no_reason_for_warnings(recwarn):
    png(plots.confusion([[3, 1], [0, 2]], ["柴犬", "𐎠𐎡"]))
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
