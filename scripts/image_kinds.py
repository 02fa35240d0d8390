"""Makes one image of every kind, and a contact sheet of what the network sees of each:

    python scripts/image_kinds.py --out kinds.png [--keep FOLDER] [--small]

All images show the same four fields: red and green above, blue and white below (greyscale images show their brightness).
In an image with transparency, the white field is transparent.
"""

import argparse
import io
import struct
import tempfile
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw

from jaxcats.data.files import inspect_file
from jaxcats.data.images import Preprocess, evaluation_pixels

FIELDS = ((230, 30, 30), (30, 200, 40), (40, 50, 220), (255, 255, 255))
ORIENTATION = 0x0112


def plain(width: int = 96, height: int = 64) -> Image.Image:
    """The four fields."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for number, colour in enumerate(FIELDS):
        down, right = divmod(number, 2)
        pixels[down * height // 2 : (down + 1) * height // 2, right * width // 2 : (right + 1) * width // 2] = colour
    return Image.fromarray(pixels)


def has_alpha(width: int = 96, height: int = 64) -> Image.Image:
    """The four fields; the white one is black and transparent instead."""
    image = plain(width, height).convert("RGBA")
    image.paste((0, 0, 0, 0), (width // 2, height // 2, width, height))
    return image


def png16() -> bytes:
    """A PNG with 16 bits per channel, which Pillow cannot write."""
    pixels = np.asarray(plain()).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 96, 64, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    whole = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def ycck() -> bytes:
    """A JPEG as Adobe's programs write it: inverted CMYK, stored as YCCK."""
    cmyk = plain().convert("CMYK")
    *cmy, black = cmyk.split()
    luma = Image.merge("RGB", cmy).convert("YCbCr").split()
    # Pillow inverts as it writes; the decoder undoes YCbCr first.
    channels = [channel.point([255 - v for v in range(256)]) for channel in luma]
    content = bytearray(encoded(Image.merge("CMYK", (*channels, black)), "JPEG", quality=95))
    content[content.index(b"Adobe") + 11] = 2  # the marker's transform: YCCK
    return bytes(content)


def swapped_profile() -> bytes:
    """An ICC profile that swaps red and green, so that a reader that ignores the profile shows it."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = content.index(b"rXYZ"), content.index(b"gXYZ")
    content[red : red + 4], content[green : green + 4] = b"gXYZ", b"rXYZ"
    name = "sRGB".encode("utf-16-be")
    return bytes(content).replace(name, "swap".encode("utf-16-be"))


def linear_grey_profile() -> bytes:
    """An ICC profile for greys in proportion to light; Pillow can make profiles for colours only."""
    white = struct.pack(">3i", 63190, 65536, 54061)
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 12) + b"linear grey\0" + bytes(78),
        b"wtpt": b"XYZ \0\0\0\0" + white,
        b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, 256),  # a gamma of 1.0
        b"cprt": b"text\0\0\0\0none\0",
    }
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = bytes(4) + b"\2\x40\0\0" + b"mntrGRAYXYZ " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    return (struct.pack(">I", start + len(data)) + head + white).ljust(128, b"\0") + table + data


def linear(grey: Image.Image) -> Image.Image:
    """Converts 8-bit sRGB greys (with alpha or without) to greys in proportion to light."""
    light = [v / 255 / 12.92 if v < 11 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in range(256)]
    table = [round(255 * v) for v in light]
    return grey.point(table + list(range(256)) * (grey.mode == "LA"))


def encoded(image: Image.Image, kind: str, *, orientation: int | None = None, **options) -> bytes:
    if orientation:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def lying(orientation: int) -> Image.Image:
    """The image as a camera stores it with this EXIF orientation."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's Transpose numbers of the inverse
    return plain().transpose(Image.Transpose(undo[orientation])) if orientation > 1 else plain()


def deep(kind: str, width: int = 96, height: int = 64) -> Image.Image:
    """Greys with 16 bits or as floats; in the kind "infinite", one value is infinite."""
    grey = np.asarray(plain(width, height).convert("L"))
    if kind == "16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    values = (grey / 255).astype(np.float32)
    if kind == "infinite":
        values[0, 0] = np.inf
    return Image.fromarray(values)


def swap(image: Image.Image) -> Image.Image:
    """Swaps red and green, so that the image is right with the profile of `swapped_profile`."""
    red, green, *others = image.split()
    return Image.merge(image.mode, (green, red, *others))


def large_kinds() -> dict[str, Callable[[], bytes]]:
    """By file name, a function that makes an image of 40 megapixels."""
    size, turned, jpeg = (7744, 5184), Image.Transpose.ROTATE_90, {"kind": "JPEG", "quality": 80}
    profile = {"icc_profile": swapped_profile()}
    makers: dict[str, Callable[[], bytes]] = {
        ".jpg": lambda: encoded(plain(*size), **jpeg),
        "_turned.jpg": lambda: encoded(plain(*size).transpose(turned), **jpeg, orientation=6),
        "_profile.jpg": lambda: encoded(swap(plain(*size)), **jpeg, **profile),
        "_profile_turned.jpg": lambda: encoded(swap(plain(*size)).transpose(turned), **jpeg, **profile, orientation=6),
        "_cmyk.jpg": lambda: encoded(plain(*size).convert("CMYK"), **jpeg),
        "_alpha.png": lambda: encoded(has_alpha(*size), "PNG", compress_level=1),
        "_16_grey.png": lambda: encoded(deep("16", *size), "PNG", compress_level=1),
    }
    return {f"megapixels_40{name}": maker for name, maker in makers.items()}


