"""A few examples to look at: what every method kept of the picture, and what it answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..method import Unsupported
from .data import Question
from .plan import Case
from .row import Tally
from .trial import Trial


@dataclass(frozen=True)
class Look:
    """One method's view of an example: its answer, whether that is right, and the assignment map of each unit."""

    case: Case
    answer: str
    right: bool
    maps: list[Tensor]


@dataclass(frozen=True)
class Shown:
    """An example with the pictures the model saw (one a unit) and every method's view of it, the full model's first."""

    question: Question
    pictures: list[Image.Image]
    looks: list[Look]


def choose(tallies: Sequence[Tally], questions: Sequence[Question], count: int) -> list[int]:
    """Numbers of examples worth looking at: the full model is right, and the methods disagree most; one a scene."""
    done = [tally for tally in tallies[1:] if tally.reason is None]
    full = tallies[0].right
    share = [sum(tally.right[i] for tally in done) / max(len(done), 1) for i in range(len(questions))]
    chosen: dict[str, int] = {}
    for i in sorted(range(len(questions)), key=lambda i: (not full[i], abs(share[i] - 0.5))):
        if len(chosen) < count:
            chosen.setdefault(questions[i].scene, i)
    return sorted(chosen.values())


def show(trial: Trial, chosen: Sequence[int], questions: Sequence[Question], tallies: Sequence[Tally]) -> list[Shown]:
    """Run the chosen examples once more, one by one, to see where their tokens went."""
    found = []
    for number in chosen:
        question = questions[number]
        inputs = trial.speaker.encode([question])
        looks = []
        for tally in tallies:
            if tally.reason is None:
                maps = _maps(trial, tally.case, inputs)
                looks.append(Look(tally.case, tally.said[number], tally.right[number], maps))
        found.append(Shown(question, seen(inputs, trial.speaker.processor, question.image), looks))
    return found


def seen(inputs: Any, processor: Any, image: Image.Image) -> list[Image.Image]:
    """The pictures that entered the encoder, one a unit; the image itself where the processor cuts it into loose patches."""
    pixels = inputs.get("pixel_values")
    options = getattr(processor, "image_processor", None)
    if pixels is None or options is None or pixels.dim() not in (4, 5) or pixels.shape[-3] != 3:
        return [image]
    units = pixels.reshape(-1, *pixels.shape[-3:]).float().cpu()
    mean, std = (torch.tensor(getattr(options, name, default) or default) for name, default in _NORMAL)
    back = (units * std[:, None, None] + mean[:, None, None]).clamp(0, 1) * 255
    return [Image.fromarray(unit.byte().permute(1, 2, 0).numpy()) for unit in back]


_NORMAL = (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3))


@torch.inference_mode()
def _maps(trial: Trial, case: Case, inputs: Any) -> list[Tensor]:
    if case.method is None:
        return []
    try:
        with trial.attach(case) as run:
            trial.speaker.model(**inputs)
            return [each.cpu() for each in run.assignment(0)]
    except (Unsupported, ValueError):
        return []
