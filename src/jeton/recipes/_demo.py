"""What recipes share that train on the embedded model's scenes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from .. import bridge
from ..demo import load_demo
from ..demo.batches import Batches
from ..demo.chat import prompt
from ..demo.evaluate import answers
from ..demo.examples import Example
from ..train import Recipe, train

_SEED = 1000


def scenes(processor: ProcessorMixin, size: int, tokens: int) -> Callable[[int], dict[str, Tensor]]:
    """From the step of training to a batch of conversations about new scenes, as inputs of the model with labels; an image has so
    many placeholders."""

    def batch(step: int) -> dict[str, Tensor]:
        drawn = next(Batches(processor.tokenizer, size, _SEED + step, tokens=tokens))
        return {
            "pixel_values": drawn.pixels,
            "input_ids": drawn.ids,
            "attention_mask": drawn.attended,
            "labels": drawn.labels,
        }

    return batch


def bridged(
    model: Any,
    size: int,
    out: Path,
    recipe: Recipe,
    questions: int,
    *,
    resume: bool,
    progress: bool,
) -> dict[str, Any]:
    """Train a bridged embedded model, its encoder frozen, on batches of `size` scenes by the language model's own loss, and
    measure it on the first held-out questions."""
    demo = load_demo()
    examples, processor = demo.examples[:questions], bridge.fit(demo.processor, model)
    model.model.vision_tower.requires_grad_(False)
    data = scenes(demo.processor, size, model.bridge.tokens)
    name = model.config.bridge["id"]
    told = train(model, data, lambda m, batch: m(**batch).loss, recipe, out=out, resume=resume, progress=progress, name=name)
    results = {
        "questions": len(examples),
        "seconds": round(told.seconds),
        "tokens": model.bridge.tokens,
        "loss": [round(value, 3) for value in told.losses["loss"][:: max(1, len(told.steps) // 10)]],
        "accuracy": share(right(model, processor, examples)),
    }
    return write(out, processor, results)


def right(model: PreTrainedModel, processor: ProcessorMixin, examples: Sequence[Example]) -> list[bool]:
    """Which held-out questions the model answers rightly, each asked alone."""
    said = answers(model, processor, [each.image for each in examples], [prompt(each.question) for each in examples])
    return [answer == each.answer for answer, each in zip(said, examples, strict=True)]


def share(marks: Sequence[bool]) -> float:
    return round(sum(marks) / len(marks), 4)


def write(out: Path, processor: ProcessorMixin, results: dict[str, Any]) -> dict[str, Any]:
    """Put the processor and what was measured beside the weights."""
    processor.save_pretrained(out)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results
