"""`python -m jaxcats.doctor FOLDER`: what is wrong with a folder of images, and what to do; no file is changed."""

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxcats.common.cli import Parser, command_line, run_command
from jaxcats.common.errors import UserError, one_line, unwritable

DESCRIPTION = (
    "Examines a folder of images. Exit code 0: nothing grave; 1: bad files, leaks, label conflicts, too few "
    "images or classes, or a folder that training refuses."
)
SHOWN = 5  # items of a finding, and files of an item
COPIES = (
    "leak",
    "label conflict",
    "look alike in two splits",
    "look alike",
    "the same twice",
    "copy that training does not see",
)
# How the outputs begin, which may be replaced.
JSON_START = re.compile(rb'\{\s*"folder": "(?:[^"\\]|\\.)*",\s*"images": \d+,\s*"seconds": ')
HTML_START = re.compile(rb"<!doctype html>\n.{,300}<title>[^<]*: what a look at it found</title>", re.DOTALL)
# Of features of EfficientNet-Lite0; see README for what it finds.
COSINE = 0.95
# kind: (grave, what it means and what to do), the gravest first
KINDS = {
    "unreadable": (True, "They can't be decoded and are skipped. Mend, shrink or remove them."),
    "leak": (True, "The same file in two splits, or in one and a folder to test on: the result flatters. Remove one of the two."),
    "label conflict": (True, "The same file under two classes: one label is wrong. Keep the right one."),
    "not laid out for training": (True, "With labels from folders, as by default, training refuses the folder in these words."),
    "class named like a split": (True, "Taken for a class. If it is a split, call it train, valid or test, in small letters."),
    "one class spelt in two ways": (True, "Training takes them for two classes. Give both folders one name."),
    "class without images": (True, "Add images, or remove the class everywhere."),
    "one class only": (True, "A classifier needs two at least. Add another, or give the folder that the class folders are in."),
    "look alike in two splits": (True, "Perhaps the same scene: the result flatters. Look at both; keep them in one split."),
    "look alike": (False, "Look at both; they may be one image twice, or have two labels."),
    "the same twice": (False, "The same file twice counts twice. Remove one."),
    "copy that training does not see": (False, "The same file again where training does not look, so it does not count twice. If one goes, let it be that one."),
    "training does not see them": (False, "With labels from folders, as by default, it sees what lies in class folders alone. Move them, or leave them out."),
    "test folder left alone": (False, "Its class folders are not those of train, so its images are taken to have no labels. Mend its folders to have a test result."),
    "wrong extension": (False, "The content is of another format than the name says. jaxcats reads it; rename it for other programs."),
    "unusual image": (False, "They are used, after what is said of each. Look whether that is meant."),
    "turned by EXIF": (False, "jaxcats turns them upright; other programs may not."),
    "tiny": (False, "Under 32 pixels wide or high: little to learn from. Find larger ones."),
    "long and narrow": (False, "More than 5 times as long as wide: the centre crop loses most of it."),
    "little of the range used": (False, "More than 8 bits a pixel, of which little is left to see. Rescale the values before training."),
    "blank": (False, "One even colour: nothing to learn from. Remove them."),
    "unequal classes": (False, "Look at the recall of the small classes; the share of right answers hides it."),
    "image without an image's ending": (False, "Training does not see them. Rename them, with the ending that is said of each."),
    "no image": (False, "Training leaves them alone."),
    "left by an operating system": (False, "Training leaves them alone."),
    "hidden": (False, "Training leaves hidden names alone."),
}  # fmt: skip


def diagnose(root: Path, *, backbone: str | None = None, progress: bool = True) -> dict[str, Any]:
    """{"folder", "images", "seconds", "understood", "findings": [{"kind", "grave", "meaning", "items": [...]}]}.

    An item is {"paths", "detail"}; "understood" are the splits and classes that the images were taken for.

    Args:
        root: any folder.
        backbone: also compares the features that this pretrained network gives the images.
    """
    from jaxcats.data.labels import existing_folder
    from jaxcats.data.quality import examine_folder

    started, root = time.perf_counter(), existing_folder(root)
    features_of = feature_reader(root, backbone) if backbone else None
    n, understood, found = examine_folder(root, features_of=features_of, cosine=COSINE, progress=progress)
    findings = [
        {"kind": kind, "grave": grave, "meaning": meaning, "items": found[kind]}
        for kind, (grave, meaning) in KINDS.items()
        if found.get(kind)
    ]
    return {
        "folder": str(root),
        "pictures": n,
        "seconds": round(time.perf_counter() - started, 2),
        "understood": understood,
        "findings": findings,
    }


