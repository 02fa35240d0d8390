"""`python -m jaxcats.doctor FOLDER`: what is wrong with a folder of images, and what to do about it; no file is changed."""

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxcats.common.cli import Parser, run_command
from jaxcats.common.errors import UserError, one_line, unwritable

DESCRIPTION = (
    "Examines a folder of images. Exit code 0: nothing grave; 1: bad files, leaks, label conflicts, too few "
    "images or classes, or a folder that training refuses."
)
SHOWN = 5  # items of a finding that are printed
COSINE = 0.95  # of features of EfficientNet-Lite0, set so that no pair of different photos reaches it
# The beginnings of doctor's earlier outputs, which may be replaced.
JSON_START = re.compile(rb'\{\s*"folder": "(?:[^"\\]|\\.)*",\s*"pictures": \d+,\s*"seconds": ')
HTML_START = re.compile(rb"<!doctype html>\n.{,300}<title>[^<]*: what a look at it found</title>", re.DOTALL)


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
    except OSError as error:
        raise unwritable(f"{file}:", error) from None
    written = [name for name in (options.json, options.html) if name]
    print(f"\nWritten: {', '.join(written)}" if written else "\n--json FILE or --html FILE lists everything.")
    return int(any(finding["grave"] for finding in report["findings"]))


def read_options(argv: Sequence[str]) -> Any:
    """The command's flags.

    Raises:
        UserError: an output can't be written, or would replace a file that doctor did not write.
    """
    parser = Parser(prog="python -m jaxcats.doctor", description=DESCRIPTION)
    parser.add_argument("folder", help="any folder: with train/ and valid/, with class folders, or flat")
    parser.add_argument("--json", metavar="FILE", help="write every finding to this file")
    page = "write a page that shows the images (without a name: doctor.html)"
    parser.add_argument("--html", nargs="?", const="doctor.html", metavar="FILE", help=page)
    backbone = "also compare features of this pretrained network, for example efficientnet_lite0"
    parser.add_argument("--backbone", help=backbone)
    options = parser.parse_args(argv)
    targets = {"json": options.json, "html": options.html}
    from jaxcats.data.files import check_targets

    check_targets(targets, [options.folder])
    for name, file in targets.items():
        if file and not is_replaceable(file, JSON_START if name == "json" else HTML_START):
            raise UserError(f"--{name} {file}: doctor --{name} did not write this file; name another file to write.")
    return options


def is_replaceable(file: str, start: re.Pattern[bytes]) -> bool:
    """Whether a file is absent, empty, or begins as an earlier output."""
    try:
        with open(file, "rb") as opened:
            content = opened.read(2**16)  # a folder's name, escaped, is shorter
    except FileNotFoundError:
        return True
    return not content or bool(start.match(content))


def diagnose(root: Path, *, backbone: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Examines a folder.

    Args:
        root: any folder.
        backbone: a pretrained network, whose features of the images are compared too.

    Returns:
        {"folder", "pictures" (their number), "seconds", "understood" (the splits and classes assigned to the
        images), "findings": [{"kind", "grave", "meaning", "items": [{"paths", "detail"}]}]}.
    """
    from jaxcats.data.labels import existing_folder
    from jaxcats.data.quality import KINDS, examine_folder

    started, root = time.perf_counter(), existing_folder(root)
    features_of = feature_reader(root, backbone) if backbone else None
    n, understood, found = examine_folder(root, features_of=features_of, cosine=COSINE, progress=progress)
    findings = []
    for kind, of_kind in found.items():
        items = [{"paths": list(finding.paths), "detail": finding.detail} for finding in of_kind]
        grave, meaning = KINDS[kind]
        findings.append({"kind": kind, "grave": grave, "meaning": meaning, "items": items})
    seconds = round(time.perf_counter() - started, 2)
    return {"folder": str(root), "pictures": n, "seconds": seconds, "understood": understood, "findings": findings}


def lines(report: dict[str, Any]) -> list[str]:
    """The lines to print for a diagnosis."""
    from jaxcats.data.quality import Finding

    n, seconds = report["pictures"], report["seconds"]
    out = [f"{n:,} images examined in {seconds:.1f} s ({n / max(seconds, 1e-3):,.0f} a second)."]
    out.append(f"Understood as {one_line(report['understood'])}.")
    for group in report["findings"]:
        items = [Finding(group["kind"], **item) for item in group["items"]]
        grave = "GRAVE: " if group["grave"] else ""
        out.append(f"\n{grave}{group['kind']}: {len(items):,}. {group['meaning']}")
        out += [f"    {one_line(item.line())}" for item in items[:SHOWN]]
        if len(items) > SHOWN:
            out.append(f"    and {len(items) - SHOWN:,} more")
    return out if report["findings"] else [*out, "Nothing to report."]


def feature_reader(root: Path, backbone: str) -> Callable[[Sequence[str], Sequence[str]], Any]:
    """A function from paths and content hashes to features [N, F] of a pretrained backbone, cached as training does."""
    import numpy as np

    from jaxcats import models
    from jaxcats.common.config import Config, ModelConfig
    from jaxcats.data.index import Split
    from jaxcats.train import experiment
    from jaxcats.train.features import backbone_features

    config = Config(model=ModelConfig(backbone=backbone))
    cache_dir = experiment.enable_compile_cache(config)
    model, preprocess = experiment.create_model(config, 2)
    params, batch_stats = models.load_pretrained(model)

    weights: dict[str, Any] = {"params": params, "batch_stats": batch_stats, "preprocess": preprocess}
    reading: dict[str, Any] = {"batch_size": config.feature_batch, "workers": None, "cache_dir": cache_dir}

    def features(paths: Sequence[str], hashes: Sequence[str]) -> Any:
        split = Split(root, tuple(paths), np.zeros(len(paths), np.int32), tuple(hashes))
        return backbone_features(model, split, **weights, **reading).features

    return features


if __name__ == "__main__":
    sys.exit(run_command(main))
