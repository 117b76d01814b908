"""DynamicViT on the digits: three predictors learn which of 64 patches may go.

440 steps of 64 images; the model learns at 0.01 of the predictors' rate (the paper also freezes it at first) beside its unreduced
self. It took 104 s of processor time on one core, measuring included (654 s on a busy machine), and 860 MB. With 32, 16 and 8
patches left, 0.43 of the FLOPs, 0.940 of the held-out digits come out right (0.942 and 0.947 from other first weights), 0.952
with all patches, 0.557 with predictors that are not trained. The class token's attention of the model as it is (EViT without a
fused token, whose blocks see more patches: 0.47 of the FLOPs) gives 0.947: here it says already what predictors learn.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..demo.digits import Digits, load_digits
from ..engine import Run, apply, watch
from ..method import Method, get
from ..ops.distillation import logit_kl, token_mse
from ..train import Recipe
from ._digits import learn, measured, write

RECIPE = Recipe(steps=440, rate=1e-3, batch=64, warmup=0.1, rates={"model.": 0.01})
RATIO = 0.5


def run(out: Path, resume: bool = False, progress: bool = True, recipe: Recipe | None = None) -> dict[str, Any]:
    digits, teacher = load_digits(), load_digits().model.requires_grad_(False)
    method = get("dynamicvit", ratio=RATIO)
    results = {
        "full": measured(digits, None),
        "evit, not trained": measured(digits, "evit", ratio=RATIO, fuse=False),
        "predictors not trained": by_chance(digits, method),
    }

    def distil(run: Run, pixels: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """The unreduced model's logits, and its tokens where they are kept."""
        with torch.no_grad(), watch(teacher) as full:
            target = teacher(pixel_values=pixels).logits
        assert run.tokens is not None and full.tokens is not None
        kept = run.softened[-1].seen
        return {
            "logits": 0.5 * logit_kl(logits, target),
            "tokens": 0.5 * token_mse(run.tokens.features, full.tokens.features, kept),
        }

    told = learn(digits, method, recipe or RECIPE, out, resume=resume, progress=progress, more=distil)
    results |= {"trained": measured(digits, "dynamicvit", ratio=RATIO, weights=out), **told}
    return write(out, results)


def by_chance(digits: Digits, method: Method) -> dict[str, Any]:
    """The same with predictors as they are drawn."""
    with TemporaryDirectory() as folder:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with apply(digits.model, method, train=True) as run:
                run.save(folder)
        return measured(digits, method.card.id, ratio=RATIO, weights=folder)
