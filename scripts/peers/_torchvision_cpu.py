"""Import this before torchvision (or fastai, timm) when torch is a CPU build.

The torchvision wheel's native library links to CUDA, so beside a CPU-only torch it does not load, and
`import torchvision` dies with "operator torchvision::nms does not exist". The Python half (models, transforms) needs
none of those operators, so declare their names and import again. Where torchvision loads by itself (a CUDA machine,
or a torchvision built for CPU), this does nothing.
"""

import importlib.util
import pathlib
import re
import sys

import torch

try:
    import torchvision
except (RuntimeError, ImportError):
    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]
    source = (
        pathlib.Path(importlib.util.find_spec("torchvision").origin).with_name("_meta_registrations.py").read_text()
    )
    ops = set(re.findall(r'register_(?:fake|meta)\("(?:torchvision::)?(\w+)"\)', source))
    _lib = torch.library.Library("torchvision", "FRAGMENT")  # must stay referenced
    for op in sorted(ops):
        _lib.define(f"{op}(Tensor a) -> Tensor")
    import torchvision  # noqa: F401  (others take it from here)
