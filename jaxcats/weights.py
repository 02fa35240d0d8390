"""`python -m jaxcats.weights list|fetch|check|convert`: pretrained weights, ahead of the run that needs them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcats.common.cli import Parser, run_command
from jaxcats.common.errors import UserError, nearest, unwritable

DESCRIPTION = "Pretrained weights: what is known, fetching them ahead, checking and converting files."
ACTIONS = {
    "list": "the weights known by name, and which of them are here",
    "fetch": "get weights now, for a machine that will be offline",
    "check": "whether a file is the published one and fits its network",
    "convert": "write a .pth file's tensors as .safetensors, which any program can read safely",
}


def main(argv: Sequence[str]) -> None:
    """The command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m jaxcats.weights ACTION ...\n\n{DESCRIPTION}\n")
        print("\n".join(f"  {name:8} {what}" for name, what in ACTIONS.items()))
        return
    action, *rest = argv
    if action not in ACTIONS:
        raise UserError(
            f"there is no action '{action}'.{nearest(action, list(ACTIONS))} Actions: {', '.join(ACTIONS)}."
        )
    parser = Parser(prog=f"python -m jaxcats.weights {action}", description=ACTIONS[action].capitalize() + ".")
    {"list": _list, "fetch": _fetch, "check": _check, "convert": _convert}[action](parser, rest)


def _list(parser: Parser, argv: Sequence[str]) -> None:
    parser.parse_args(argv)
    from jaxcats.models import pretrained, registry

    rows = [("name", "parameters", "size", "top-1", "at", "licence", "here", "source")]
    for name, backbone in sorted(registry.named_weights().items(), key=lambda pair: (len(pair[1]), pair[1])):
        record = registry.get(backbone)
        source = next(s for s in record.sources if s.name == name)
        path = pretrained.present(source.location, backbone=backbone)
        count, size = ("?", "?") if not (n := record.parameters) else (f"{n / 1e6:.1f} M", f"{4 * n / 1e6:.0f} MB")
        top1, at = f"{source.top1:.2f} %" if source.top1 else "?", f"{source.preprocess.size} px"
        rows.append((name, count, size, top1, at, source.licence or "?", "yes" if path else "no", source.location))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\ntop-1: of ImageNet's validation images, as published, at that size. A backbone's first row is its default."
    )
    print(
        "Use one: --model.backbone resnet50 --model.weights resnet50.a1_in1k; fetch it ahead: jaxcats weights fetch NAME"
    )


def _fetch(parser: Parser, argv: Sequence[str]) -> None:
    parser.add_argument("what", nargs="+", help="a name that list gives, a backbone's name, or hf:OWNER/REPO/FILE")
    for what in parser.parse_args(argv).what:
        backbone, source = _meant(what)
        from jaxcats.models import pretrained

        file = pretrained.find(source, what if not source else None, backbone=backbone)
        known = "" if _vouched(file, source) else "; its hash is not known here"
        print(f"{what}: {file.path} ({file.path.stat().st_size / 1e6:.1f} MB, sha256 {file.sha256}{known})")
    print("Offline, it is found there; elsewhere, copy the file and give it: --model.weights FILE")


