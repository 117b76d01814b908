"""jeton: fewer tokens in multimodal transformers. Any method, on any model, in one line, with the truth about what it cost.

    import jeton

    with jeton.apply(model, "divprune", keep=64) as run:
        answer = model.generate(**inputs)
    print(run.report())

The names below are the whole face; they are imported when first used, so that ``import jeton`` itself is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jeton.demo import load_demo
    from jeton.engine import apply
    from jeton.measure.compare import compare
    from jeton.measure.support import supports
    from jeton.measure.tune import tune
    from jeton.method import Budget, Sequence, Unsupported, get, methods
    from jeton.models import ClipText
    from jeton.registry import systems
    from jeton.tokens import Reduction, Tokens

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "ClipText",
    "Reduction",
    "Sequence",
    "Tokens",
    "Unsupported",
    "__version__",
    "apply",
    "compare",
    "get",
    "load_demo",
    "methods",
    "supports",
    "systems",
    "tune",
]

_HOME = {
    "Budget": "jeton.method",
    "ClipText": "jeton.models",
    "Reduction": "jeton.tokens",
    "Sequence": "jeton.method",
    "Tokens": "jeton.tokens",
    "Unsupported": "jeton.method",
    "apply": "jeton.engine",
    "compare": "jeton.measure.compare",
    "get": "jeton.method",
    "load_demo": "jeton.demo",
    "methods": "jeton.method",
    "supports": "jeton.measure.support",
    "systems": "jeton.registry",
    "tune": "jeton.measure.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jeton' has no attribute {name!r}.")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
