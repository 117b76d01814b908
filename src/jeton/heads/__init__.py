"""What stands behind an encoder: pooling and classifiers over its tokens. One file per system, named by its id.

Poolings take `Tokens`, so that special tokens stay out, padding counts nothing and merged tokens count for what they stand for.
"""

from __future__ import annotations

from .ggem import GGeM
from .glsim import GLSimClassifier

__all__ = ["GGeM", "GLSimClassifier"]
