"""Writes a dataset of TensorFlow Datasets (TFDS) as a folder of images that jaxcats can train on:

    python scripts/prepare_data.py cats_vs_dogs --out data/cats_vs_dogs

The folder has train/ and valid/ (and test/ if the dataset has three splits) with a folder per class. The split
"validation", or "test" if there is none, becomes valid/. If the dataset has one split, validation images are held out of
it, in proportion to the classes, by content and --seed: 2,000 of cats_vs_dogs and a fifth of other datasets. A command
that was stopped can be given again; it continues and ends with the same folder. JPEG and PNG images are written byte for
byte as TFDS stores them.
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
# Notes about single datasets, from their TFDS pages.
KNOWN = {
    "cats_vs_dogs": "TFDS leaves out 1,738 corrupt images of the original and encodes the others again as JPEG, so their pixels differ a little from the original."
}
ENDINGS = {"JPEG": ".jpg", "PNG": ".png"}


def open_data(name: str, data_dir: str | None) -> Any:
    """The TFDS builder of a dataset, which is downloaded and prepared if it was not before."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        close = nearest(name.partition("/")[0], tfds.list_builders())
        raise UserError(f"{name}: TFDS has no such dataset.{close}") from None
    except (ValueError, TypeError, AssertionError) as error:  # an unknown configuration or version, or a malformed name
        raise UserError(f"{name}: TFDS can't open it ({first_line(error)}).") from None
    try:
        builder.download_and_prepare()
    except (OSError, tfds.download.DownloadError, AssertionError, ImportError) as error:
        raise UserError(f"{name}: TFDS can't prepare it ({first_line(error)}).") from None
    return builder


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def folders(builder: Any, given: Sequence[str] | None) -> dict[str, str]:
    """The folder for each TFDS split in use, in the order of writing."""
    known = [split for split in USED if split in builder.info.splits]
    if "train" not in known:
        raise UserError(f"{builder.name}: the dataset has no split train, only {', '.join(builder.info.splits)}.")
    for split in given or known:
        if split not in known:
            raise UserError(f"--splits: '{split}' is not one of {', '.join(known)}.{nearest(split, known)}")
    parts = [split for split in known if split in (given or known)]
    if "train" not in parts:
        raise UserError(f"--splits {' '.join(parts)}: train must be among them.")
    names = {"train": "train", "validation": "valid", "test": "test" if "validation" in parts else "valid"}
    return {split: names[split] for split in parts}


def keys(builder: Any, label: str | None) -> tuple[str, str, list[str]]:
    """The keys of image and label in each example, and the names of the classes."""
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
            f"{builder.name}: is no dataset for an image classifier: it has the images {images} and the labels {labels}; choose a label with --label."
        )
    return images[0], label, [n.replace("/", "_") for n in features[label].names]


def examples(builder: Any, split: str, image_key: str, label: str) -> Iterator[tuple[bytes, int]]:
    """Yields (content, label) in the order of TFDS, which never changes; the label is -1 where there is none."""
    import tensorflow_datasets as tfds

    # The order of the files. No cache: everything is read once, and TensorFlow warns about a cache that is not filled.
    read = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    decoders = tfds.decode.PartialDecoding(
        {image_key: True, label: True}, decoders={image_key: tfds.decode.SkipDecoding()}
    )
    data = builder.as_dataset(split=split, decoders=decoders, read_config=read, shuffle_files=False)
    for example in data.as_numpy_iterator():
        yield example[image_key], int(example[label])


def as_file(content: bytes) -> tuple[bytes, str]:
    """The bytes to write for an image and the ending of its file name; other formats than JPEG and PNG become PNG."""
    with Image.open(io.BytesIO(content)) as image:
        if image.format in ENDINGS:
            return content, ENDINGS[image.format]
        out = io.BytesIO()
        image.save(out, "PNG")
        return out.getvalue(), ".png"


def begin(out: Path, wanted: dict[str, Any]) -> bool:
    """Starts or continues a folder; returns whether it is complete.

    A folder without images can start over with other settings, because some settings turn out to be impossible only when
    all images have been counted.

    Raises:
        UserError: the folder holds other files, or images with other settings.
    """
    marker = out / MARKER
    inside = list(out.iterdir()) if out.is_dir() else [out] if out.exists() else []
    if all(
        path.match(f".{MARKER}.*.tmp") for path in inside
    ):  # empty, or a process was killed while it wrote the marker
        write_json(marker, {"settings": wanted, "complete": False})
    try:
        facts = json.loads(marker.read_text(encoding="utf-8"))
        settings, complete = facts["settings"], facts["complete"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out}: holds other files; give a new or an empty folder.") from None
    temporary = list(out.rglob(".*.tmp"))
    if settings != wanted:
        if complete or {path for path in inside if path not in temporary} - {marker, out / SPLIT}:
            raise UserError(f"{out}: was begun with {settings}, not {wanted}; give another folder.")
        # This goes before the marker, because a split.json must never be beside settings that did not make it.
        (out / SPLIT).unlink(missing_ok=True)
        write_json(marker, {"settings": wanted, "complete": False})
    for path in temporary:
        path.unlink()
    return complete


