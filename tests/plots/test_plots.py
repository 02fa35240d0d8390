"""Figures: what is on them, and that no text lies on another."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from jaxcats import plots
from jaxcats.common.stats import smooth
from jaxcats.plots.base import RIGHT, WRONG
from jaxcats.plots.galleries import LARGEST_SIDE

LONG = "Staffordshire bull terrier: said American pit bull terrier, 47 %, loss 0.76"


def random_image(height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def boxes(figure, texts):
    figure.draw_without_rendering()
    return [Text.get_window_extent(t) for t in texts if t.get_text()]  # an annotation's own extent has its line in it


def assert_apart(figure, texts):
    extents = boxes(figure, texts)
    assert len(extents) == len([t for t in texts if t.get_text()]) > 0
    for a, b in itertools.combinations(extents, 2):
        assert not a.overlaps(b), (a, b)
    for box in extents:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1


def png(figure):
    image = Image.open(io.BytesIO(figure._repr_png_()))
    image.load()
    return image


def run(seed=0, m=92, n=100):
    noise = np.random.default_rng(seed).normal(0, 0.03, m)
    losses = 0.1 + 0.6 / (1 + np.exp((np.arange(m) - 60) / 2.5)) + noise
    return 1e-7 * 1e8 ** (np.arange(m) / n), losses, smooth(losses)


SUGGESTIONS = {"valley": 0.002, "steep": 0.0021, "minimum": 0.0019, "slide": 0.03}


@pytest.mark.parametrize("n", [1, 2, 4, 5, 16, 17, 36])
def test_galleries_of_any_size_keep_their_titles_apart(n):
    titles = [(LONG, "cats, 99 %", "a_name_without_any_space_that_goes_on_and_on_and_on")[i % 3] for i in range(n)]
    shapes = [(40, 60), (60, 40), (10, 90)]
    images = [random_image(*shapes[i % 3], seed=i) for i in range(n)]
    figure = plots.gallery(images, titles, wrong=[i % 2 == 0 for i in range(n)], heading="Most incorrect dogs, " * 3)
    shown = [ax for ax in figure.axes if ax.images]
    assert len(shown) == n
    assert [ax.get_title().replace("\n", " ").replace(" ", "") for ax in shown] == [t.replace(" ", "") for t in titles]
    assert_apart(figure, [*(ax.title for ax in shown), figure._suptitle])


def test_right_and_wrong_are_told_apart_and_no_verdict_is_neither():
    colours = [ax.title.get_color() for ax in plots.gallery([random_image()] * 2, ["a", "b"], wrong=[False, True]).axes]
    assert colours == [RIGHT, WRONG]
    assert plots.gallery([random_image()], ["a"]).axes[0].title.get_color() not in colours


def test_a_gallery_takes_files_pillow_and_arrays_and_leaves_them_be(tmp_path):
    array = random_image(20, 30)
    image = Image.fromarray(array)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "a.png", exif=turned)
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), image, array, array[:, :, 0], random_image(900, 1800)]
    figure = plots.gallery(kinds, list("abcdef"), wrong=[False] * 6)
    shown = [ax.images[0].get_array() for ax in figure.axes]
    assert shown[0].shape == (30, 20, 3)  # upright, as its EXIF says
    for pixels in shown[2:4]:
        np.testing.assert_array_equal(pixels, array)
    assert shown[5].shape[1] == LARGEST_SIDE
    np.testing.assert_array_equal(np.asarray(image), array)  # still open
    assert figure.axes[0].get_subplotspec().get_gridspec().ncols == 3


def test_a_dollar_sign_in_a_name_is_no_formula():
    assert png(plots.gallery([random_image()], ["cost $5_x$ \\frac"], heading="$_$")).width > 100


def test_nothing_to_show_says_so():
    figure = plots.gallery([], [], wrong=[], heading="Most incorrect cats")
    assert {t.get_text() for t in [*figure.texts, figure._suptitle]} == {"Most incorrect cats", "no images to show"}
    with pytest.raises(ValueError, match="longer"):
        plots.gallery([random_image()], ["a", "b"])


@pytest.mark.parametrize(
    "suggestions",
    [
        SUGGESTIONS,
        dict.fromkeys(SUGGESTIONS, 1e-6),
        dict.fromkeys(SUGGESTIONS, 1.5),
        {"valley": 1e-8, "steep": 1e-2, "minimum": 1e-5, "slide": 2.0},
    ],
)
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_four_suggestions_are_labelled_without_overlap(suggestions, seeds):
    ranges = {name: (lr / 2, lr * 2) for name, lr in suggestions.items()} if seeds > 1 else None
    figure = plots.lr_find([run(s) for s in range(seeds)], suggestions=suggestions, ranges=ranges)
    (ax,) = figure.axes
    labels = [t for t in ax.texts if t.get_text()]
    assert {t.get_text().split("\n")[0]: float(t.get_text().split("\n")[1]) for t in labels} == suggestions
    assert_apart(figure, labels)
    marks = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert sorted(line.get_xdata()[0] for line in marks) == sorted(suggestions.values())
    assert ax.get_xscale() == "log"


def test_one_test_shows_raw_and_smoothed_without_the_ends():
    lrs, losses, smoothed = run()
    (ax,) = plots.lr_find([(lrs, losses, smoothed)], suggestions=SUGGESTIONS).axes
    raw, middle = ax.lines[:2]
    np.testing.assert_array_equal(raw.get_ydata(), losses[10:-5])
    np.testing.assert_array_equal(middle.get_ydata(), smoothed[10:-5])
    np.testing.assert_array_equal(middle.get_xdata(), lrs[10:-5])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["each batch", "smoothed"]


def test_seeds_show_their_median_and_spread_as_far_as_half_of_them_ran():
    runs = [run(0, 92), run(1, 70), run(2, 92), run(3, 60)]
    figure = plots.lr_find(runs, suggestions=SUGGESTIONS)
    (line,) = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 1]
    assert line.get_ydata()[5] == np.median([r[2][15] for r in runs])
    assert len(line.get_ydata()) == 77  # two of four reach the end
    assert len(plots.lr_find([*runs, run(4, 60)], suggestions={}).axes[0].lines[0].get_ydata()) == 60
    assert len(figure.axes[0].collections) == 1


def test_a_refusal_is_written_and_nothing_is_marked():
    figure = plots.lr_find([run()], suggestions={}, refusal="no descent: " + "nothing was learnt " * 9)
    (ax,) = figure.axes
    assert ax.get_title(loc="left").startswith("No suggestion: no descent")
    assert len(ax.lines) == 2
    assert_apart(figure, [ax._left_title, ax.xaxis.label, ax.yaxis.label])


@pytest.mark.parametrize(
    "losses", [[0.7], [np.nan], [0.7, np.nan], [0.7] * 12, [np.inf] * 30, [0.0] * 30, [0.7, 9e30, np.inf]]
)
def test_odd_records_are_drawn_all_the_same(losses):
    losses = np.array(losses)
    lrs = 1e-7 * 1e8 ** (np.arange(len(losses)) / 100)
    assert png(plots.lr_find([(lrs, losses, smooth(losses))], suggestions={}, refusal="too few points")).width > 300


def test_a_blow_up_does_not_hide_the_valley():
    lrs, losses, _ = run(m=100)
    losses = np.r_[losses[:90], np.full(10, 1e6)]
    low, high = plots.lr_find([(lrs, losses, smooth(losses))], suggestions={}, refusal="x").axes[0].get_ylim()
    assert high < 3
    assert low < 0.2


def test_learning_rates_of_equal_groups_are_one_line():
    rates = np.linspace(0.01, 0, 50)
    for given in (rates, list(rates), {"stem": rates, "head": rates}):
        (ax,) = plots.learning_rates(given).axes
        (line,) = ax.lines
        np.testing.assert_array_equal(line.get_ydata(), rates)
        assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("iteration", "learning rate", "linear")
    assert plots.learning_rates(run()[0]).axes[0].get_yscale() == "log"  # lr_find's eight decades


def test_learning_rates_of_unlike_groups_and_the_momentum():
    rates = np.linspace(0.01, 0, 50)
    groups = {"stem": rates / 100, "middle": rates / 10, "head": rates}
    figure = plots.learning_rates(groups, momentum=np.linspace(0.85, 0.95, 50))
    top, bottom = figure.axes
    assert len(top.lines) == 3
    assert len({line.get_linestyle() for line in top.lines}) == 3  # not by colour alone
    names = [t.get_text() for t in figure.legends[0].get_texts()]
    assert names == ["stem (up to 0.0001)", "middle (up to 0.001)", "head (up to 0.01)"]
    assert top.get_yscale() == "log"
    figure.draw_without_rendering()
    assert "0.001" in [t.get_text() for t in top.get_yticklabels()]
    assert (bottom.get_ylabel(), bottom.get_xlabel(), len(bottom.lines)) == ("momentum", "iteration", 1)
    assert png(figure).height > 300


def test_the_best_epoch_is_marked():
    valid_steps, valid = [49, 99, 149, 199], [0.3, 0.12, 0.1, 0.2]
    train = np.linspace(0.6, 0.02, 200)
    (ax,) = plots.losses(np.arange(200), train, valid_steps, valid, best=2).axes
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ["training, smoothed", "validation, each epoch", "best: epoch 2, 0.1"]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), smooth(train))
    ring = ax.lines[3]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([149], [0.1])
    assert len(plots.losses(np.arange(200), train, valid_steps, valid).axes[0].lines) == 3


def test_figures_show_themselves_in_a_notebook():
    figure = plots.learning_rates([0.1, 0.2])
    assert isinstance(figure, plots.Figure)
    assert png(figure).format == "PNG"
