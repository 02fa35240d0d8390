"""Image classifiers by transfer learning, in JAX: a folder of pictures in, an honestly measured classifier out."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxcats import models
    from jaxcats.config import Config, Phase
    from jaxcats.core.state import TrainState
    from jaxcats.core.step import make_eval_step, make_train_step
    from jaxcats.data.preprocess import Preprocess, evaluation_pixels
    from jaxcats.errors import RunError, UserError
    from jaxcats.learner import Learner
    from jaxcats.learner_data import ImageClassifierData
    from jaxcats.predictor import load
    from jaxcats.results.metrics import sentence

__version__ = "0.1.0"

# Loaded at first use, so that `import jaxcats` costs nothing.
_PUBLIC = {
    "models": "jaxcats.models",
    "Config": "jaxcats.config",
    "Phase": "jaxcats.config",
    "make_train_step": "jaxcats.core.step",
    "make_eval_step": "jaxcats.core.step",
    "TrainState": "jaxcats.core.state",
    "Preprocess": "jaxcats.data.preprocess",
    "evaluation_pixels": "jaxcats.data.preprocess",
    "Learner": "jaxcats.learner",
    "ImageClassifierData": "jaxcats.learner_data",
    "sentence": "jaxcats.results.metrics",
    "load": "jaxcats.predictor",
    "RunError": "jaxcats.errors",
    "UserError": "jaxcats.errors",
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
