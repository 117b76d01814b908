"""Implicit alignment: how near a language model's perceptual tokens lie to its text tokens, layer by layer (Shukor and Cord,
2024, arXiv:2405.16700). The same paper's skipped layers are the method `ima`, its sub-networks `jeton.measure.subnet`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import watch
from ..layout import Layout
from ..models import VisionLanguage
from ..ops import alignment as measure


@dataclass(frozen=True)
class Alignment:
    """Per state (the embeddings, then the output of each layer; the last one normed as the model returns it).

    of_means: cosine between the mean visual and the mean text token over all examples. of_tokens: "max", "mean", "median" and
    "max_mean" of the cosines between an example's visual and text tokens, averaged over examples. Per step between states:
    visual_change, text_change: mean cosine of a token with itself one state before. visual_norm, text_norm: mean length.
    """

    of_means: tuple[float, ...]
    of_tokens: dict[str, tuple[float, ...]]
    visual_change: tuple[float, ...]
    text_change: tuple[float, ...]
    visual_norm: tuple[float, ...]
    text_norm: tuple[float, ...]

    @property
    def score(self) -> float:
        """The alignment of means, averaged over states."""
        return sum(self.of_means) / len(self.of_means)


@torch.no_grad()
def alignment(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Alignment:
    """Run a vision-language model over batches of prompts with pictures, and compare the two kinds of tokens.

    Visual tokens are those of the span map, structure tokens included; text is every other column that is no padding. Prompts
    without a picture, or without text, are left out. Raises ValueError if none is left.
    """
    pictures, words = _Sums(), _Sums()
    near: list[Tensor] = []
    with watch(model) as run:
        if not isinstance(run.view, VisionLanguage):
            raise ValueError(f"{type(model).__name__} has no language model, so there is no text to align with.")
        for inputs in batches:
            states = torch.stack(model(**inputs, output_hidden_states=True, use_cache=False).hidden_states)
            if run.layout is None:
                continue
            for visual, text in split(states, run.layout, inputs.get("attention_mask")):
                pictures.add(visual)
                words.add(text)
                near.append(torch.stack([torch.stack(list(measure.of_tokens(p, t).values())) for p, t in zip(visual, text)]))
    if not near:
        raise ValueError("no prompt had both a picture and text; pass input_ids with image tokens and the pictures' pixels.")
    of_tokens = torch.stack(near).mean(0).T.tolist()
    return Alignment(
        of_means=tuple(torch.nn.functional.cosine_similarity(pictures.mean(), words.mean(), dim=1).tolist()),
        of_tokens={name: tuple(values) for name, values in zip(measure.VARIANTS, of_tokens, strict=True)},
        visual_change=pictures.per_token("change"),
        text_change=words.per_token("change"),
        visual_norm=pictures.per_token("norm"),
        text_norm=words.per_token("norm"),
    )


def correlation(
    checkpoints: Iterable[tuple[nn.Module, float]], batches: Iterable[Mapping[str, Any]]
) -> tuple[tuple[float, float], list[Alignment]]:
    """Whether alignment goes with a task's score: Pearson's and Spearman's correlation over checkpoints, each with its score on
    the task, and their alignments."""
    batches = list(batches)
    found = [(alignment(model, batches), score) for model, score in checkpoints]
    both = torch.tensor([[one.score for one, _ in found], [score for _, score in found]], dtype=torch.float64)
    return measure.correlation(both[0], both[1]), [one for one, _ in found]


def split(states: Tensor, layout: Layout, mask: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """(S, P, D) visual and (S, T, D) text tokens of each prompt that has both, from states (S, B, L, D)."""
    batch, length = states.shape[1:3]
    shown = torch.zeros(batch * length + 1, dtype=torch.bool, device=states.device)
    shown[layout.columns.flatten()] = True
    visual = shown[:-1].view(batch, length)
    text = ~visual if mask is None else ~visual & mask.bool()
    pairs = [(states[:, row, visual[row]], states[:, row, text[row]]) for row in range(batch)]
    return [(p, t) for p, t in pairs if p.shape[1] and t.shape[1]]


class _Sums:
    """Sums over tokens of one kind."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0
        self.sums: dict[str, Any] = {"change": 0, "norm": 0}

    def add(self, states: Tensor) -> None:
        tokens = states.shape[1]
        self.count += tokens
        self.total = self.total + states.double().sum(1)
        self.sums["change"] = self.sums["change"] + tokens * measure.consecutive(states).double()
        self.sums["norm"] = self.sums["norm"] + states.double().norm(dim=2).sum(1)

    def mean(self) -> Tensor:
        return self.total / self.count

    def per_token(self, what: str) -> tuple[float, ...]:
        return tuple((self.sums[what] / self.count).tolist())
