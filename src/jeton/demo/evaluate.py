"""Accuracy of a checkpoint on held-out questions, by greedy generation through the real processor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, ProcessorMixin

from jeton.demo.chat import prompt
from jeton.demo.examples import Example

_MAX_ANSWER = 6  # tokens; the longest answer is two words and the end mark


@torch.inference_mode()
def answers(
    model: PreTrainedModel, processor: ProcessorMixin, images: Sequence, prompts: Sequence[str], batch: int = 64
) -> list[str]:
    """The model's answer to each prompt about each image."""
    found = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        inputs = processor(images=list(images[part]), text=list(prompts[part]), padding=True, return_tensors="pt")
        ids = model.generate(**inputs.to(model.device), max_new_tokens=_MAX_ANSWER, do_sample=False)
        found += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in found]


def accuracy(model: PreTrainedModel, processor: ProcessorMixin, examples: Sequence[Example]) -> dict[str, float]:
    """Share of right answers per kind of question and overall ("all"), each question asked alone."""
    said = answers(model, processor, [e.image for e in examples], [prompt(e.question) for e in examples])
    right = defaultdict(list)
    for example, answer in zip(examples, said):
        for group in (example.kind, "all"):
            right[group].append(answer == example.answer)
    return {group: sum(marks) / len(marks) for group, marks in right.items()}


def second_turn_accuracy(model: PreTrainedModel, processor: ProcessorMixin, examples: Sequence[Example]) -> float:
    """Share of right answers to questions asked after another about the same scene, which the model answered itself."""
    pairs = [(a, b) for a, b in zip(examples, examples[1:]) if a.scene == b.scene]
    images = [first.image for first, _ in pairs]
    earlier = answers(model, processor, images, [prompt(first.question) for first, _ in pairs])
    prompts = [prompt(b.question, [(a.question, said)]) for (a, b), said in zip(pairs, earlier)]
    said = answers(model, processor, images, prompts)
    return sum(answer == second.answer for answer, (_, second) in zip(said, pairs)) / len(pairs)