def prepare(args: argparse.Namespace) -> None:
    if args.valid is not None and args.valid < 1:
        raise UserError(f"--valid {args.valid}: at least one image must be held out.")
    builder = open_data(args.name, args.data_dir)
    image_key, label, classes = keys(builder, args.label)
    names = folders(builder, args.splits)
    wanted = {"name": builder.info.full_name, "label": label, "splits": list(names)}
    wanted |= {"valid": args.valid, "seed": args.seed}
    if begin(args.out, wanted):
        print(f"{args.out}: complete already.")
        return
    assignments: dict[str, str] = {}
    if "valid" not in names.values():
        assignments = hold_out(builder, image_key, label, classes, args)
    counts, formats, unlabelled = collections.Counter(), collections.Counter(), 0
    for tfds_name, name in names.items():
        # The bar is closed after an error too, so that the message starts on a new line.
        with tqdm(examples(builder, tfds_name, image_key, label), desc=tfds_name, unit="image") as bar:
            for number, (content, y) in enumerate(bar):
                if y < 0:
                    unlabelled += 1
                    continue
                data, ending = as_file(content)
                part = assignments.get(hashlib.sha256(content).hexdigest(), name)
                path = args.out / part / classes[y] / f"{classes[y]}.{number:06d}{ending}"
                if not path.exists():  # files are written atomically, so an existing one is complete
                    write_bytes(path, data)
                counts[part] += 1
                formats["as TFDS keeps it" if data is content else "as PNG"] += 1
    facts = {"counts": dict(counts), "written": dict(formats), "without a label, left out": unlabelled}
    notes = {"citation": builder.info.citation, "homepage": builder.info.homepage, "note": KNOWN.get(builder.name, "")}
    write_json(args.out / MARKER, {"settings": wanted, "complete": True} | facts | notes)
    print(f"{args.out}: {', '.join(f'{n:,} {part}' for part, n in counts.items())} images in {len(classes)} classes.")
    print(
        f"Written: {', '.join(f'{n:,} {form}' for form, n in formats.items())}; {unlabelled:,} without a label left out."
    )
    if notes["note"]:
        print(notes["note"])


def hold_out(builder: Any, image_key: str, label: str, classes: list[str], args: argparse.Namespace) -> dict[str, str]:
    """Holds out validation images; returns the split of each image by content hash, which is also in split.json."""
    contents: dict[str, list[str]] = {name: [] for name in classes}
    with tqdm(examples(builder, "train", image_key, label), desc="hashing", unit="image") as bar:
        for content, y in bar:
            if y >= 0:
                contents[classes[y]].append(hashlib.sha256(content).hexdigest())
    contents = {name: hashes for name, hashes in contents.items() if hashes}
    total = sum(map(len, contents.values()))
    number = HELD_OUT.get(builder.name, total // 5) if args.valid is None else args.valid
    if not 0 < number < total:
        raise UserError(f"--valid {number}: cannot be held out of {total:,} images.")
    rule = Rule(number / total, args.seed)
    return split_by_content(contents, rule=rule, manifest=args.out / SPLIT, given=True)


def main(argv: Sequence[str]) -> None:
    p = Parser(prog="prepare_data.py", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("name", help="the name in TFDS: cats_vs_dogs, oxford_iiit_pet, imagenette/320px, ...")
    p.add_argument("--out", type=Path, required=True, help="a new folder, or one that this command began")
    p.add_argument("--valid", type=int, help="number of images to hold out, if the dataset has one split")
    p.add_argument("--label", help="the key of the label, if the dataset has several")
    p.add_argument("--splits", nargs="+", help="TFDS splits to use (default: all of train, validation and test)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--data_dir", help="the folder where TFDS keeps its files")
    try:
        prepare(p.parse_args(argv))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped by the keyboard; give the same command again to continue.") from None


if __name__ == "__main__":
    sys.exit(run_command(main))
