"""The page, as text: what is in it, what can't be, and how large it gets."""

import base64
import hashlib
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageFilter
from reports import evaluated, metrics_of, run_folder

from jaxcats.data.images import ImageError
from jaxcats.evaluate import pages, report

VOID = {"meta", "link", "img", "input", "br", "hr"}
SVG = '<svg viewBox="0 0 300 200" xmlns="http://www.w3.org/2000/svg"><path d="M0 0" stroke="currentColor" /></svg>'
HOSTILE = [
    "<script>alert(1)</script>.jpg",
    '"><img src=x onerror=alert(1)>.jpg',
    "two\nlines' &amp; .jpg",
    os.fsdecode(b"caf\xe9.jpg"),
    "a\u202egpj.exe",
]


class Page(HTMLParser):
    """The elements of a page; elements that are closed in another order than they were opened fail the test."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words, self.raw = [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag == "p" and self.open[-1] != "p":
            return
        assert self.open.pop() == tag, (tag, self.open[-3:])

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.raw[self.open[-1]] = self.raw.get(self.open[-1], "") + data
        else:
            self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))

    @property
    def items(self):
        return [attrs for attrs in self.all("li") if "data-a" in attrs]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Eight images with about as much detail as photos."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k in range(8):
        noise = rng.integers(0, 256, (180, 240, 3)).astype(np.uint8)
        image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(4))
        image = image.point(lambda v: max(0, min(255, 128 + 5 * (v - 128))))
        image.save(root / f"{k}.jpg", quality=90)
    return root


def make(root, n=40, *, classes=("cats", "dogs"), wrong=4, threshold=0.6, paths=None, **more):
    """An evaluated split of n images, the first `wrong` of which are predicted wrong."""
    metrics = metrics_of(classes, n=n, errors=wrong, threshold=threshold) | more.pop("metrics", {})
    paths = paths or [f"{i % 8}.jpg" for i in range(n)]
    return evaluated(root, paths, classes=classes, wrong=wrong, metrics=metrics, **more)


def test_the_result_comes_first_and_everything_else_is_there(drawn, tmp_path):
    leak = {"what": "images in two splits", "count": 1, "examples": ["a.jpg = b.jpg"], "meaning": "Remove one."}
    suspects = [{"path": "1.jpg", "label": "cats", "suggested": "dogs", "reason": "label"}]
    folder = run_folder(
        tmp_path / "run", findings=[leak | {"grave": True}], suspects=suspects, versions={"jax": "0.10.2"}
    )
    figures = {"confusion": SVG}
    made = make(drawn, n=1000, wrong=9, threshold=0.9, folder=folder, metrics={"seen_before": {"train": 3}})
    page = Page(report.render(made, figures, budget=300_000))
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    in_order = [
        "9 errors of 1,000 (99.1 %, 95 % interval 98.3 to 99.5 %)",
        "Serious. Images in two splits: 1. Remove one.",
        "These images contain 3 of the run's own train images",
        "Note. The temperature and the abstain threshold were chosen on these images",
        "resnet34",
        "7 train",
        "off by 1.2 % on average as trained, and by 0.5 % after a temperature of 1.5",
        "abstains below 90.0 %, a threshold that was chosen for at most 0.5 % errors, it predicts 95.0 % of the images, and 4 of",
        "everything off the diagonal is an error",
        "dogs taken for cats: 6",
        "0.9991",
        "labelled cats rather dogs",
        "images in two splits: 1",
        "a.jpg = b.jpg",
        "jaxcats.predict",
        "jaxcats.train --config",
        "0.10.2",
        "root: images",
    ]
    places = [re.sub(r"\s+", "", text).find(re.sub(r"\s+", "", words)) for words in in_order]
    assert -1 not in places, in_order[places.index(-1)]
    assert places == sorted(places)


def test_a_run_with_user_functions_is_not_trained_again_by_its_configuration(drawn):
    page = Page(report.render(make(drawn, n=4, user_functions={"head": {"loss_fn": "loss.focal"}})))
    assert "functions that the configuration doesn't hold (head: loss_fn loss.focal)" in page.text
    assert "jaxcats.train" not in page.text


def test_no_threshold_and_classes_without_images_are_said(drawn):
    page = Page(report.render(make(drawn, threshold=None)))
    assert "so the classifier never abstains" in page.text
    assert len([a for a in page.all("option") if a["value"] == "unsure"]) == 1  # an order, but no outcome
    assert "–" in page.text
    assert "nan" not in page.text.lower()
    assert "None" not in page.text


def test_names_are_only_ever_text(drawn, tmp_path):
    """Names of files and classes, and every other text, with markup, quotes, newlines and bytes that are not UTF-8."""
    classes = [HOSTILE[0], HOSTILE[1]]
    findings = [{"what": HOSTILE[0], "count": 1, "examples": HOSTILE, "meaning": HOSTILE[1], "grave": True}]
    suspects = [{"path": p, "label": classes[0], "suggested": classes[1], "reason": "outlier"} for p in HOSTILE]
    versions = dict.fromkeys(HOSTILE, HOSTILE[1])
    folder = run_folder(tmp_path / HOSTILE[1], findings=findings, suspects=suspects, versions=versions)
    functions = {HOSTILE[0]: {"loss_fn": HOSTILE[1]}}
    made = make(
        drawn, n=5, paths=HOSTILE, classes=classes, folder=folder, data_root=HOSTILE[1], user_functions=functions
    )
    page = Page(report.render(made).encode().decode())  # it is UTF-8
    assert len(page.all("script")) == 1
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not [attrs for attrs in page.all("img") if attrs.get("src") == "x"]
    assert "<script>alert(1)</script>.jpg" in page.text
    assert "two\\nlines' &amp; .jpg" in page.text
    assert "caf\\udce9.jpg" in page.text
    assert "a\\u202egpj.exe" in page.text
    assert "no such file" in page.text


def test_it_loads_nothing_from_anywhere(drawn, tmp_path):
    (tmp_path / "heat.png").write_bytes(b"any")
    image = pages.embedded_image(tmp_path / "heat.png")
    figures = {"confusion": SVG, "heat_maps": image}
    folder = run_folder(
        tmp_path / "run", suspects=[{"path": "1.jpg", "label": "a", "suggested": "b", "reason": "label"}]
    )
    text = report.render(make(drawn, folder=folder), figures)
    page = Page(text)
    addresses = [
        value for _, attrs in page.elements for name, value in attrs.items() if name in ("src", "href", "srcset")
    ]
    assert len(addresses) > 40
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert "url(" not in page.raw["style"]
    assert "@import" not in page.raw["style"]
    assert not {"iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.raw[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_it_is_sound_html(drawn):
    page = Page(report.render(make(drawn)))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in page.all("a") if "=" not in a["href"]}
    assert targets <= set(ids)
    assert all("alt" in attrs for attrs in page.all("img"))
    assert page.all("html")[0]["lang"] == "en"


def test_a_thousand_images_stay_under_five_megabytes(drawn):
    figures = {f"f{k}": SVG.replace("M0 0", "M0 0" + 9_000 * "L10 10") for k in range(6)}
    text = report.render(make(drawn, n=1000, wrong=10), figures)
    page = Page(text)
    assert len(text.encode()) < 5_000_000
    assert len(page.items) == 1000
    assert all(src.startswith("data:image/webp") for src in (a["src"] for a in page.all("img") if "src" in a))
    assert "are on this page" not in page.text


def test_more_than_fit_are_drawn_and_the_page_says_so(drawn):
    made = make(drawn, n=5000, wrong=30)
    text = report.render(made, budget=800_000)
    page = Page(text)
    assert len(text.encode()) <= 800_000
    assert len(text.encode()) > 600_000
    kept = len(page.items)
    assert (
        f"{kept:,} of 5,000 images are on this page, to keep it small, chosen in this order: the 30 wrong ones"
        in page.text
    )
    assert sum("wrong" in a["class"].split() for a in page.items) == 30
    least_sure = sorted(float(a["data-m"]) for a in page.items if "wrong" not in a["class"].split())
    p = np.exp(made.log_probs[30:])
    margins = np.sort(np.abs(p[:, 0] - p[:, 1]))
    np.testing.assert_allclose(least_sure[:100], margins[:100], rtol=1e-3)
    assert report.render(made, budget=800_000) == text


@pytest.mark.slow
def test_a_thousand_real_photos_stay_under_five_megabytes(photos):
    paths = sorted(str(p.relative_to(photos)) for p in (photos / "valid").glob("*/*.jpg"))[:1000]
    text = report.render(make(photos, n=len(paths), paths=paths, wrong=10))
    assert len(text.encode()) < 5_000_000
    assert len(Page(text).items) == len(paths)


def test_more_wrong_ones_than_fit(drawn):
    page = Page(report.render(make(drawn, n=900, wrong=800), budget=500_000))
    assert f"{len(page.items)} of 900 images are on this page" in page.text
    assert "in this order: the 800 wrong ones" in page.text
    assert all("wrong" in a["class"].split() for a in page.items)
    losses = [float(a["data-l"]) for a in page.items]
    assert losses == sorted(losses, reverse=True)


def test_an_image_that_has_gone_is_named_with_the_reason(drawn):
    page = Page(report.render(make(drawn, n=2, wrong=0, paths=["gone.jpg", "0.jpg"])))
    assert "gone.jpg" in page.text
    assert "no such file or directory" in page.text
    assert len(page.items) == 2


def test_a_hundred_classes_fold_away(drawn):
    classes = [f"species_{k:03d}_with_a_rather_long_name" for k in range(100)]
    page = Page(report.render(make(drawn, n=100, classes=classes)))
    assert "All 100 classes" in page.text
    assert len(page.all("option")) > 200


@pytest.mark.parametrize(
    ("size", "side", "want"),
    [
        ((400, 300), 140, (140, 105)),
        ((300, 400), 140, (105, 140)),
        ((60, 50), 140, (60, 50)),
        ((4000, 100), 50, (50, 1)),
    ],
)
def test_thumbnails_keep_the_image_whole(size, side, want):
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, "JPEG")
    small = Image.open(io.BytesIO(pages.thumbnail(data.getvalue(), side=side)))
    assert (small.format, small.size) == ("WEBP", want)


def test_thumbnails_stand_upright():
    image, data = Image.new("RGB", (200, 100), "blue"), io.BytesIO()
    image.paste("red", (0, 0, 100, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees: what was left is up
    image.save(data, "JPEG", exif=exif, quality=95)
    small = Image.open(io.BytesIO(pages.thumbnail(data.getvalue(), side=100))).convert("RGB")
    assert small.size == (50, 100)
    red, _, blue = small.getpixel((25, 10))
    assert red > 200 > 50 > blue


def test_what_is_no_image_has_no_thumbnail():
    with pytest.raises(ImageError, match="not an image"):
        pages.thumbnail(b"nothing")


@pytest.mark.parametrize(
    ("p", "want"), [(0.971, "97.1 %"), (0.99999, "> 99.9 %"), (1.0, "100.0 %"), (0.0001, "< 0.1 %"), (0.0, "0.0 %")]
)
def test_no_probability_is_rounded_to_certainty(p, want):
    assert pages.percent(p).replace("\N{NO-BREAK SPACE}", " ") == want
