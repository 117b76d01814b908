"""A small LLaVA that comes with the package: trained weights, processor and held-out questions; no network needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from jeton.demo.chat import prompt
from jeton.demo.examples import Example, load_examples

__all__ = ["Demo", "Example", "load_demo", "prompt"]


@dataclass(frozen=True)
class Demo:
    """The demo model, its processor, its held-out questions, and the folder it was loaded from."""

    model: PreTrainedModel
    processor: ProcessorMixin
    examples: list[Example]
    path: Path


def load_demo(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Demo:
    """Loads the demo model as any checkpoint is loaded, ready to generate."""
    path = Path(__file__).parent / "checkpoint"
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device).eval()
    return Demo(model, AutoProcessor.from_pretrained(path), load_examples(), path)
