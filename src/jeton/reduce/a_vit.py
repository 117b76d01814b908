"""A-ViT: every token halts when it has been computed enough; what it gives is a mixture of its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..learned import Learned, Shape
from ..method import Method, Promise, Signals, register
from ..ops.selection import pack
from ..tokens import Reduction, Tokens


@register(
    title="A-ViT: Adaptive Tokens for Efficient Vision Transformer",
    year=2022,
    source="arXiv:2112.07658",
    family="vit",
    stage="block",
    training_free=False,
    headline="DeiT-T 38 % faster, DeiT-S 62 % faster, for 0.3 points of ImageNet accuracy",
)
@dataclass(frozen=True)
class AViT(Learned):
    """Behind every block a token's first channel says with which probability it halts there.

    h_l = sigmoid(gamma x_l[0] - beta), and 1 behind the last block. A token halts at the first block where the sum of its h
    exceeds 1 - eps. Its output is ``sum of h_l x_l over the blocks before + R x`` at the one where it halts, R = 1 - sum of the h
    before: a mixture over depths, which takes the place of the last block's output. All tokens have one, so as many are handed on
    as came; fewer and fewer run through the blocks. Halted patches leave, special tokens that halt are hidden from all others.

    There are no modules to train: the encoder itself learns what its first channel says, with `apply(..., train=True)`. The loss
    of the task gains `ponder` x mean of (blocks a token runs through + R) and `prior` x KL(Gaussian || mean h over tokens,
    normalised over blocks, at least 0.01), where the Gaussian over blocks (from 0) has its centre at `center` (None: at two
    thirds of the depth, 8 of 12) and the standard deviation `spread`; the release cuts it so that the blocks before the centre
    sum to 0.98, here all blocks sum to 1. On an encoder that was not trained so, the first channel says nothing of the kind.
    """

    site = "block"
    point = "after"
    finishes = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"deit-t": {"beta": 30.0}, "deit-s": {"beta": 75.0}}
    gamma: float = 10.0
    beta: float = 30.0
    eps: float = 0.01
    ponder: float = 5e-4
    prior: float = 1e-3
    center: float | None = None
    spread: float = 1.0
    last: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "beta", "ponder", "prior"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)!r}.")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be in (0, 1), got {self.eps!r}.")
        if not self.spread > 0:
            raise ValueError(f"spread must be above 0, got {self.spread!r}.")

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        score, weight, running = self._step(tokens)
        n, prefix = len(tokens), tokens.prefix
        memory = tokens.memory
        if memory is None:
            memory = torch.zeros_like(tokens.features, dtype=torch.float32)
        where = tokens.origin[..., None].expand_as(tokens.features)
        memory = memory.scatter_add(1, where, weight[..., None] * tokens.features.float())
        stays = running | (torch.arange(n, device=tokens.device) < prefix)
        # a shorter sequence has to wait for the longest row
        most, halted = torch.stack([stays.sum(1).max(), (tokens.real & ~running).sum()]).tolist()
        if self.last or halted == 0:
            same = Reduction.identity(len(score), n, tokens.device, prefix)
            return replace(same, score=score, memory=memory)
        step = pack(stays, max(1, most), ragged=True, prefix=prefix)
        seen = step.real & running.gather(1, step.index)
        return replace(step, mask=seen, score=score.gather(1, step.index), memory=memory)

    def finish(self, tokens: Tokens) -> Tokens:
        assert tokens.memory is not None
        mixed = tokens.memory.to(tokens.features.dtype)
        if not tokens.features.is_contiguous() and tokens.features.mT.is_contiguous():
            mixed = mixed.mT.contiguous().mT  # as the last block lays it out: what comes behind sums in the order of the memory
        return Tokens(mixed, prefix=tokens.prefix)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return [replace(self, last=block == depth - 1) for block in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n)

    def soften(self, tokens: Tokens, signals: Signals) -> Tokens:
        score, weight, running = self._step(tokens)
        part = weight[..., None] * tokens.features.float()
        memory = part if tokens.memory is None else tokens.memory + part
        return replace(tokens, score=score, memory=memory, policy=running.float())

    def losses(self, softened: list[Tokens], learned: nn.Module | None, shape: Shape) -> dict[str, Tensor]:
        real = softened[0].real
        sums = [torch.zeros_like(softened[0].features[..., 0], dtype=torch.float32), *(self._sum(tokens) for tokens in softened)]
        used, halting = [], []
        for before, after in pairwise(sums):
            running = (before <= 1 - self.eps) & real
            rest = torch.where(after > 1 - self.eps, 1 - before, 0)
            used.append(running * (1 + rest))
            halting.append(((after - before) * running).sum() / real.sum())
        share = torch.stack(halting)
        share = (share / share.sum()).clamp(0.01, 0.99)
        target = self._prior(len(halting), share.device)
        ponder = torch.stack(used).sum(0)[real].mean()
        return {
            "ponder": self.ponder * ponder,
            "prior": self.prior * (target * (target.clamp(min=1e-12).log() - share.log())).sum(),
        }

    def _step(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of h (B, N) behind this block, the weight of its output in the mixture, and which tokens run on."""
        before = self._sum(tokens)
        running = tokens.real & (before <= 1 - self.eps)
        halt = torch.sigmoid(self.gamma * tokens.features[..., 0].float() - self.beta)
        after = torch.where(running, before + (torch.ones_like(halt) if self.last else halt), before)
        goes_on = running & (after <= 1 - self.eps)
        weight = torch.where(goes_on, halt, 1 - before)
        return after, torch.where(running, weight, 0), goes_on

    def _sum(self, tokens: Tokens) -> Tensor:
        if tokens.score is None:
            return torch.zeros_like(tokens.features[..., 0], dtype=torch.float32)
        return tokens.score

    def _prior(self, depth: int, device: torch.device) -> Tensor:
        center = depth * 2 / 3 if self.center is None else self.center
        at = torch.arange(depth, device=device)
        return (-((at - center) ** 2) / (2 * self.spread**2)).softmax(0)
