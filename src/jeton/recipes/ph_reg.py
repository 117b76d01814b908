"""Registers for the digits encoder, after two artifacts were planted in it.

PLACEHOLDER
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..demo import digits
from ..models import adapt
from ..objectives.ph_reg import PHReg, student
from ..train import Recipe, train
from ._digits import write

RECIPE = Recipe(steps=150, rate=1e-3, batch=16, warmup=0.05, decay=0.01)
PLACES = [20, 45]  # patches whose positions are spoilt


def spoilt() -> Any:
    """The trained encoder with a vector added to its position table that makes two places stand out."""
    teacher = digits.load_digits().model.vit
    vector = 4 * torch.randn(48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        teacher.embeddings.position_embeddings[:, [1 + place for place in PLACES]] += vector
    return teacher


@torch.no_grad()
def lengths(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, N, D) of the patches, and their norms (B, N) in front of the last layer norm."""
    prefix, seen = adapt(model).prefix, []  # type: ignore[union-attr]
    handle = model.layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, prefix:].norm(dim=-1)))
    try:
        return model(pixel_values=pixels)[0][:, prefix:], seen[0]
    finally:
        handle.remove()


def high(norms: Tensor) -> float:
    """The share of patches whose norm is above twice the median of their picture: artifacts."""
    return (norms > 2 * norms.median(1, keepdim=True).values).float().mean().item()


def run(out: Path, resume: bool = False, progress: bool = True, recipe: Recipe = RECIPE) -> dict[str, Any]:
    found = digits.load_digits()
    teacher = spoilt()
    made = student(teacher, 4, torch.Generator().manual_seed(0))
    loss = PHReg(teacher, fill=(-1.0,))
    told = train(made, found.train, loss, recipe, out=out, resume=resume, progress=progress, name="ph-reg")
    pixels = found.test.pixels
    plain, usual = lengths(found.model.vit, pixels)
    measured: dict[str, Any] = {"seconds": round(told.seconds), "high norms": {"before planting": high(usual)}, "distance": {}}
    for name, model in (("teacher", teacher), ("student", made)):
        features, norms = lengths(model, pixels)
        measured["high norms"][name] = high(norms)
        away = (features - plain).norm(dim=-1).mean(0)
        measured["distance"][name] = {"planted": away[PLACES].mean().item(), "all": away.mean().item()}
    measured["loss"] = {part: [round(value, 4) for value in values[:: max(1, len(values) // 10)]] for part, values in told.losses.items()}
    return write(out, measured)
