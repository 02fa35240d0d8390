"""A data set of TensorFlow Datasets as a folder of images that jaxcats trains on:

    python scripts/prepare_data.py cats_vs_dogs --out data/cats_vs_dogs

train/ and valid/ (and test/ where there are three) with a folder per class. Splits are TFDS's own: validation, or else
test, becomes valid/. A data set with one split has images held out, as many in each class as its share, chosen by
content and --seed: 2,000 of cats_vs_dogs, a fifth of others. Stopped at any moment and given again, the command goes on
and ends with the same folder. Images are written as TFDS keeps them, byte for byte, where that is JPEG or PNG.
"""

import argparse
import collections
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from jaxcats.common.cli import Parser, run_command
from jaxcats.common.errors import UserError, nearest
from jaxcats.common.io import write_bytes, write_json
from jaxcats.data.splits import Rule, split_by_content

MARKER, SPLIT = "prepared.json", "split.json"
USED = ("train", "validation", "test")  # of the splits that TFDS may have
HELD_OUT = {"cats_vs_dogs": 2000}
# What the data sets' own sources say beyond what is seen here.
KNOWN = {
    "cats_vs_dogs": "TFDS leaves out 1,738 corrupt images of the original and encodes all others again as JPEG: pixels differ a little from the original's."
}
ENDINGS = {"JPEG": ".jpg", "PNG": ".png"}


def open_data(name: str, data_dir: str | None) -> Any:
    """The builder of a data set, downloaded and prepared by TFDS."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        close = nearest(name.partition("/")[0], tfds.list_builders())
        raise UserError(f"{name}: TFDS has no such data set.{close}") from None
    except (ValueError, TypeError, AssertionError) as error:  # no such configuration, or version, or way of writing it
        raise UserError(f"{name}: TFDS can't open it ({first_line(error)}).") from None
    try:
        builder.download_and_prepare()
    except (OSError, tfds.download.DownloadError, AssertionError, ImportError) as error:
        raise UserError(f"{name}: TFDS can't prepare it ({first_line(error)}).") from None
    return builder


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def folders(builder: Any, given: Sequence[str] | None) -> dict[str, str]:
    """The folder of each TFDS split that is used, in the order of writing."""
    known = [split for split in USED if split in builder.info.splits]
    if "train" not in known:
        raise UserError(f"{builder.name}: has no split train, only {', '.join(builder.info.splits)}.")
    for split in given or known:
        if split not in known:
            raise UserError(f"--splits: '{split}' is not one of {', '.join(known)}.{nearest(split, known)}")
    parts = [split for split in known if split in (given or known)]
    if "train" not in parts:
        raise UserError(f"--splits {' '.join(parts)}: has to have train among them.")
    own = {"train": "train"} | ({"validation": "valid", "test": "test"} if "validation" in parts else {"test": "valid"})
    return {split: own[split] for split in parts}


def keys(builder: Any, label: str | None) -> tuple[str, str, list[str]]:
    """The names of the image and the label in each example, and the classes."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    if label is None and builder.info.supervised_keys:
        label = builder.info.supervised_keys[1]
    label = label or (labels[0] if labels else None)
    if "image" in images:
        images = ["image"]
    if len(images) != 1 or label not in labels:
        raise UserError(
            f"{builder.name}: no data set for a classifier of images: images {images}, labels {labels}; --label says which."
        )
    return images[0], label, [n.replace("/", "_") for n in features[label].names]


def examples(builder: Any, split: str, image_key: str, label: str) -> Iterator[tuple[bytes, int]]:
    """(content, label) in TFDS's order, which is the same each time; those without a label have -1."""
    import tensorflow_datasets as tfds

    # In the order of the files; and read once, so a cache is only memory, and a warning of TensorFlow's where it is stopped.
    read = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    decoders = tfds.decode.PartialDecoding(
        {image_key: True, label: True}, decoders={image_key: tfds.decode.SkipDecoding()}
    )
    data = builder.as_dataset(split=split, decoders=decoders, read_config=read, shuffle_files=False)
    for example in data.as_numpy_iterator():
        yield example[image_key], int(example[label])


def as_file(content: bytes) -> tuple[bytes, str]:
    """An image's bytes and the ending of its name: as they are for JPEG and PNG, else as PNG."""
    with Image.open(io.BytesIO(content)) as image:
        if image.format in ENDINGS:
            return content, ENDINGS[image.format]
        out = io.BytesIO()
        image.save(out, "PNG")
        return out.getvalue(), ".png"


