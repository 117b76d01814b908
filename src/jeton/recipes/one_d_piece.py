"""A small One-D-Piece that draws pixels, on crops of photographs.

Not yet run to its end. After 1000 of its 2500 steps (0.09 s of one core each) held-out crops came out at 15.0, 16.7, 17.2 and
17.4 dB from 1, 2, 4 and 8 of 32 tokens (1.2 to 10 bytes) and no better from more; JPEG's smallest files are 299 bytes at 20.1
dB, WebP's 81 at 23.4 dB. So far it is no match for either.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..measure.machine import describe
from ..measure.rate import file_curve, plot, token_curve
from ..tokenizers.one_d_piece import OneDPiece
from ..train import Recipe, train
from ._photos import PHOTOS, crops, whole

RECIPE = Recipe(steps=2500, rate=1e-3, batch=24, warmup=0.1)  # twice this rate falls back to the mean picture
LENGTHS = (1, 2, 4, 8, 16, 24, 32)
HELD_OUT = 256  # crops to measure on


def make() -> OneDPiece:
    """32 x 32 pixels, 16 patches, 32 tokens of 1000 codes (FSQ). One length for each picture: batches are small."""
    torch.manual_seed(0)
    return OneDPiece(32, 8, 32, width=96, depth=2, heads=4, levels=[8, 5, 5, 5], target="pixels", drop="row")


def draw(step: int) -> Tensor:
    return crops(RECIPE.batch, 32, seed=1_000_000 + step)


def loss(model: Any, images: Tensor) -> dict[str, Tensor]:
    return model.first_stage(images)


def run(out: Path, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    model = make()
    history = train(model, draw, loss, RECIPE, out=out, resume=resume, progress=progress, name="one-d-piece")
    measured = measure(model, out)
    measured |= {"recipe": asdict(RECIPE), "seconds": round(history.seconds), "machine": describe()}
    (out / "results.json").write_text(json.dumps(measured, indent=2) + "\n")
    return measured


def measure(model: OneDPiece, out: Path) -> dict[str, Any]:
    """Rate and distortion on photographs that were not trained on, beside JPEG and WebP, as numbers and as pictures in `out`."""
    small, large = crops(HELD_OUT, 32, seed=0, split="held-out"), whole(256)
    found: dict[str, Any] = {"parameters": sum(value.numel() for value in model.parameters()), "held out": PHOTOS["held-out"]}
    for name, images in (("crops of 32 x 32", small), ("photographs of 256 x 256 in 64 tiles", large)):
        curves = {"one-d-piece": token_curve(model, images, LENGTHS)}
        curves |= {"JPEG": file_curve(images, "JPEG"), "WebP": file_curve(images, "WEBP")}
        plot(curves, f"Held-out {name}", out / f"rate-{images.shape[-1]}.png")
        found[name] = curves
    ids = model.encode(small).ids
    found["codes used"] = round(model.quantizer.usage(ids).item(), 3)
    found["perplexity"] = round(model.quantizer.perplexity(ids).item(), 1)
    return found
