"""`python -m jaxcats.doctor FOLDER`: what is wrong with a folder of pictures, and what to do; no file is changed."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxcats.command import Parser, one_line, run_command

DESCRIPTION = (
    "Examines a folder of pictures. Exit code 0: nothing grave; 1: bad files, leaks, label conflicts or empty classes."
)
SHOWN = 5
# Of features of EfficientNet-Lite0; see README for what it finds.
COSINE = 0.95
# kind: (grave, what it means and what to do), the gravest first
KINDS = {
    "unreadable": (True, "They can't be decoded and are skipped. Mend or remove them."),
    "leak": (True, "The same file in two splits: the result flatters. Remove one of the two."),
    "label conflict": (True, "The same file under two classes: one label is wrong. Keep the right one."),
    "class without pictures": (True, "Add pictures, or remove the class everywhere."),
    "look alike in two splits": (True, "Perhaps the same scene: the result flatters. Look at both; keep them in one split."),
    "look alike": (False, "Look at both; they may be one picture twice, or have two labels."),
    "the same twice": (False, "The same file twice counts twice. Remove one."),
    "wrong extension": (False, "The content is of another format than the name says. jaxcats reads it; rename it for other programs."),
    "unusual picture": (False, "They are used, after what is said of each. Look whether that is meant."),
    "turned by EXIF": (False, "jaxcats turns them upright; other programs may not."),
    "tiny": (False, "Under 32 pixels wide or high: little to learn from. Find larger ones."),
    "long and narrow": (False, "More than 5 times as long as wide: the centre crop loses most of it."),
    "blank": (False, "One even colour: nothing to learn from. Remove them."),
    "unequal classes": (False, "Look at the recall of the small classes; the share of right answers hides it."),
    "no picture": (False, "Training leaves them alone."),
    "left by an operating system": (False, "Training leaves them alone."),
    "hidden": (False, "Training leaves hidden names alone."),
}  # fmt: skip


def diagnose(root: Path, *, backbone: str | None = None, progress: bool = True) -> dict[str, Any]:
    """{"folder", "pictures", "seconds", "findings": [{"kind", "grave", "meaning", "items": [{"paths", "detail"}]}]}.

    Args:
        root: any folder.
        backbone: also compares the features that this pretrained network gives the pictures.
    """
    from jaxcats.data.examine import examine_folder
    from jaxcats.data.layout import existing_folder

    started, root = time.perf_counter(), existing_folder(root)
    features_of = feature_reader(root, backbone) if backbone else None
    n, found = examine_folder(root, features_of=features_of, cosine=COSINE, progress=progress)
    findings = [
        {"kind": kind, "grave": grave, "meaning": meaning, "items": found[kind]}
        for kind, (grave, meaning) in KINDS.items()
        if found.get(kind)
    ]
    return {
        "folder": str(root),
        "pictures": n,
        "seconds": round(time.perf_counter() - started, 2),
        "findings": findings,
    }


def feature_reader(root: Path, backbone: str) -> Callable[[Sequence[str], Sequence[str]], Any]:
    """From paths and content hashes to features [N, F] of a pretrained backbone, cached as training caches them."""
    import numpy as np

    from jaxcats import job, models
    from jaxcats.config import Config, ModelConfig
    from jaxcats.data.index import Split
    from jaxcats.inputs import backbone_features

    config = Config(model=ModelConfig(backbone=backbone))
    cache = job.start_jax(config)
    model, preprocess = job.create_model(config, 2)
    params, stats = models.load_pretrained(model)

    def features(paths: Sequence[str], hashes: Sequence[str]) -> Any:
        split = Split(root, tuple(paths), np.zeros(len(paths), np.int32), tuple(hashes))
        how = {"preprocess": preprocess, "batch_size": config.feature_batch, "workers": None}
        return backbone_features(model, split, params=params, batch_stats=stats, cache_dir=cache, **how).features

    return features


def lines(report: dict[str, Any], most: int = SHOWN) -> list[str]:
    """What is printed of a diagnosis."""
    rate = report["pictures"] / max(report["seconds"], 1e-3)
    said = [f"{report['pictures']:,} pictures examined in {report['seconds']:.1f} s ({rate:,.0f} a second)."]
    for f in report["findings"]:
        said.append(f"\n{'GRAVE: ' * f['grave']}{f['kind']}: {len(f['items']):,}. {f['meaning']}")
        said += [f"    {one_line(in_words(item))}" for item in f["items"][:most]]
        said += [f"    and {len(f['items']) - most:,} more"] * (len(f["items"]) > most)
    return said if report["findings"] else [*said, "Nothing to report."]


def in_words(item: dict[str, Any]) -> str:
    """One item on one line."""
    return " = ".join(item["paths"]) + (f": {item['detail']}" if item["detail"] else "")


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = Parser(prog="python -m jaxcats.doctor", description=DESCRIPTION)
    parser.add_argument("folder", help="any folder of pictures: with train/ and valid/, with class folders, or flat")
    parser.add_argument("--json", help="write every finding here")
    parser.add_argument(
        "--html",
        nargs="?",
        const="doctor.html",
        metavar="FILE",
        help="write a page with the pictures in question (without a name: doctor.html)",
    )
    parser.add_argument(
        "--backbone", help="also compare features of this pretrained network, for example efficientnet_lite0"
    )
    options = parser.parse_args(argv)
    from jaxcats.storage.atomic import write_json

    report = diagnose(Path(options.folder), backbone=options.backbone)
    print("\n".join(lines(report)))
    if options.json:
        write_json(Path(options.json), report)
    if options.html:
        from jaxcats.results.diagnosis import write_diagnosis

        write_diagnosis(Path(options.html), report)
    written = [name for name in (options.json, options.html) if name]
    print(f"\nWritten: {', '.join(written)}" if written else "\n--json FILE or --html FILE lists everything.")
    return int(any(f["grave"] for f in report["findings"]))


if __name__ == "__main__":
    sys.exit(run_command(main))