def begin(out: Path, wanted: dict[str, Any]) -> bool:
    """Makes or takes up the folder; True when it is finished. UserError for one that holds anything else.

    Other settings start over while there is no image: some are found impossible only when all images are counted.
    """
    marker = out / MARKER
    inside = list(out.iterdir()) if out.is_dir() else [out] if out.exists() else []
    if all(path.match(f".{MARKER}.*.tmp") for path in inside):  # killed while it wrote the marker
        write_json(marker, {"settings": wanted, "complete": False})
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        settings, finished = found["settings"], found["complete"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out}: holds something else; give a new or an empty folder.") from None
    half = list(out.rglob(".*.tmp"))
    if settings != wanted:
        if finished or {path for path in inside if path not in half} - {marker, out / SPLIT}:
            raise UserError(f"{out}: was begun with {settings}, not {wanted}; give another folder.")
        # Before the marker: it must never stand beside settings that it wasn't made by.
        (out / SPLIT).unlink(missing_ok=True)
        write_json(marker, {"settings": wanted, "complete": False})
    for path in half:
        path.unlink()
    return finished


def prepare(args: argparse.Namespace) -> None:
    if args.valid is not None and args.valid < 1:
        raise UserError(f"--valid {args.valid}: one image at least has to be held out.")
    builder = open_data(args.name, args.data_dir)
    image_key, label, classes = keys(builder, args.label)
    own = folders(builder, args.splits)
    wanted = {"name": builder.info.full_name, "label": label, "splits": list(own)}
    wanted |= {"valid": args.valid, "seed": args.seed}
    if begin(args.out, wanted):
        print(f"{args.out}: complete already.")
        return
    sides: dict[str, str] = {}
    if "valid" not in own.values():
        sides = held_out(builder, image_key, label, classes, args)
    counts, formats, unlabelled = collections.Counter(), collections.Counter(), 0
    for tfds_name, ours in own.items():
        # Closed at any error too, so that what is said of it has a line of its own.
        with tqdm(examples(builder, tfds_name, image_key, label), desc=tfds_name, unit="image") as bar:
            for number, (content, y) in enumerate(bar):
                if y < 0:
                    unlabelled += 1
                    continue
                data, ending = as_file(content)
                part = sides.get(hashlib.sha256(content).hexdigest(), ours)
                path = args.out / part / classes[y] / f"{classes[y]}.{number:06d}{ending}"
                if not path.exists():  # it is written whole or not at all
                    write_bytes(path, data)
                counts[part] += 1
                formats["as TFDS keeps it" if data is content else "as PNG"] += 1
    facts = {"counts": dict(counts), "written": dict(formats), "without a label, left out": unlabelled}
    told = {"citation": builder.info.citation, "homepage": builder.info.homepage, "note": KNOWN.get(builder.name, "")}
    write_json(args.out / MARKER, {"settings": wanted, "complete": True} | facts | told)
    print(f"{args.out}: {', '.join(f'{n:,} {part}' for part, n in counts.items())} images in {len(classes)} classes.")
    print(
        f"Written: {', '.join(f'{n:,} {how}' for how, n in formats.items())}; {unlabelled:,} without a label left out."
    )
    if told["note"]:
        print(told["note"])


def held_out(builder: Any, image_key: str, label: str, classes: list[str], args: argparse.Namespace) -> dict[str, str]:
    """The side of each image's content; written down in the folder as well."""
    contents: dict[str, list[str]] = {name: [] for name in classes}
    with tqdm(examples(builder, "train", image_key, label), desc="hashing", unit="image") as bar:
        for content, y in bar:
            if y >= 0:
                contents[classes[y]].append(hashlib.sha256(content).hexdigest())
    contents = {name: hashes for name, hashes in contents.items() if hashes}
    total = sum(map(len, contents.values()))
    number = HELD_OUT.get(builder.name, total // 5) if args.valid is None else args.valid
    if not 0 < number < total:
        raise UserError(f"--valid {number}: can't be held out of {total:,} images.")
    rule = Rule(number / total, args.seed)
    return split_by_content(contents, rule=rule, manifest=args.out / SPLIT, given=True)


def main(argv: Sequence[str]) -> None:
    p = Parser(prog="prepare_data.py", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("name", help="as TFDS calls it: cats_vs_dogs, oxford_iiit_pet, imagenette/320px, ...")
    p.add_argument("--out", type=Path, required=True, help="a new folder, or one that this command began")
    p.add_argument("--valid", type=int, help="images to hold out, where the data set has one split")
    p.add_argument("--label", help="which label, where there are several")
    p.add_argument("--splits", nargs="+", help="TFDS splits to use (default: all of train, validation and test)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--data_dir", help="where TFDS keeps its files")
    try:
        prepare(p.parse_args(argv))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped by the keyboard; the same command goes on.") from None


if __name__ == "__main__":
    sys.exit(run_command(main))
