"""GLSim's two views on small digits in large noise, beside the same encoder with one, over three seeds.

PLACEHOLDER
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from ..demo import digits
from ..heads import GLSimClassifier
from ..train import Recipe, train
from ._digits import write

RECIPE = Recipe(steps=500, rate=2e-3, batch=64, warmup=0.2, decay=0.05, betas=(0.9, 0.999))
SIDE, GLYPH, NOISE = 64, 24, 0.15  # pixels of a picture and of the digit in it, standard deviation of what is around


def hidden(split: digits.Split, seed: int) -> digits.Split:
    """Each digit, enlarged to GLYPH pixels, at a random place of a picture of SIDE pixels of noise."""
    generator = torch.Generator().manual_seed(seed)
    count = len(split)
    pictures = NOISE * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    glyphs = nn.functional.interpolate(split.pixels, (GLYPH, GLYPH), mode="bilinear", align_corners=False) + 1
    corners = torch.randint(0, SIDE - GLYPH + 1, (count, 2), generator=generator)
    for picture, glyph, (top, left) in zip(pictures, glyphs, corners.tolist(), strict=True):
        picture[:, top : top + GLYPH, left : left + GLYPH] += glyph
    return digits.Split(pictures, split.labels)


def config() -> ViTConfig:
    return ViTConfig(
        image_size=SIDE,
        patch_size=8,
        num_channels=1,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=10,
    )


def make(seed: int, views: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if views == 1:
            return ViTForImageClassification(config())
        return GLSimClassifier(ViTModel(config(), add_pooling_layer=False), 10, top=4, inclusive=True, smoothing=0.0)


def draw(seed: int, batch: int) -> Any:
    """From the step to a batch, every picture new."""
    learned = digits.splits()[0]

    def at(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        chosen = torch.randint(len(learned), (batch,), generator=generator)
        made = hidden(digits.Split(learned.pixels[chosen], learned.labels[chosen]), 7 * seed + step)
        return made.pixels, made.labels

    return at


def run(out: Path, resume: bool = False, progress: bool = True, recipe: Recipe = RECIPE, seeds: int = 3) -> dict[str, Any]:
    unseen = hidden(digits.splits()[1], seed=12345)
    found: dict[str, Any] = {"steps": recipe.steps, "held out": len(unseen)}
    for views in (1, 2):
        told = []
        for seed in range(seeds):
            model = make(seed, views)
            name, data = f"{views} views, seed {seed}", draw(seed, recipe.batch)
            folder = out / f"views-{views}-{seed}"
            train(model, data, digits.entropy, recipe, out=folder, resume=resume, progress=progress, name=name)
            told.append(round(digits.accuracy(model, unseen), 4))
        found[f"accuracy with {views} views"] = told
    return write(out, found)
