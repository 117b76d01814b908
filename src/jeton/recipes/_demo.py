"""What recipes share that train on the embedded model's scenes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from ..demo.batches import Batches
from ..demo.chat import prompt
from ..demo.evaluate import answers
from ..demo.examples import Example

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