def _check(parser: Parser, argv: Sequence[str]) -> None:
    parser.add_argument("what", help="a name that list gives, or a file")
    parser.add_argument("--backbone", help="the network it should fit (a name says so itself)")
    options = parser.parse_args(argv)
    import jax.numpy as jnp
    import numpy as np

    from jaxcats import models
    from jaxcats.models import pretrained, registry

    backbone, source = _meant(options.what, path=True)
    backbone = options.backbone or backbone
    location = source[0].location if source else options.what
    if location.startswith("hf:"):
        if not pretrained.present(location, backbone=backbone):
            raise UserError(f"{options.what}: is not here; get it with: jaxcats weights fetch {options.what}")
    elif not location.startswith("package:"):
        pretrained.local(location)
    if not backbone:
        raise UserError(f"--backbone: is required for a file; one of {', '.join(registry.names())}.")
    record = registry.get(backbone)
    file = pretrained.find(source or record.sources, None if source else options.what, backbone=backbone)
    tensors = pretrained.read_tensors(file.path)
    # With a classifier, in full or in part, all of it is held against the published network of so many classes.
    classifier = [tensors[name] for leaf in ("weight", "bias") if (name := f"{record.classifier}.{leaf}") in tensors]
    classes = max(1, *classifier[0].shape[:1]) if classifier else 0
    model = models.create(backbone, classes or 2, head="classifier" if classes else "linear")
    models.load_pretrained(model, file)
    floats = {name: array for name, array in tensors.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    bad = [name for name, array in floats.items() if not np.isfinite(array).all()]
    if bad:
        raise UserError(f"{file.path}: holds what is not a number, in {', '.join(bad[:5])}; fetch it again")
    head = f"a classifier of {classes:,} classes" if classes else "no classifier"
    how = _vouched(file, record.sources) or "its hash is not known here"
    print(f"{file.path}: fits {backbone}; {len(tensors)} tensors, {head}; sha256 {file.sha256}, {how}")


def _convert(parser: Parser, argv: Sequence[str]) -> None:
    parser.add_argument("source", help=".pth, .pt or .npz file")
    parser.add_argument("target", help=".safetensors file to write; never overwritten")
    options = parser.parse_args(argv)
    import numpy as np
    from safetensors.numpy import save

    from jaxcats.common import io
    from jaxcats.models import pretrained

    source, target = Path(options.source), Path(os.path.expanduser(options.target))
    if target.suffix.lower() != ".safetensors":
        raise UserError(f"{target}: expected a file that ends in .safetensors")
    if target.exists():
        raise UserError(f"{target}: exists already; give another name, or remove it first")
    path = pretrained.local(source)
    tensors = {name: np.asarray(array, order="C") for name, array in pretrained.read_tensors(path).items()}
    for name, array in tensors.items():
        if name == "__metadata__":
            raise UserError(f"{path}: '{name}' is a name that a .safetensors file keeps for itself")
        try:
            save({name: array[..., :0] if array.ndim else array})  # it knows its kinds of numbers
        except Exception:
            raise UserError(
                f"{path}: '{name}' is of a kind ({array.dtype}) that a .safetensors file can't hold"
            ) from None
    try:
        io.write_bytes(target, save(tensors, metadata={"format": "pt"}))
    except OSError as error:
        raise unwritable(str(target), error) from None
    print(f"Written: {target} ({len(tensors)} tensors, {target.stat().st_size / 1e6:.1f} MB)")


def _meant(what: str, *, path: bool = False) -> tuple[str, Sequence[Any]]:
    """(backbone, its one source) of a name; ("", ()) for hf:OWNER/REPO/FILE, and for a path where one may be given."""
    from jaxcats.models import registry

    named = registry.named_weights()
    if what in named:
        return named[what], [s for s in registry.get(named[what]).sources if s.name == what]
    if what in registry.names() and registry.get(what).sources:
        return what, registry.get(what).sources[:1]
    if what.startswith(("hf:", "package:")) or (path and _is_file(what)):
        return "", ()
    choices = [*named, *registry.names()]
    raise UserError(
        f"{what}: not known.{nearest(what, choices)} Expected a name that `jaxcats weights list` gives, or hf:OWNER/REPO/FILE"
        + (", or a file" if path else "")
    )


def _is_file(what: str) -> bool:
    from jaxcats.models import pretrained

    return Path(what).suffix.lower() in pretrained.EXTENSIONS or Path(os.path.expanduser(what)).exists()


def _vouched(file: Any, sources: Sequence[Any]) -> str:
    """Whose hash a weight file has; empty where nobody's is known."""
    from jaxcats.models import hub

    if file.sha256 in [source.sha256 for source in sources]:
        return "that of the published file"
    own = file.source.startswith("hf:") and hub.expected_sha256(file.path) == file.sha256
    return "the hub's own" if own else ""


if __name__ == "__main__":
    sys.exit(run_command(main))
