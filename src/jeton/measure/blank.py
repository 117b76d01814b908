"""Models without weights: the real class on PyTorch's meta device, from its configuration alone. Nothing else is downloaded.

A model is named by a path or id (its configuration is read), by its class, such as "LlavaForConditionalGeneration", by its type,
such as "qwen2_5_vl", or by a timm model, such as "timm/vit_base_patch16_224".
"""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..method import Unsupported
from ..models import Registry

# the head that a model of some type is used with, if its configuration does not say
_HEADS = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_MAPPING")


def blank(model: str | Path | nn.Module) -> nn.Module:
    """An instance of a model without its weights; a model at hand is itself."""
    if isinstance(model, nn.Module):
        return model
    name = str(model)
    if name in _known():
        return _by_class(name)
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"))
    if name in transformers.CONFIG_MAPPING:
        return _by_class(_of_type(transformers.CONFIG_MAPPING[name]).__name__)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is no class or type of model that jeton or transformers knows, and no configuration was found there "
            f"({str(error).splitlines()[0]}); give a folder with a config.json, a model's id, a class such as "
            f"LlavaForConditionalGeneration or a type such as qwen2_5_vl."
        ) from error
    return _by_config(config)


def _known() -> set[str]:
    """Classes with an adapter, and those of transformers."""
    models = {name for name in dir(transformers) if name[0].isupper() and ("For" in name or name.endswith("Model"))}
    models = {name for name in models if not name.startswith(("Auto", "PreTrained", "Generation"))}
    return {*Registry.encoders, *Registry.models, *models}


def _by_class(name: str) -> nn.Module:
    """An instance of a class as its default configuration has it, with what its adapter says such an instance needs."""
    view = Registry.models.get(name) or Registry.encoders.get(name)
    example = {} if view is None else dict(view.example)
    cls = _class(name)
    config = getattr(cls, "config_class", None)
    if config is not None:
        try:
            return _made(cls, config(**example))
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"the default configuration of {name} makes no model ({error}); give its view an `example`."
            ) from error
    if view is None:
        raise ValueError(f"transformers.{name} is no class of model that is made of a configuration.")
    made: nn.Module = cls(**example, device="meta")  # timm's take their settings themselves
    return made.eval()


def _class(name: str) -> Any:
    """A class by its name: of transformers, of jeton's bridges, of timm, or deeper inside transformers."""
    for room in ("transformers", "jeton.bridge"):
        found = getattr(importlib.import_module(room), name, None)
        if found is not None:
            return found
    view = Registry.models.get(name) or Registry.encoders.get(name)
    assert view is not None
    if view.home is None:
        raise ValueError(f"{name} is not in transformers {transformers.__version__}.")
    try:
        return getattr(importlib.import_module(view.home), name)
    except (ImportError, AttributeError) as missing:
        raise ValueError(f"{name} lives in {view.home}, which is not installed here ({missing}).") from missing


def _by_config(config: Any) -> nn.Module:
    for name in getattr(config, "architectures", None) or []:
        if hasattr(transformers, name) or name in Registry.models or name in Registry.encoders:
            return _made(_class(name), config)
    return _made(_of_type(type(config)), config)


def _of_type(config: type) -> Any:
    """The class that a type of model is used with."""
    importlib.import_module("jeton.bridge")  # known to the Auto classes from then on
    for mapping in _HEADS:
        table = getattr(transformers, mapping)
        if config in table:
            cls = table[config]
            return cls[0] if isinstance(cls, tuple) else cls
    raise Unsupported(f"{config.__name__} makes no model that transformers' Auto classes know.")


def _timm(name: str) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as missing:
        raise ValueError(f"timm/{name} is timm's: pip install 'jeton[timm]' ({missing}).") from missing
    made: nn.Module = timm.create_model(name, pretrained=False, device="meta")
    return made


def _made(cls: Any, config: Any) -> nn.Module:
    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with torch.device("meta"):
            made: nn.Module = cls(config)
    finally:
        quiet.setLevel(level)
    return made.eval()


@lru_cache(maxsize=64)
def of_class(name: str) -> nn.Module:
    """The blank model of a class with an adapter, made once."""
    return _by_class(name)
