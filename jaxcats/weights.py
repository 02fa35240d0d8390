"""`python -m jaxcats.weights list|fetch|check|convert`: pretrained weights, ahead of the run that needs them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxcats.common.cli import Parser, run_command
from jaxcats.common.errors import UserError, nearest, unwritable

ACTIONS = {
    "list": "list the weights that have a name, and say which of them are on this machine",
    "fetch": "download weights now, for a machine that will be offline",
    "check": "check that a file is the published one and fits its network",
    "convert": "write the tensors of a .pth file as .safetensors, which any program can read safely",
}
HASH_ORIGIN = {"published": "that of the published file", "hub": "that of the hub", None: "its hash is not known here"}


def main(argv: Sequence[str]) -> None:
    """The command."""
    if not argv or argv[0] in ("-h", "--help"):
        actions = "\n".join(f"  {action:8} {text}" for action, text in ACTIONS.items())
        print(f"usage: python -m jaxcats.weights ACTION ...\n\nList, download, check and convert weights.\n\n{actions}")
        return
    action, *rest = argv
    if action not in ACTIONS:
        raise UserError(
            f"there is no action '{action}'.{nearest(action, list(ACTIONS))} Actions: {', '.join(ACTIONS)}."
        )
    parser = Parser(prog=f"python -m jaxcats.weights {action}", description=ACTIONS[action].capitalize() + ".")
    {"list": _list, "fetch": _fetch, "check": _check, "convert": _convert}[action](parser, rest)


# The actions import models/ when they run: it loads JAX, which --help and a slip in the options do without.


def _list(parser: Parser, argv: Sequence[str]) -> None:
    parser.parse_args(argv)
    from jaxcats.models import pretrained, registry

    rows = [("name", "parameters", "size", "top-1", "at", "licence", "here", "source")]
    for name, backbone in sorted(registry.named_weights().items(), key=lambda pair: (len(pair[1]), pair[1])):
        count = registry.get(backbone).parameters
        parameters, size = (f"{count / 1e6:.1f} M", f"{4 * count / 1e6:.0f} MB") if count else ("?", "?")
        source = next(s for s in registry.get(backbone).sources if s.name == name)
        top1 = f"{source.top1:.2f} %" if source.top1 else "?"
        try:
            pretrained.locate(source.location, download=False)
            here = "yes"
        except UserError:
            here = "no"
        facts = (parameters, size, top1, f"{source.preprocess.size} px", source.licence or "?", here)
        rows.append((name, *facts, source.location))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\ntop-1: on ImageNet's validation images at that size, as published. A backbone's first row is its default.")
    print("Use one: --model.backbone resnet50 --model.weights resnet50.a1_in1k. Download: jaxcats weights fetch NAME")


def _fetch(parser: Parser, argv: Sequence[str]) -> None:
    parser.add_argument("what", nargs="+", help="a name that list gives, a backbone's name, or hf:OWNER/REPO/FILE")
    options = parser.parse_args(argv)
    from jaxcats.models import pretrained, registry

    for name in options.what:
        backbone, location = _resolve(name)
        file = pretrained.find(registry.get(backbone).sources if backbone else (), location, backbone=backbone)
        size = f"{file.path.stat().st_size / 1e6:.1f} MB"
        print(f"{name}: {file.path} ({size}, sha256 {file.sha256}, {HASH_ORIGIN[file.verified_by]})")
    print("Offline runs use this file. For another machine, copy it and give the copy: --model.weights FILE")


def _check(parser: Parser, argv: Sequence[str]) -> None:
    parser.add_argument("what", help="a name that list gives, or a file")
    parser.add_argument("--backbone", help="the network that the file should fit (not needed with a known name)")
    options = parser.parse_args(argv)
    import numpy as np

    from jaxcats import models
    from jaxcats.models import pretrained, registry

    backbone, location = _resolve(options.what)
    pretrained.locate(location, download=False)
    backbone = options.backbone or backbone
    if not backbone:
        raise UserError(f"--backbone: is required for a file; one of {', '.join(registry.names())}.")
    file = pretrained.find(registry.get(backbone).sources, location, backbone=backbone)
    tensors = pretrained.read_tensors(file.path)
    # A file with a classifier, or a part of one, is compared with the published network with as many classes.
    prefix = registry.get(backbone).classifier
    classifier = tensors.get(f"{prefix}.weight", tensors.get(f"{prefix}.bias"))
    classes = 0 if classifier is None else max(1, *classifier.shape[:1])
    model = models.create(backbone, classes or 2, head="classifier" if classes else "linear")
    arrays = models.to_state_dict(model, *models.load_pretrained(model, file))
    if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise UserError(f"{file.path}: has values that are not finite numbers, in {', '.join(bad[:5])}; fetch it again")
    head = f"a classifier of {classes:,} classes" if classes else "no classifier"
    facts = f"{len(tensors)} tensors, {head}; sha256 {file.sha256}, {HASH_ORIGIN[file.verified_by]}"
    print(f"{file.path}: fits {backbone}; {facts}")


def _convert(parser: Parser, argv: Sequence[str]) -> None:
    parser.add_argument("source", help=".pth, .pt or .npz file")
    parser.add_argument("target", help=".safetensors file to write; never overwritten")
    options = parser.parse_args(argv)
    import numpy as np
    from safetensors.numpy import save

    from jaxcats.common import io
    from jaxcats.models import hub, pretrained

    source, target = pretrained.locate(options.source), Path(os.path.expanduser(options.target))
    if target.suffix.lower() != ".safetensors" or target.exists():
        raise UserError(f"{target}: expected the name of a new file that ends in .safetensors")
    tensors = {name: np.asarray(array, order="C") for name, array in pretrained.read_tensors(source).items()}
    try:
        if "__metadata__" in tensors:
            raise ValueError("the name '__metadata__' is reserved")
        io.write_bytes(target, save(tensors, metadata={"format": "pt"}))
    except OSError as error:
        raise unwritable(str(target), error) from None
    except Exception as error:  # safetensors does not know all of NumPy's dtypes
        raise UserError(f"{source}: a .safetensors file can't hold its tensors ({hub.reason(error)})") from None
    print(f"Written: {target} ({len(tensors)} tensors, {target.stat().st_size / 1e6:.1f} MB)")


def _resolve(name: str) -> tuple[str, str]:
    """(backbone, location) of named weights or of a backbone's default weights; ("", name) for any other location."""
    from jaxcats.models import pretrained, registry

    named = registry.named_weights()
    backbone = named.get(name, name)
    if backbone in registry.names() and (sources := registry.get(backbone).sources):
        return backbone, next((s for s in sources if s.name == name), sources[0]).location
    is_file = Path(name).suffix.lower() in pretrained.EXTENSIONS or Path(name).expanduser().exists()
    if name.startswith(("hf:", "package:")) or is_file:
        return "", name
    expected = "a name that `jaxcats weights list` gives, hf:OWNER/REPO/FILE, or a file"
    raise UserError(f"{name}: not known.{nearest(name, [*named, *registry.names()])} Expected {expected}")


if __name__ == "__main__":
    sys.exit(run_command(main))
