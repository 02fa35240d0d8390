"""Image classifiers by transfer learning, in JAX: a folder of images in, an honestly measured classifier out."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxcats import models
    from jaxcats.common.config import Config, Phase
    from jaxcats.common.errors import RunError, UserError
    from jaxcats.common.stats import sentence
    from jaxcats.core.state import TrainState
    from jaxcats.core.step import make_eval_step, make_train_step
    from jaxcats.data.images import Preprocess, evaluation_pixels
    from jaxcats.export.classifier import load
    from jaxcats.learner.data import ImageClassifierData
    from jaxcats.learner.learner import Learner

__version__ = "0.1.0"

# Loaded at first use, so that `import jaxcats` costs nothing.
_PUBLIC = {
    "models": "jaxcats.models",
    "Config": "jaxcats.common.config",
    "Phase": "jaxcats.common.config",
    "make_train_step": "jaxcats.core.step",
    "make_eval_step": "jaxcats.core.step",
    "TrainState": "jaxcats.core.state",
    "Preprocess": "jaxcats.data.images",
    "evaluation_pixels": "jaxcats.data.images",
    "Learner": "jaxcats.learner.learner",
    "ImageClassifierData": "jaxcats.learner.data",
    "sentence": "jaxcats.common.stats",
    "load": "jaxcats.export.classifier",
    "RunError": "jaxcats.common.errors",
    "UserError": "jaxcats.common.errors",
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
    "make_eval_step",
    "make_train_step",
    "models",
    "sentence",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jaxcats' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if _PUBLIC[name] == f"jaxcats.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return list(__all__)
