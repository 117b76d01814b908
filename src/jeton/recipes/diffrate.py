"""DiffRate on the digits: how many of 64 patches each of five blocks prunes and merges, the model frozen.

300 steps of 64 images on the rates alone, towards 0.6 of the multiply-adds of the blocks. It took 56 s of processor time on one
core, measuring included (234 s on a busy machine), and 720 MB. It comes to 0.602 and answers 0.947 of the held-out digits (0.952
with all tokens); the schedule that keeps 0.77 of the patches in every block, 0.604 of the FLOPs, answers 0.942. Rates begin
with half of all patches in every block and stay near there: the frozen model makes no mistakes on what it was trained on, so its
loss says little.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..demo.digits import load_digits
from ..reduce.diffrate import DiffRate, multiply_adds
from ..train import Recipe
from ._digits import learn, measured, write

RECIPE = Recipe(steps=300, rate=2e-2, batch=64, warmup=0.0, floor=0.1, decay=0.0, betas=(0.9, 0.999))
TARGET = 0.6


def run(out: Path, resume: bool = False, progress: bool = True, recipe: Recipe | None = None) -> dict[str, Any]:
    digits = load_digits()
    digits.model.requires_grad_(False)
    told = learn(digits, DiffRate(target=TARGET, granularity=1), recipe or RECIPE, out, resume=resume, progress=progress)
    found = DiffRate(weights=str(out)).lists(6)
    assert found is not None
    prune, merge = found
    ran, full = (float(multiply_adds(*lists, 48, 65, 6)) for lists in ((prune, merge), ((), ())))
    ratio = uniform(ran / full)
    results = {
        "full": measured(digits, None),
        "trained": {**measured(digits, "diffrate", prune=prune, merge=merge), "prune": prune, "merge": merge},
        "multiply-adds": round(ran / full, 4),
        "target": TARGET,
        "uniform": {**measured(digits, "diffrate", ratio=ratio), "ratio": ratio},
        **told,
    }
    return write(out, results)


def uniform(share: float) -> float:
    """The ratio of the schedule without lists whose multiply-adds are nearest to this share of all."""

    def distance(ratio: float) -> float:
        kept = [left + 1 for left in DiffRate(ratio=ratio).plan(64, 6)]
        return abs(float(multiply_adds(kept, kept, 48, 65, 6) / multiply_adds((), (), 48, 65, 6)) - share)

    return min((percent / 100 for percent in range(50, 101)), key=distance)
