import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxcats.common.errors import UserError
from jaxcats.data.images import ImageError, Preprocess, evaluation_pixels, open_upright

SMALL = Preprocess(size=32)
WEIGHTS = Preprocess(size=32, interpolation="bicubic", policy="weights", crop_fraction=0.875)


def plain_pillow(image: Image.Image, *, size: int, shorter: int, method: Image.Resampling) -> np.ndarray:
    """The definition: resize the whole image, then cut out the centre."""
    width, height = image.size
    sides = (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
    left, top = round((sides[0] - size) / 2.0), round((sides[1] - size) / 2.0)
    return np.asarray(image.resize(sides, method).crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(("width", "height"), [(60, 44), (44, 60), (33, 33), (32, 47), (31, 200), (500, 375), (9, 5)])
@pytest.mark.parametrize("preprocess", [SMALL, WEIGHTS], ids=["lesson", "weights"])
def test_evaluation_pixels_are_pillows_bit_for_bit(photo, encoded, preprocess, width, height):
    content = encoded(photo(1, width, height), quality=90)
    shorter, method = (32, Image.Resampling.BILINEAR) if preprocess is SMALL else (36, Image.Resampling.BICUBIC)
    expected = plain_pillow(Image.open(io.BytesIO(content)), size=32, shorter=shorter, method=method)
    assert expected.shape == (32, 32, 3)
    np.testing.assert_array_equal(evaluation_pixels(content, preprocess), expected)


def test_evaluation_pixels_of_real_photos_are_pillows(real_photos):
    for path in sorted(real_photos.glob("valid/*/*.jpg"))[::20]:
        expected = plain_pillow(Image.open(path), size=224, shorter=224, method=Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(evaluation_pixels(path, Preprocess()), expected)


def test_path_content_and_image_give_the_same_pixels(tmp_path, encoded):
    content = encoded(3)
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    pixels = evaluation_pixels(path, SMALL)
    assert pixels.dtype == np.uint8
    for source in (str(path), content, Image.open(path)):
        np.testing.assert_array_equal(evaluation_pixels(source, SMALL), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_come_out_upright(photo, encoded, kind, orientation):
    content = encoded(photo(2), kind, orientation=orientation)
    as_stored = Image.open(io.BytesIO(encoded(photo(2), kind))).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    as_stored.info["exif"] = exif.tobytes()
    upright = open_upright(content)
    assert upright.size == ((60, 44) if orientation < 5 else (44, 60))
    np.testing.assert_array_equal(np.asarray(upright), np.asarray(ImageOps.exif_transpose(as_stored)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_corrupt_exif_is_no_reason_to_refuse_an_image(encoded):
    assert open_upright(encoded(1, exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff garbage")).size == (60, 44)


RED, CLEAR_BLUE, WHITE = (200, 30, 40), (10, 20, 250, 0), (255, 255, 255)


def image_of(mode: str, colour) -> Image.Image:
    return Image.new(mode, (8, 8), colour)


def palette(colour, *, transparent: bool) -> bytes:
    image = Image.new("P", (8, 8), 0)
    image.putpalette(colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **({"transparency": 0} if transparent else {}))
    return buffer.getvalue()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(saved(image_of("L", 90), "PNG"), (90, 90, 90), id="grey"),
        pytest.param(saved(image_of("1", 1), "PNG"), WHITE, id="one-bit"),
        pytest.param(saved(image_of("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0), id="cmyk-tiff"),
        pytest.param(saved(image_of("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0), id="cmyk-jpeg"),
        pytest.param(image_of("YCbCr", (128, 128, 128)), (128, 128, 128), id="ycbcr"),
        pytest.param(palette(RED, transparent=False), RED, id="palette"),
        pytest.param(palette(RED, transparent=True), WHITE, id="palette-transparent"),
        pytest.param(saved(image_of("RGBA", CLEAR_BLUE), "PNG"), WHITE, id="rgba-clear"),
        pytest.param(saved(image_of("RGBA", (0, 0, 0, 51)), "PNG"), (204, 204, 204), id="rgba-veil"),
        pytest.param(saved(image_of("LA", (0, 51)), "PNG"), (204, 204, 204), id="grey-alpha"),
        pytest.param(saved(image_of("RGB", RED), "PNG", transparency=RED), WHITE, id="rgb-key"),
        pytest.param(saved(image_of("L", 90), "PNG", transparency=90), WHITE, id="grey-key"),
        pytest.param(saved(image_of("I;16", 257 * 100), "PNG"), (100, 100, 100), id="grey-16-png"),
        pytest.param(saved(image_of("I;16", 257 * 100), "PNG", transparency=257 * 100), WHITE, id="grey-16-key"),
        pytest.param(saved(image_of("I;16", 257 * 100), "TIFF"), (100, 100, 100), id="grey-16-tiff"),
        pytest.param(b"P5 8 8 65535\n" + b"\x64\x64" * 64, (100, 100, 100), id="grey-16-pgm"),
        pytest.param(saved(image_of("F", 0.2), "TIFF"), (51, 51, 51), id="float"),
        pytest.param(saved(image_of("RGB", RED), "BMP"), RED, id="bmp"),
        pytest.param(saved(image_of("RGB", RED), "WEBP", lossless=True), RED, id="webp"),
        pytest.param(
            saved(image_of("RGB", RED), "GIF", save_all=True, append_images=[image_of("RGB", WHITE)]),
            RED,
            id="animation",
        ),
    ],
)
def test_every_kind_of_image_becomes_rgb(content, expected):
    image = open_upright(content)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    np.testing.assert_allclose(np.asarray(image)[4, 4], expected, atol=2)


def test_adobe_inverted_cmyk_is_not_a_negative(photo):
    """Photoshop stores CMYK JPEGs inverted, with a marker that says so; Pillow writes the same."""
    cmyk = photo(5).convert("CMYK")
    content = saved(cmyk, "JPEG", quality=95)
    assert b"Adobe" in content
    difference = np.asarray(open_upright(content), int) - np.asarray(cmyk.convert("RGB"), int)
    assert np.abs(difference).mean() < 8


def test_16_bit_greys_keep_their_order():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    pixels = np.asarray(open_upright(saved(Image.fromarray(ramp), "PNG")))[..., 0]
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert len(np.unique(pixels)) == 256


def test_16_bit_greys_are_rounded_257ths_in_every_band_and_mode():
    every = np.resize(np.arange(65536), (700, 901))  # three bands
    expected = np.round(every * (255.0 / 65535.0)).astype(np.uint8)
    for stored in (every.astype(np.uint16), every.astype(np.int32)):
        pixels = np.asarray(open_upright(Image.fromarray(stored)))
        np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, 2))


def test_greys_beyond_their_range_are_scaled_by_it_over_all_bands():
    stored = np.linspace(-100, 300, 700 * 901).reshape(700, 901)
    for values in (stored.astype(np.float32), (1000 * stored).astype(np.int32)):
        low, high = float(values.min()), float(values.max())
        expected = np.round((values.astype(np.float64) - low) * (255.0 / (high - low))).astype(np.uint8)
        np.testing.assert_array_equal(np.asarray(open_upright(Image.fromarray(values)))[..., 0], expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.2, np.inf, 1.0, -np.inf, 0.0], [51, 255, 255, 0, 0]),
        ([0.2, np.inf, 0.4, np.nan, -np.inf], [51, 102, 102, 0, 0]),
        ([-100.0, np.inf, 155.0, -np.inf, 0.0], [0, 255, 255, 0, 100]),
        ([np.inf, -np.inf, np.inf, np.inf, np.inf], [0, 0, 0, 0, 0]),
    ],
)
def test_infinite_greys_are_the_ends_of_the_finite_ones(values, expected):
    content = saved(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert np.asarray(open_upright(content))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 5000), (40_000, 1), (2, 30_000)])
def test_strips_give_a_square_and_no_gigabytes(width, height):
    image = Image.new("RGB", (width, height), RED)
    pixels = evaluation_pixels(image, Preprocess())
    assert pixels.shape == (224, 224, 3)
    assert (pixels == np.array(RED, np.uint8)).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"<html>404</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "EPS"),
    ],
)
def test_what_is_no_image_says_so(content, reason):
    with pytest.raises(ImageError, match=reason):
        open_upright(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_is_an_error(photo, encoded, kind):
    content = encoded(photo(1, 300, 300), kind)
    with pytest.raises(ImageError, match="truncated"):
        open_upright(content[: len(content) // 2])


def test_missing_file_says_so(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        open_upright(tmp_path / "absent.jpg")


def test_a_bomb_is_refused():
    content = bytearray(saved(Image.new("1", (8, 8)), "BMP"))
    content[18:26] = (20_000).to_bytes(4, "little") * 2
    with pytest.raises(ImageError, match="too large"):
        open_upright(bytes(content))


def test_the_record_survives_json():
    record = Preprocess(size=96, interpolation="bicubic", policy="weights", mean=(0.1, 0.2, 0.3))
    assert Preprocess.from_dict(record.to_dict()) == record
    assert Preprocess.from_dict({"size": 64}) == Preprocess(size=64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sise": 224}, "unknown field 'sise'"),
        ({"interpolation": "nearest"}, "bilinear, bicubic"),
        ({"policy": "x"}, "lesson, weights"),
    ],
)
def test_an_impossible_record_is_an_error(values, message):
    with pytest.raises(UserError, match=message):
        Preprocess.from_dict(values)


def test_neither_tensorflow_nor_jax_is_imported():
    code = (
        "import sys; import jaxcats.data.images, jaxcats.data.index, jaxcats.data.pipeline; "
        "print(sorted({'tensorflow', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