def feature_reader(root: Path, backbone: str) -> Callable[[Sequence[str], Sequence[str]], Any]:
    """From paths and content hashes to features [N, F] of a pretrained backbone, cached as training caches them."""
    import numpy as np

    from jaxcats import models
    from jaxcats.common.config import Config, ModelConfig
    from jaxcats.data.index import Split
    from jaxcats.train import experiment
    from jaxcats.train.features import backbone_features

    config = Config(model=ModelConfig(backbone=backbone))
    cache = experiment.enable_compile_cache(config)
    model, preprocess = experiment.create_model(config, 2)
    params, stats = models.load_pretrained(model)

    def features(paths: Sequence[str], hashes: Sequence[str]) -> Any:
        split = Split(root, tuple(paths), np.zeros(len(paths), np.int32), tuple(hashes))
        how = {"preprocess": preprocess, "batch_size": config.feature_batch, "workers": None}
        return backbone_features(model, split, params=params, batch_stats=stats, cache_dir=cache, **how).features

    return features


def lines(report: dict[str, Any], most: int = SHOWN) -> list[str]:
    """What is printed of a diagnosis."""
    rate = report["pictures"] / max(report["seconds"], 1e-3)
    said = [f"{report['images']:,} images examined in {report['seconds']:.1f} s ({rate:,.0f} a second)."]
    said.append(f"Understood as {one_line(report['understood'])}.")
    for f in report["findings"]:
        said.append(f"\n{'GRAVE: ' * f['grave']}{f['kind']}: {len(f['items']):,}. {f['meaning']}")
        joint = " = " if f["kind"] in COPIES else ", "
        said += [f"    {one_line(in_words(item, joint))}" for item in f["items"][:most]]
        said += [f"    and {len(f['items']) - most:,} more"] * (len(f["items"]) > most)
    return said if report["findings"] else [*said, "Nothing to report."]


def in_words(item: dict[str, Any], joint: str) -> str:
    """One item on one line."""
    paths = item["paths"]
    more = f" and {len(paths) - SHOWN:,} more" if len(paths) > SHOWN else ""
    return joint.join(paths[:SHOWN]) + more + (f": {item['detail']}" if item["detail"] else "")


def read_options(argv: Sequence[str]) -> Any:
    """The command's flags; UserError for an output that can't be written, or would replace a file of the user's."""
    parser = Parser(prog="python -m jaxcats.doctor", description=DESCRIPTION)
    folder = "any folder of images: with train/ and valid/, with class folders, or flat"
    page = "write a page with the images in question (without a name: doctor.html)"
    backbone = "also compare features of this pretrained network, for example efficientnet_lite0"
    parser.add_argument("folder", nargs="?", help=folder)  # which it is only for a better answer to --html FOLDER
    parser.add_argument("--json", metavar="FILE", help="write every finding here")
    parser.add_argument("--html", nargs="?", const="doctor.html", metavar="FILE", help=page)
    parser.add_argument("--backbone", help=backbone)
    options = parser.parse_args(argv)
    outputs = {"json": options.json, "html": options.html}
    if options.folder is None:
        for name, file in outputs.items():
            if file and os.path.isdir(file):
                way_out = f"give the folder first: {command_line('doctor')} {shlex.quote(file)} --{name}"
                raise UserError(f"--{name} {file}: is a folder, taken for the file to write; {way_out}")
        parser.error("the following arguments are required: folder")
    from jaxcats.data.files import check_targets
    from jaxcats.data.quality import starts_like_a_image

    check_targets(outputs, [options.folder])
    for name, file in outputs.items():
        if file and starts_like_a_image(file):
            raise UserError(f"--{name} {file}: is an image; name another file to write.")
        if file and not replaceable(file, JSON_START if name == "json" else HTML_START):
            raise UserError(f"--{name} {file}: is there, and not by doctor's --{name}; name another file to write.")
    return options


def replaceable(file: str, start: re.Pattern[bytes]) -> bool:
    """Whether a file is absent, empty, or begins as an earlier output."""
    try:
        with open(file, "rb") as opened:
            content = opened.read(2**16)  # a folder's name, escaped, is shorter
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return not content or bool(start.match(content))


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    options = read_options(argv)
    from jaxcats.common.io import write_json

    report = diagnose(Path(options.folder), backbone=options.backbone)
    print("\n".join(lines(report)))
    try:
        if file := options.json:
            write_json(Path(file), report)
        if file := options.html:
            from jaxcats.evaluate.pages import write_diagnosis

            write_diagnosis(Path(file), report)
    except OSError as e:
        raise unwritable(f"{file}:", e) from None
    written = [name for name in (options.json, options.html) if name]
    print(f"\nWritten: {', '.join(written)}" if written else "\n--json FILE or --html FILE lists everything.")
    return int(any(f["grave"] for f in report["findings"]))


if __name__ == "__main__":
    sys.exit(run_command(main))
