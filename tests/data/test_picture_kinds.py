"""One picture of every kind, each shown to the network as a person would see it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcats.data.files import look_at
from jaxcats.data.findings import findings
from jaxcats.data.index import scan
from jaxcats.data.preprocess import Preprocess, evaluation_pixels

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import picture_kinds  # noqa: E402

KINDS = picture_kinds.kinds(large=False)
GREY = ("grey", "1_bit", "float")
NOTES = {
    "gif_moving.gif": "first of 3 frames",
    "webp_moving.webp": "first of 3 frames",
    "png_moving.png": "first of 3 frames",
    "tiff_pages.tif": "first of 3 frames",
    "jpeg_ycck.jpg": "CMYK, made RGB",
    "png_16_grey.png": "more than 8 bits a pixel, scaled",
    "png_palette_see_through.png": "transparency laid on white",
    "png_alpha_profile.png": "transparency laid on white; colours converted from swap built-in",
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
    wanted = np.array(picture_kinds.FIELDS, float)
    if any(word in name for word in GREY):
        wanted = np.repeat(wanted @ [[0.299], [0.587], [0.114]], 3, 1)
    if "1_bit" in name:
        wanted = np.where(wanted > 128, 255.0, 0.0)
    np.testing.assert_allclose(seen, wanted, atol=12)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_unusual_is_noted_and_nothing_else(name, tmp_path):
    (tmp_path / name).write_bytes(KINDS[name])
    record = look_at(tmp_path / name)
    assert record.bad is None
    if name in NOTES:
        assert record.note == NOTES[name]
    elif not any(word in name for word in ("16_grey", "float", "cmyk", "alpha", "moving")):
        assert record.note == ""


def test_srgbs_own_profile_changes_no_bit(tmp_path):
    profile = picture_kinds.ImageCms.ImageCmsProfile(picture_kinds.ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    for name, options in (("with.png", {"icc_profile": profile}), ("without.png", {})):
        (tmp_path / name).write_bytes(picture_kinds.encoded(picture, "PNG", **options))
    pixels = [evaluation_pixels(tmp_path / name, Preprocess(size=32)) for name in ("with.png", "without.png")]
    np.testing.assert_array_equal(*pixels)


def test_the_index_keeps_the_notes_and_the_findings_say_them(tmp_path):
    for part in ("train", "valid"):
        for kind, names in (("a", ["jpeg.jpg", "gif_moving.gif"]), ("b", ["png.png", "bmp.bmp"])):
            (tmp_path / part / kind).mkdir(parents=True)
            for name in names:
                (tmp_path / part / kind / name).write_bytes(KINDS[name])
    for _ in range(2):  # from the files, and from the cache
        (said,) = [f for f in findings(scan(tmp_path)) if f["what"] == "unusual pictures"]
        assert said["examples"] == [f"{part}/a/gif_moving.gif: first of 3 frames" for part in ("train", "valid")]


def test_heic_without_the_plug_in_says_what_to_install(tmp_path):
    (tmp_path / "photo.heic").write_bytes(KINDS["heic.heic"])
    code = f"""
import sys; sys.modules["pillow_heif"] = None
from pathlib import Path
from jaxcats.data.files import look_at
print(look_at(Path({str(tmp_path / "photo.heic")!r})).bad)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == 'HEIC needs the extra "heic": pip install "jaxcats[heic]"\n'


def test_a_bomb_is_refused_unread(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert "too large" in look_at(tmp_path / "bomb.png").bad


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("name", ["megapixels_40.jpg", "megapixels_40_turned.jpg"])
def test_forty_megapixels_take_bounded_memory(name, tmp_path):
    """Decoded it is 120 MB; turning it upright and laying it out needs another, and nothing a third."""
    (tmp_path / name).write_bytes(picture_kinds.kinds()[name])
    code = f"""
import re
from jaxcats.data.preprocess import Preprocess, evaluation_pixels
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
evaluation_pixels({str(tmp_path / name)!r}, Preprocess())
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(name, int(done.stdout) / 2**20, "MiB")
    assert int(done.stdout) < 330 * 2**20