def several_frames() -> dict[str, bytes]:
    """Animations and documents of three images, by file name; some are cut off within the second image."""
    rgb = plain()
    pages = {"save_all": True, "append_images": [Image.new("RGB", rgb.size, name) for name in ("black", "purple")]}
    gif, tiff = encoded(rgb, "GIF", **pages, duration=100), encoded(rgb, "TIFF", **pages)
    start = b"\x21\xf9\x04"  # of each frame of a GIF
    second = gif.index(start, gif.index(start) + 1)
    return {
        "png_moving.png": encoded(rgb, "PNG", **pages, duration=100),
        "webp_moving.webp": encoded(rgb, "WEBP", lossless=True, **pages, duration=100),
        "gif_moving.gif": gif,
        "gif_moving_cut.gif": gif[: second + 12],
        "tiff_pages.tif": tiff,
        "tiff_pages_cut.tif": tiff[: len(tiff) // 2],
    }


def kinds(large: bool = True) -> dict[str, bytes]:
    """The content of each file by its name."""
    rgb, grey, alpha = plain(), plain().convert("L"), has_alpha()
    greys = {"icc_profile": linear_grey_profile()}
    black = np.asarray(deep("16")) % 65535  # the value of the white field becomes the transparent one
    contents = {
        "jpeg.jpg": encoded(rgb, "JPEG", quality=95),
        "jpeg_progressive.jpg": encoded(rgb, "JPEG", quality=95, progressive=True),
        "jpeg_grey.jpg": encoded(grey, "JPEG"),
        "jpeg_cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG", quality=95),
        "jpeg_ycck.jpg": ycck(),
        "jpeg_profile.jpg": encoded(swap(rgb), "JPEG", quality=95, subsampling=0, icc_profile=swapped_profile()),
        "jpeg_grey_profile.jpg": encoded(linear(grey), "JPEG", quality=95, **greys),
        "jpeg_broken_profile.jpg": encoded(rgb, "JPEG", quality=95, icc_profile=b"no profile at all"),
        "png.png": encoded(rgb, "PNG"),
        "png_palette.png": encoded(rgb.quantize(8), "PNG"),
        "png_palette_see_through.png": encoded(alpha.quantize(8), "PNG"),
        "png_grey_alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "png_alpha.png": encoded(alpha, "PNG"),
        "png_alpha_profile.png": encoded(swap(alpha), "PNG", icc_profile=swapped_profile()),
        "png_grey_alpha_profile.png": encoded(linear(alpha.convert("LA")), "PNG", **greys),
        "png_16_grey.png": encoded(deep("16"), "PNG"),
        "png_16_grey_see_through.png": encoded(Image.fromarray(black), "PNG", transparency=0),
        "png_16_rgb.png": png16(),
        "png_1_bit.png": encoded(grey.point([255 * (v > 128) for v in range(256)]).convert("1"), "PNG"),
        "gif.gif": encoded(rgb, "GIF"),
        "webp.webp": encoded(rgb, "WEBP", quality=90),
        "webp_alpha.webp": encoded(alpha, "WEBP", lossless=True),
        "avif.avif": encoded(rgb, "AVIF", quality=90),
        "bmp.bmp": encoded(rgb, "BMP"),
        "tiff_lzw.tif": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "tiff_16_grey.tif": encoded(deep("16"), "TIFF"),
        "tiff_float.tif": encoded(deep("float"), "TIFF"),
        "tiff_float_infinite.tif": encoded(deep("infinite"), "TIFF"),
        "tiff_cmyk.tif": encoded(rgb.convert("CMYK"), "TIFF"),
        "jpeg2000.jp2": encoded(rgb, "JPEG2000"),
        "ppm.ppm": encoded(rgb, "PPM"),
        "png_called.jpg": encoded(rgb, "PNG"),
        "jpeg_called.png": encoded(rgb, "JPEG", quality=95),
        **several_frames(),
        **{f"exif_{o}.jpg": encoded(lying(o), "JPEG", quality=95, orientation=o) for o in range(1, 9)},
        "strip_wide.png": encoded(plain(6000, 2), "PNG"),
        "strip_one_pixel_high.png": encoded(plain(600, 2).crop((0, 0, 600, 1)), "PNG"),
    }  # fmt: skip
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
        contents["heic.heic"] = encoded(rgb, "HEIF", quality=90)
    if large:
        contents |= {name: maker() for name, maker in large_kinds().items()}
    return contents


def sheet(folder: Path, names: list[str], side: int = 96, columns: int = 8) -> Image.Image:
    """Draws what the network sees of each file, with the name of the file and the note about it."""
    high = side + 54
    out = Image.new("RGB", (columns * (side + 60), -(-len(names) // columns) * high), "grey")
    draw = ImageDraw.Draw(out)
    for number, name in enumerate(names):
        y, x = divmod(number, columns)
        x, y = x * (side + 60) + 4, y * high + 2
        out.paste(Image.fromarray(evaluation_pixels(folder / name, Preprocess(size=side))), (x, y))
        record = inspect_file(folder / name)
        words = f"{name.replace('_', ' ')}\n{record.bad or record.note or ''}"
        lines = [part for line in words.split("\n") for part in textwrap.wrap(line, 28)]
        draw.text((x, y + side + 1), "\n".join(lines[:4]), fill="white", font_size=9)
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="the contact sheet, a PNG")
    p.add_argument("--keep", type=Path, help="a folder for the files themselves")
    p.add_argument("--small", action="store_true", help="leave out the images of 40 megapixels")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        contents = kinds(large=not args.small)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        sheet(folder, sorted(contents)).save(args.out)
    print(f"{len(contents)} kinds of image: {args.out}")


if __name__ == "__main__":
    main()
