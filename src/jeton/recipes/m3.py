"""M3 on the embedded model: 144, 36, 9 and 1 tokens trained at once.

900 steps of 8 scenes, each at all four scales, the full length weighing four times as much as 36 or 9 tokens and one token half
as much; the encoder is frozen, projector and language model train. It took 412 s of processor time on one core, measuring
included. Of all 770 held-out questions 97.8, 91.8, 83.5 and 29.9 % are answered rightly with 144, 36, 9 and 1 tokens; 99.2 %
with the right scale known for each. The model it starts from, pooled and not trained, answers 98.8, 43.4, 12.7 and 11.0 %: the
full length loses 1.0 point. Shorter and faster training loses more: 3.5 points of the first 256 questions in 480 steps at 3e-4
with weights 3, 1, 1, 1 (0.4 points here), 6.2 in 240 steps at 6e-4 with equal weights.
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
WEIGHTS = (4.0, 1.0, 1.0, 0.5)  # one token tells little of a scene: what it cannot learn should not disturb the others
RECIPE = Recipe(steps=900, rate=2e-4, warmup=0.1)
BATCH = 8


def run(
    out: Path, resume: bool = False, progress: bool = True, recipe: Recipe = RECIPE, questions: int | None = None
) -> dict[str, Any]:
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
