"""One image of every kind, each shown to the network as a person would see it."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcats.data import images
from jaxcats.data.files import inspect_file
from jaxcats.data.images import Preprocess, evaluation_pixels, open_upright
from jaxcats.data.index import scan
from jaxcats.data.quality import findings, inspect_image

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import image_kinds  # noqa: E402

KINDS = image_kinds.kinds(large=False)
GREY = ("grey", "1_bit", "float")
NOTES = {
    "gif_moving.gif": "first of 3 frames",
    "webp_moving.webp": "first of 3 frames",
    "png_moving.png": "first of 3 frames",
    "tiff_pages.tif": "first of 3 frames",
    "gif_moving_cut.gif": "first of several frames, later ones damaged",
    "tiff_pages_cut.tif": "first of several frames, later ones damaged",
    "jpeg_ycck.jpg": "CMYK, made RGB",
    "png_16_grey.png": "more than 8 bits a pixel, scaled",
    "png_16_grey_see_through.png": "more than 8 bits a pixel, scaled; transparency laid on white",
    "png_palette_see_through.png": "transparency laid on white",
    "png_alpha_profile.png": "transparency laid on white; colours converted from swap built-in",
    "png_grey_alpha_profile.png": "transparency laid on white; colours converted from linear grey",
    "jpeg_grey_profile.jpg": "colours converted from linear grey",
    "jpeg_profile.jpg": "colours converted from swap built-in",
    "jpeg_broken_profile.jpg": "broken colour profile left out",
    "png_called.jpg": "PNG by its content, whatever its name says",
    "jpeg_called.png": "JPEG by its content, whatever its name says",
}


def fields(pixels: np.ndarray) -> np.ndarray:
    """Mean colours of the four fields, away from their borders."""
    side = len(pixels)
    a, b = slice(side // 8, 3 * side // 8), slice(5 * side // 8, 7 * side // 8)
    return np.array([pixels[y, x].reshape(-1, 3).mean(0) for y in (a, b) for x in (a, b)])


@pytest.mark.parametrize("name", [n for n in KINDS if "strip" not in n])
def test_it_looks_as_it_should(name, tmp_path):
    (tmp_path / name).write_bytes(KINDS[name])
    seen = fields(evaluation_pixels(tmp_path / name, Preprocess(size=64)))
    wanted = np.array(image_kinds.FIELDS, float)
    if any(word in name for word in GREY):
        wanted = np.repeat(wanted @ [[0.299], [0.587], [0.114]], 3, 1)
    if "1_bit" in name:
        wanted = np.where(wanted > 128, 255.0, 0.0)
    np.testing.assert_allclose(seen, wanted, atol=12)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_unusual_is_noted_and_nothing_else(name, tmp_path):
    (tmp_path / name).write_bytes(KINDS[name])
    record, seen = inspect_file(tmp_path / name), inspect_image(tmp_path / name)  # the second is doctor's
    assert (record.bad, seen.sha256) == (None, record.sha256)
    said = [detail for kind, detail in seen.notes if kind in ("unusual image", "wrong extension")]
    assert "; ".join(said) == record.note
    if name in NOTES:
        assert record.note == NOTES[name]
    elif not any(word in name for word in ("16_grey", "float", "cmyk", "alpha", "moving")):
        assert record.note == ""


def test_srgbs_own_profile_changes_no_bit(tmp_path):
    profile = image_kinds.ImageCms.ImageCmsProfile(image_kinds.ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    for name, options in (("with.png", {"icc_profile": profile}), ("without.png", {})):
        (tmp_path / name).write_bytes(image_kinds.encoded(image, "PNG", **options))
    pixels = [evaluation_pixels(tmp_path / name, Preprocess(size=32)) for name in ("with.png", "without.png")]
    np.testing.assert_array_equal(*pixels)


def test_the_colour_of_transparency_is_looked_for_before_colours_are_converted():
    for mode, colour, profile in (
        ("RGB", (200, 30, 40), image_kinds.swapped_profile()),
        ("L", 90, image_kinds.linear_grey_profile()),
    ):
        image = Image.new(mode, (8, 8), colour)
        content = image_kinds.encoded(image, "PNG", transparency=colour, icc_profile=profile)
        assert (np.asarray(open_upright(content)) == 255).all()


def test_a_grey_profile_on_deep_greys_is_said_to_be_left_out(tmp_path):
    for name, options in (("with.png", {"icc_profile": image_kinds.linear_grey_profile()}), ("without.png", {})):
        (tmp_path / name).write_bytes(image_kinds.encoded(image_kinds.deep("16"), "PNG", **options))
    pixels = [evaluation_pixels(tmp_path / name, Preprocess(size=32)) for name in ("with.png", "without.png")]
    np.testing.assert_array_equal(*pixels)
    said = "more than 8 bits a pixel, scaled; colour profile of another kind left out"
    assert inspect_file(tmp_path / "with.png").note == said


@pytest.mark.parametrize("orientation", [None, 6])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_large_images_are_converted_in_bands_as_if_at_once(mode, orientation, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (900, 701, 4), np.uint8)
    profile = image_kinds.linear_grey_profile() if mode == "LA" else image_kinds.swapped_profile()
    image = Image.fromarray(pixels).convert(mode)
    content = image_kinds.encoded(image, "PNG", orientation=orientation, icc_profile=profile, compress_level=0)
    in_bands = open_upright(content)
    assert in_bands.width * in_bands.height > 2 * images.BAND
    monkeypatch.setattr(images, "BAND", 2**30)
    np.testing.assert_array_equal(np.asarray(open_upright(content)), np.asarray(in_bands))


def test_the_image_of_a_caller_is_left_as_it_was_and_none_is_converted_twice():
    image = Image.open(io.BytesIO(KINDS["jpeg_profile.jpg"]))
    before = np.array(image)
    first, second = (np.asarray(open_upright(image)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(np.asarray(image), before)
    assert (first != before).any()
    np.testing.assert_array_equal(np.asarray(open_upright(open_upright(image))), first)


def test_the_index_keeps_the_notes_and_the_findings_say_them(tmp_path):
    for part in ("train", "valid"):
        for kind, names in (("a", ["jpeg.jpg", "gif_moving.gif"]), ("b", ["png.png", "bmp.bmp"])):
            (tmp_path / part / kind).mkdir(parents=True)
            for name in names:
                (tmp_path / part / kind / name).write_bytes(KINDS[name])
    for _ in range(2):  # from the files, and from the cache
        (said,) = [f for f in findings(scan(tmp_path)) if f["what"] == "unusual image"]
        assert said["examples"] == [f"{part}/a/gif_moving.gif: first of 3 frames" for part in ("train", "valid")]


def test_heic_without_the_plug_in_says_what_to_install(tmp_path):
    (tmp_path / "photo.heic").write_bytes(KINDS["heic.heic"])
    code = f"""
