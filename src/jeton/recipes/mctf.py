"""MCTF on the digits model: fine-tuned with fewer tokens, beside itself with more.

90 steps of 32 images, two forwards each, with half of the 64 patches fused in every block but the first, so that two are left:
10 s on one core (95 s where the machine was busy). It gained nothing here: 0.952 of the held-out digits with all tokens and 0.947
with two patches became 0.927 and 0.935 (the standard error of each is 0.011). The model loses next to nothing by fusing to begin
with, so there is little to win back; longer training and other rates were not tried.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..demo.digits import Digits, accuracy, load_digits
from ..engine import apply
from ..ops.distillation import token_mse
from ..reduce.mctf import MCTF
from ..train import Recipe, train
from ._digits import write

RECIPE = Recipe(steps=90, rate=6e-5, batch=32, warmup=0.1, decay=0.05)
METHOD = MCTF(r=32, least=1)  # half of the patches in every block but the first: two are left


def loss(
    method: MCTF = METHOD,
    most: int | None = None,
    weights: tuple[float, float, float] = (1.0, 1.0, 3.0),
    sure: float = 0.4,
    seed: int = 0,
) -> Callable[[nn.Module, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """The published loss for an image classifier of transformers, for `jeton.train`.

    The student is the model with r tokens fused per block, the teacher the same model with a number drawn from 0 to `most` (half
    of r, if not given) in every step: cross-entropy of both, and the squared difference of their last class tokens, averaged over
    its channels and over the pictures to whose class the student gives more than `sure`; the teacher's is not moved by it.
    """
    draw = random.Random(seed)
    top = int(method.r) // 2 if most is None else most

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        pixels, labels = batch
        student, first = _classified(model, pixels, method)
        teacher, other = _classified(model, pixels, replace(method, r=draw.randint(0, top)))
        right = student.softmax(-1).gather(1, labels[:, None]) > sure
        return {
            "student": weights[0] * F.cross_entropy(student, labels),
            "teacher": weights[1] * F.cross_entropy(teacher, labels),
            "consistency": weights[2] * token_mse(first[:, None], other[:, None], right.float()),
        }

    return step


def _classified(model: nn.Module, pixels: Tensor, method: MCTF) -> tuple[Tensor, Tensor]:
    """Logits, and the last class token, with tokens fused."""
    with apply(model, method) as run:
        logits = model(pixel_values=pixels).logits
        assert run.tokens is not None
        return logits, run.tokens.features[:, 0]


def measured(digits: Digits, method: MCTF) -> dict[str, float]:
    """Accuracy on held-out digits with all tokens and with those the method leaves."""
    with torch.no_grad(), apply(digits.model, method):
        fewer = accuracy(digits.model, digits.test)
    return {"all tokens": round(accuracy(digits.model, digits.test), 4), "fused": round(fewer, 4)}


def run(out: Path, resume: bool = False, progress: bool = True, recipe: Recipe = RECIPE, method: MCTF = METHOD) -> dict[str, Any]:
    digits = load_digits()
    before = measured(digits, method)
    history = train(digits.model, digits.train, loss(method), recipe, out=out, resume=resume, progress=progress, name="mctf")
    digits.model.eval()
    after = measured(digits, method)
    left = method.promise(64, digits.model.config.num_hidden_layers).count
    return write(out, {"patches left": left, "before": before, "after": after, "seconds": round(history.seconds)})
