"""A small One-D-Piece that draws pixels, on crops of photographs.

4000 steps in 270 s on one core (at 2e-3 it had not begun to learn after 300).
Each further token helps on photographs that were not trained on: crops of 16 x 16 come out at
18.9, 19.7, 20.7, 21.6, 21.7 and 21.8 dB from 1, 2, 4, 8, 12 and 16 tokens (1.2 bytes each), photographs of 256 x 256 in tiles
at 18.1, 19.1, 20.1, 21.1, 21.2 and 21.2 dB (319 to 5102 bytes). There JPEG has no file below 1087 bytes, where it has 20.2 dB,
and WebP none below 1439, with 24.0; at 1.3 kB JPEG is 0.5 dB better (20.6), at 5 kB both are far ahead (28 and 29 dB). On 16 x
16 a JPEG file is 287 bytes at least (3 without headers and tables: 20.3 dB). 58% of the codes are in use.

On handwritten digits (`digits`; 1500 steps, about a minute of processor time): 13.2, 14.8, 17.2, 19.8, 20.4 and 20.5 dB on
held-out ones from 1, 2, 4, 8, 12 and 16 tokens of 0.75 bytes; the mean digit has 11.4. A JPEG file is 293 bytes at least (6
without headers and tables: 14.4 dB; 19.1 dB take 16 of these), and needs 21 of them to be better than 12 bytes of tokens. The
digits as they are, 64 pixels of 17 shades, are 33 bytes. All codes are in use.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..demo.digits import splits
from ..measure.machine import describe
from ..measure.rate import file_curve, plot, psnr, token_curve
from ..tokenizers.one_d_piece import OneDPiece
from ..train import Recipe, train
from ._photos import PHOTOS, crops, whole

RECIPE = Recipe(steps=4000, rate=6e-4, batch=64)
LENGTHS = (1, 2, 4, 8, 12, 16)
TRAINED, HELD_OUT = 10240, 512  # crops to train and to measure on
DIGITS = Recipe(steps=1500, rate=2e-3, batch=64)


def make() -> OneDPiece:
    """16 x 16 pixels, 16 patches, 16 tokens of 1000 codes (FSQ)."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"levels": [8, 5, 5, 5], "target": "pixels", "init_std": 0.07, "batch_norm": True}
    return OneDPiece(16, 4, 16, width=64, depth=2, heads=4, **fields)


@cache
def pool(count: int) -> Tensor:
    return crops(count, 16, seed=1)


def draw(step: int) -> Tensor:
    chosen = torch.randint(TRAINED, (RECIPE.batch,), generator=torch.Generator().manual_seed(step))
    return pool(TRAINED)[chosen]


def loss(model: Any, images: Tensor) -> dict[str, Tensor]:
    return model.first_stage(images)


def run(out: Path, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    model = make()
    history = train(model, draw, loss, RECIPE, out=out, resume=resume, progress=progress, name="one-d-piece")
    measured = measure(model, out)
    measured |= {"recipe": asdict(RECIPE), "seconds": round(history.seconds), "machine": describe()}
    measured["digits"] = digits(out / "digits", resume, progress)
    (out / "results.json").write_text(json.dumps(measured, indent=2) + "\n")
    return measured


def measure(model: OneDPiece, out: Path) -> dict[str, Any]:
    """Rate and distortion on photographs that were not trained on, beside JPEG and WebP, as numbers and as pictures in `out`."""
    small, large = crops(HELD_OUT, 16, seed=0, split="held-out"), whole(256)
    found: dict[str, Any] = {"parameters": sum(value.numel() for value in model.parameters()), "held out": PHOTOS["held-out"]}
    for name, images in (("crops of 16 x 16", small), ("photographs of 256 x 256 in 256 tiles", large)):
        curves = {"one-d-piece": token_curve(model, images, LENGTHS)}
        curves |= {"JPEG": file_curve(images, "JPEG"), "WebP": file_curve(images, "WEBP")}
        plot(curves, f"Held-out {name}", out / f"rate-{images.shape[-1]}.png")
        found[name] = curves
    ids = model.encode(small).ids
    found["codes used"] = round(model.quantizer.usage(ids).item(), 3)
    found["perplexity"] = round(model.quantizer.perplexity(ids).item(), 1)
    return found


def digits(out: Path, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """The same on handwritten digits of 8 x 8 grey pixels (scikit-learn): 16 patches, 16 tokens of 64 codes, 0.75 bytes each."""
    seen, unseen = ((split.pixels + 1) / 2 for split in splits())
    unseen = unseen[:HELD_OUT]
    torch.manual_seed(0)
    model = OneDPiece(
        8, 2, 16, width=48, depth=2, heads=4, channels=1, levels=[8, 8], target="pixels", init_std=0.07, batch_norm=True
    )

    def batch(step: int) -> Tensor:
        return seen[torch.randint(len(seen), (DIGITS.batch,), generator=torch.Generator().manual_seed(step))]

    history = train(model, batch, loss, DIGITS, out=out, resume=resume, progress=progress, name="one-d-piece on digits")
    model.eval()
    curves = {"one-d-piece": token_curve(model, unseen, LENGTHS), "JPEG": file_curve(unseen.expand(-1, 3, -1, -1), "JPEG")}
    plot(curves, "Held-out digits of 8 x 8", out / "rate-8.png")
    ids = model.encode(unseen).ids
    return {
        "seconds": round(history.seconds),
        "the mean picture": psnr(unseen, seen.mean(0).expand_as(unseen)).mean().item(),
        "bytes as they are": 8 * 8 * math.log2(17) / 8,  # 17 shades of grey
        "codes used": round(model.quantizer.usage(ids).item(), 3),
        **curves,
    }