import sys; sys.modules["pillow_heif"] = None
from pathlib import Path
from jaxcats.data.files import inspect_file
print(inspect_file(Path({str(tmp_path / "photo.heic")!r})).bad)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == 'HEIC needs the extra "heic": pip install "jaxcats[heic]"\n'


def test_a_bomb_is_refused_unread(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert "too large" in inspect_file(tmp_path / "bomb.png").bad


MIB = {  # as measured, and a tenth more
    ".jpg": 180,
    "_turned.jpg": 340,
    "_profile.jpg": 180,
    "_profile_turned.jpg": 340,
    "_cmyk.jpg": 340,
    "_alpha.png": 340,
    "_16_grey.png": 265,
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("what", ["evaluation_pixels(path, Preprocess())", "inspect_file(path)"])
@pytest.mark.parametrize("name", MIB)
def test_forty_megapixels_take_bounded_memory(name, what, tmp_path):
    """Decoded it is 150 MiB (16-bit greys half of that): turning it, or making it RGB, needs another, nothing a third."""
    path = tmp_path / f"megapixels_40{name}"
    path.write_bytes(image_kinds.large_kinds()[path.name]())
    code = f"""
import re
from pathlib import Path
from jaxcats.data.files import inspect_file
from jaxcats.data.images import Preprocess, evaluation_pixels
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
path = Path({str(path)!r})
before = peak()
seen = {what}
assert getattr(seen, "bad", None) is None, seen
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(f"{path.name}, {what}: {float(done.stdout):.0f} MiB")
    assert float(done.stdout) < MIB[name]


def test_transparency_that_nothing_shows_through_is_not_noted(tmp_path):
    image = Image.new("RGBA", (64, 64), (10, 20, 30, 255))
    image.save(tmp_path / "a.png")
    assert inspect_file(tmp_path / "a.png").note == ""
    image.putpixel((5, 5), (10, 20, 30, 254))
    image.save(tmp_path / "a.png")
    assert inspect_file(tmp_path / "a.png").note == "transparency laid on white"
