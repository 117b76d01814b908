"""Which view fits which model: families file theirs under the names of transformers' classes, and `adapt` finds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, TypeVar

from torch import nn

from ..method import Unsupported
from .base import Encoder, VisionLanguage


class Registry:
    """Views by the class name of the transformers model they fit; refused: why there can be none for a model, and what to do."""

    encoders: ClassVar[dict[str, type[Encoder]]] = {}
    models: ClassVar[dict[str, type[VisionLanguage]]] = {}
    refused: ClassVar[dict[str, str]] = {}


V = TypeVar("V", bound=type)


def adapter(*names: str) -> Callable[[V], V]:
    """Class decorator: this view fits the transformers classes of these names."""

    def file(view: V) -> V:
        shelf = Registry.models if issubclass(view, VisionLanguage) else Registry.encoders
        shelf.update(dict.fromkeys(names, view))
        return view

    return file


def adapt(model: nn.Module) -> Encoder | VisionLanguage:
    """The view that fits a model, or the encoder inside a model with a task head on top."""
    for candidate in _inside(model):
        name = type(candidate).__name__
        if name in Registry.models:
            return Registry.models[name](candidate)
        if name in Registry.encoders:
            return Registry.encoders[name](candidate)
        if name in Registry.refused:
            raise Unsupported(f"{name} {Registry.refused[name]}")
    known = ", ".join(sorted([*Registry.models, *Registry.encoders]))
    raise Unsupported(
        f"jeton has no adapter for {type(model).__name__}. It knows {known}; adding a family is one small file in jeton/models."
    )


def encoder_in(model: nn.Module) -> Encoder:
    """The view of an encoder inside a vision-language model, which may be any that jeton knows."""
    view = adapt(model)
    if isinstance(view, VisionLanguage):
        raise Unsupported(f"{view.name} is a vision-language model, not an encoder of another.")
    return view


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile, peft and parallel training wrap around it."""
    while True:
        if isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
            model = compiled
        elif hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _inside(model: nn.Module) -> Iterator[nn.Module]:
    model = unwrapped(model)
    yield model
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        yield base
    for name in ("vision_model", "vision_encoder"):
        vision = getattr(model, name, None)
        if isinstance(vision, nn.Module):
            yield vision
