"""A-ViT on the digits: the model learns with its first channel when each of 64 patches has been computed enough.

440 steps of 64 images. gamma, beta and the weights of the losses are set for so short a run on so small a model (published: 10,
30 or 75, 5e-4 and 1e-3, for 100 epochs). It took 77 s of processor time on one core, measuring included (449 s on a busy
machine), and 760 MB. Before, no token halts and 0.952 of the held-out digits come out right; after, 0.947, at 0.46 of the FLOPs
where pictures run one by one: of 65 tokens 65, 65, 44, 6, 2 and 1 enter the six blocks. In a batch shorter rows are padded to
the longest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..demo.digits import Digits, load_digits
from ..engine import apply
from ..method import Method, get
from ..train import Recipe
from ._digits import learn, measured, write

RECIPE = Recipe(steps=440, rate=5e-4, batch=64, warmup=0.1)
METHOD = {"gamma": 5.0, "beta": 10.0, "ponder": 0.02, "prior": 0.1, "center": 2.0}
ALONE = 100  # pictures run one by one: in a batch shorter rows are padded to the longest


def run(out: Path, resume: bool = False, progress: bool = True, recipe: Recipe | None = None) -> dict[str, Any]:
    digits = load_digits()
    method = get("a-vit", **METHOD)
    results = {"full": measured(digits, None), "not trained": one_by_one(digits, method)}
    told = learn(digits, method, recipe or RECIPE, out, resume=resume, progress=progress)
    results |= {"trained": one_by_one(digits, method), **told}
    return write(out, results)


@torch.no_grad()
def one_by_one(digits: Digits, method: Method) -> dict[str, Any]:
    """Accuracy on all held-out digits, and means over pictures that run alone: tokens that enter each block, share of FLOPs."""
    tokens, flops = [], []
    with apply(digits.model, method) as run:
        for picture in digits.test.pixels[:ALONE].split(1):
            digits.model(pixel_values=picture)
            report = run.report()
            tokens.append(report.encoder_tokens)
            flops.append(report.flops_share)
    mean = torch.tensor(tokens).mean(0).tolist()
    return {
        "accuracy": measured(digits, method)["accuracy"],
        "tokens": [round(number, 1) for number in mean],
        "flops": round(sum(flops) / len(flops), 4),
    }
