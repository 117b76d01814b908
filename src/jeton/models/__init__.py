"""What jeton knows of each model family. One small file per family; `adapt` finds the view for a model."""

import importlib
import pkgutil

from .base import Encoder, Parts, VisionLanguage
from .clip_text import ClipText
from .registry import Registry, adapt, adapter

for _module in pkgutil.iter_modules(__path__):  # every family registers itself by being imported
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["ClipText", "Encoder", "Parts", "Registry", "VisionLanguage", "adapt", "adapter"]
