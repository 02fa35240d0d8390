"""The page in a real browser: nothing fetched, nothing on the console, every control does what it says."""

import shutil

import numpy as np
import pytest
from PIL import Image
from reports import evaluated, metrics_of, run_folder

from jaxcats.evaluate import report

N, WRONG = 120, 9
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONG = "a_class_whose_name_has_forty_characters_"
SVG = '<svg viewBox="0 0 700 200" xmlns="http://www.w3.org/2000/svg" fill="currentColor"><text x="9" y="99">axis</text></svg>'


def make(root, classes, folder):
    """A page of N images, of which the first WRONG are predicted wrong, and the probability of the predicted class [N]."""
    paths = [
        f"{classes[i % len(classes)]}/{i:03d}.jpg" if i else "gone/" + 30 * "long_name_" + ".jpg" for i in range(N)
    ]
    for path in paths[1:]:
        (root / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (90, 60), (int(path[-6:-4]), 90, 140)).save(root / path)
    metrics = metrics_of(classes, n=N, errors=WRONG, threshold=0.7)
    made = evaluated(
        root, paths, classes=classes, wrong=WRONG, metrics=metrics, folder=folder, data_root=20 * "/a_long_folder"
    )
    return report.render(made, {"losses": SVG}), np.exp(made.log_probs).max(1)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Addresses of a page of two classes and one of thirty with long names, and the probabilities in the first."""
    root = tmp_path_factory.mktemp("page")
    folder = run_folder(root / (12 * "long_run_name_"), versions={"sha256": 64 * "a"})
    two, sure = make(root, ["cats", "dogs"], folder)
    (root / "two.html").write_text(two, encoding="utf-8")
    many, _ = make(root, [f"{LONG}{k:02d}" for k in range(30)], folder)
    (root / "many.html").write_text(many, encoding="utf-8")
    return (root / "two.html").as_uri(), (root / "many.html").as_uri(), sure


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="pip install playwright to test the page in a browser"
    )
    if not CHROMIUM:
        pytest.skip("no chromium, chromium-browser or google-chrome to test the page in")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, pages):
    """Opens a page in a fresh context; afterwards there was nothing on the console and nothing was fetched."""
    contexts, complaints, asked = [], [], []

    def open_page(address=pages[0], *, width=1400, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:") and url.split("#")[0] not in pages[:2]] == []


def count(page):
    """'12 of 120 shown', which must be how many there are to see."""
    text = page.inner_text("#count")
    assert page.locator("#pics li:visible").count() == int(text.split()[0])
    return text


def paths(page):
    return page.locator("#pics li:visible small").all_inner_texts()


def test_filters_presets_and_the_address_that_keeps_them(visit, pages):
    sure = pages[2]
    right, abstains, dogs = np.arange(N) >= WRONG, sure < 0.7, np.arange(N) % 2 == 1
    page = visit()
    assert count(page) == "96 of 120 shown; 24 more match"
    page.get_by_label("Outcome").select_option("right")
    page.get_by_role("button", name="Show 96 more").click()
    assert count(page) == f"{N - WRONG} of 120 shown"
    page.get_by_label("Outcome").select_option("unsure")
    assert count(page) == f"{abstains.sum()} of 120 shown"
    page.get_by_label("Actual class").select_option("dogs")
    assert count(page) == f"{(abstains & dogs).sum()} of 120 shown"
    page.get_by_role("button", name="Start over").click()
    page.get_by_label("Predicted class").select_option("dogs")
    page.get_by_label("Confidence from").fill("60")
    page.get_by_label("Confidence to").fill("90")
    within = (sure >= 0.6) & (sure <= 0.9) & (dogs == right)
    assert count(page) == f"{within.sum()} of 120 shown"

    page.get_by_role("button", name="Start over").click()
    page.get_by_label("Path contains").fill("DOGS/0")
    assert count(page) == "50 of 120 shown"
    page.get_by_role("button", name="Most incorrect").click()
    assert count(page) == f"{(~right & dogs).sum()} of 120 shown"
    assert paths(page)[0].endswith(f"{max(np.flatnonzero(~right & dogs), key=lambda i: sure[i]):03d}.jpg")
    again = visit(page.url)
    assert (count(again), paths(again)) == (count(page), paths(page))
    again.get_by_label("Path contains").fill("nothing like it")
    assert "Nothing matches" in count(again)


def test_orders(visit, pages):
    sure = pages[2]
    page = visit()
    page.get_by_role("button", name="Most correct").click()
    best = max(range(WRONG, N), key=lambda i: sure[i])
    assert paths(page)[0].endswith(f"{best:03d}.jpg")
    page.get_by_role("button", name="Most uncertain").click()
    assert paths(page)[0].endswith(f"{np.argmin(sure):03d}.jpg")
    page.get_by_label("Order").select_option("path")
    assert paths(page) == sorted(paths(page))
    page.get_by_role("link", name="dogs taken for cats").click()
    assert count(page) == f"{WRONG // 2} of 120 shown"


def test_the_keyboard_alone_is_enough(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the result"
    page.get_by_label("Path contains").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip the images"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    second = page.evaluate("document.activeElement.firstElementChild.alt")
    at = paths(page).index(second)  # which one it is differs: the browser may scroll first
    page.keyboard.press("Enter")
    assert page.locator("#about small").inner_text() == second
    for _ in range(at + 1):
        page.keyboard.press("ArrowLeft")
    assert page.inner_text("#place") == "1 of 120"
    assert page.locator("#about small").inner_text() == paths(page)[0]
    for _ in range(100):
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#place") == "101 of 120"
    page.keyboard.press("Escape")
    assert not page.locator("#view").is_visible()
    # The event that says so comes a moment after the view has closed.
    page.wait_for_function("alt => document.activeElement.firstElementChild?.alt === alt", arg=paths(page)[100])


def test_the_table_of_classes_sorts(visit):
    page = visit()
    names = page.locator("table.sortable tbody th")
    assert names.all_inner_texts() == ["cats", "dogs"]
    page.get_by_role("button", name="Class", exact=True).press("Enter")
    assert page.get_by_role("columnheader", name="Class").get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="Class", exact=True).press("Enter")
    assert names.all_inner_texts() == ["dogs", "cats"]
    page.get_by_role("button", name="Images", exact=True).press("Enter")
    assert names.all_inner_texts() == ["cats", "dogs"]


def test_light_dark_and_print(visit):
    page = visit(color_scheme="light")
    ink = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('svg')).fill]"
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ink)
    assert (light[0], dark[0]) == ("rgb(255, 255, 255)", "rgb(20, 23, 26)")
    assert light[1] != dark[1]
    page.get_by_label("Outcome").select_option("right")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(ink)[0] == "rgb(255, 255, 255)"
    assert page.locator("#pics li:visible").count() == WRONG
    assert page.locator("select:visible, button:visible:not(.pics button)").count() == 7  # the table's heads


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(visit, pages, width):
    for address in pages[:2]:
        page = visit(address, width=width)
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("#pics button").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_javascript_the_images_are_there(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("#pics li:visible").count() == N
    assert page.locator("#pics img:visible").count() == N - 1  # one can't be read, and says so
    assert page.locator("noscript p").is_visible()
    assert not page.locator("#filters").is_visible()
