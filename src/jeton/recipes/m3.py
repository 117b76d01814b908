"""M3 on the embedded model: 144, 36, 9 and 1 tokens trained at once.

480 steps of 8 scenes, each at all four scales, the full length weighing three times as much as each other one; the encoder is
frozen, projector and language model train. It took 246 s of processor time on one core, measuring included. Of 256 held-out
questions 95.3, 91.4, 81.2 and 21.9 % are answered rightly with 144, 36, 9 and 1 tokens; 98.4 % with the right scale known for
each. The model it starts from, pooled and not trained, answers 98.8, 34.8, 11.3 and 9.0 %: in so short a run the full length
still loses 3.5 points. With equal weights, half the steps and twice the rate it loses 6.2, and 89.1, 85.5 and 29.7 % come of
36, 9 and 1 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import bridge
from ..bridge.m3 import loss, oracle
from ..demo import load_demo
from ..train import Recipe, train
from ._demo import right, scenes, share, write

SCALES = (144, 36, 9, 1)
WEIGHTS = (3.0, 1.0, 1.0, 1.0)
RECIPE = Recipe(steps=480, rate=3e-4, warmup=0.1)
BATCH = 8


def run(out: Path, resume: bool = False, progress: bool = True, recipe: Recipe = RECIPE, questions: int = 256) -> dict[str, Any]:
    demo = load_demo()
    examples = demo.examples[:questions]
    model = bridge.attach(demo.model, "m3")
    model.model.vision_tower.requires_grad_(False)
    before = measure(model, demo.processor, examples)
    data = scenes(demo.processor, BATCH, model.bridge.tokens)
    told = train(
        model,
        data,
        lambda m, batch: loss(m, batch, SCALES, WEIGHTS),
        recipe,
        out=out,
        resume=resume,
        progress=progress,
        name="m3",
    )
    after = measure(model, demo.processor, examples)
    results = {
        "questions": len(examples),
        "seconds": round(told.seconds),
        "pooled, not trained": {f"{tokens} tokens": share(marks) for tokens, marks in before.items()},
        "trained": {f"{tokens} tokens": share(marks) for tokens, marks in after.items()},
        "oracle": round(oracle(after)[0], 4),
    }
    return write(out, bridge.fit(demo.processor, model), results)


def measure(model: bridge.BridgedLlava, processor: Any, examples: Any) -> dict[int, list[bool]]:
    """Which questions are answered rightly at every scale; the model's own scale is all tokens afterwards."""
    found = {}
    for tokens in SCALES:
        model.bridge.scale(tokens)
        found[tokens] = right(model.eval(), bridge.fit(processor, model), examples)
    model.bridge.scale(None)
    return found
