"""What is measured: a model and its processor, loaded from a path or an id, given by the user, or embedded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from .. import bridge  # noqa: F401  its checkpoints are known to the Auto classes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEMO = "jeton demo"


@dataclass(frozen=True)
class Subject:
    """A model ready to answer, its processor, a name to print, and the questions that come with it (none but for the demo)."""

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    examples: list[Any]


def load_subject(
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    processor: ProcessorMixin | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
) -> Subject:
    """The model by path, id or itself; None is the embedded one. A model that is given already loaded stays where it is."""
    if isinstance(model, PreTrainedModel):
        name = model.config.name_or_path or type(model).__name__
        return Subject(Path(name).name, model.eval(), processor or _processor(name), _embedded())
    torch_dtype, place = _dtype(dtype), _device(device)
    if model is None:
        from ..demo import load_demo

        demo = load_demo(place, torch_dtype or torch.float32)
        return Subject(DEMO, demo.model, demo.processor, list(demo.examples))
    path = os.fspath(model)
    try:
        made: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch_dtype or "auto")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a vision-language model from {path!r}: {_first_sentence(error)}") from error
    return Subject(Path(path).name, made.to(place).eval(), processor or _processor(path), _embedded())


def _processor(path: str) -> ProcessorMixin:
    try:
        return AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a processor from {path!r}; pass processor=. {_first_sentence(error)}") from error


def _embedded() -> list[Any]:
    from ..demo.examples import load_examples

    return list(load_examples())


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"there is no dtype {dtype!r}; choose {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _device(device: str) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {device!r} cannot be used here: {_first_sentence(error)}") from error
    return place


def _first_sentence(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) < 300 else f"{line[:300]}..."
