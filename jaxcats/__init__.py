"""Image classifiers by transfer learning, in JAX: a folder of images in, an honestly measured classifier out."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxcats import models
    from jaxcats.common.cli import main
    from jaxcats.common.config import Config, Phase
    from jaxcats.common.errors import RunError, UserError
    from jaxcats.common.stats import sentence
    from jaxcats.core.state import TrainState
    from jaxcats.core.step import make_eval_step, make_train_step
    from jaxcats.data.images import Preprocess, evaluation_pixels
    from jaxcats.export.classifier import load
    from jaxcats.learner.data import ImageClassifierData
    from jaxcats.learner.learner import Learner
    from jaxcats.train.__main__ import train_main

__version__ = "0.1.0"

# Name -> its module, loaded at first use, so that `import jaxcats` costs nothing.
_PUBLIC = {
    "Config": "jaxcats.common.config",
    "ImageClassifierData": "jaxcats.learner.data",
    "Learner": "jaxcats.learner.learner",
    "Phase": "jaxcats.common.config",
    "Preprocess": "jaxcats.data.images",
    "RunError": "jaxcats.common.errors",
    "TrainState": "jaxcats.core.state",
    "UserError": "jaxcats.common.errors",
    "evaluation_pixels": "jaxcats.data.images",
    "load": "jaxcats.export.classifier",
    "main": "jaxcats.common.cli",
    "make_eval_step": "jaxcats.core.step",
    "make_train_step": "jaxcats.core.step",
    "models": "jaxcats.models",
    "sentence": "jaxcats.common.stats",
    "train_main": "jaxcats.train.__main__",
}
__all__ = [
    "Config",
    "ImageClassifierData",
    "Learner",
    "Phase",
    "Preprocess",
    "RunError",
    "TrainState",
    "UserError",
    "__version__",
    "evaluation_pixels",
    "load",
    "main",
    "make_eval_step",
    "make_train_step",
    "models",
    "sentence",
    "train_main",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jaxcats' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if _PUBLIC[name] == f"jaxcats.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return list(__all__)
