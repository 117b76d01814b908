"""DynamicViT: small predictors learn which patches to drop at a few blocks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..learned import Learned, Shape
from ..method import Budget, Method, Promise, Signals, register
from ..needs import Need, Trained
from ..ops.budget import geometrically
from ..ops.policy import gumbel_choice
from ..ops.ranking import rank
from ..ops.selection import pack, top_k
from ..tokens import Reduction, Tokens
from ._common import blocks_of, check_at_blocks, quota, read


@register(
    title="DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
    year=2021,
    source="arXiv:2106.02034",
    family="vit",
    stage="block",
    training_free=False,
    headline="DeiT-S keeps 0.7 of its patches three times: 79.3 % at 2.9 GMACs (79.8 % at 4.6)",
)
@dataclass(frozen=True)
class DynamicViT(Learned):
    """In front of a few blocks a predictor says of every patch whether to keep it, and the best are gathered.

    Stage s (from 1) keeps ``int(ratio^s n)`` of the n patches there were at first, those of highest log-probability to be kept.
    A predictor: z = GELU(Linear(LayerNorm(x))) (B, N, D); the second half of its channels is replaced by their mean over the
    patches that are kept still; D to D/2 to D/4 to 2 numbers, GELU between, log-softmax.

    In training patches stay. Keep or drop is drawn by straight-through Gumbel-softmax at `temperature`, times the decision of the
    stage before, and blocks attend by `policy_softmax`; special tokens always stay. The loss of the task gains
    `weight` x mean over stages of (share kept - ratio^s)², averaged over pictures. The paper adds KL and token distillation from
    the unreduced model (see `jeton.ops.distillation` and the recipe).

    `locations` are the blocks; None means (3, 6, 9) of 12, in proportion for other depths. `keep` sets the number of patches left
    at last instead, by the same share at each stage. `weights` are the trained predictors.
    """

    site = "block"
    point = "before"
    ratio: float = 0.7
    keep: int | float | None = None
    locations: tuple[int, ...] | None = None
    weights: str | None = None
    temperature: float = 1.0
    weight: float = 2.0
    stage: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_blocks(self)

    def needs(self) -> dict[str, Need]:
        return {"learned": Trained()}

    def build(self, shape: Shape) -> nn.Module:
        return nn.ModuleList(Predictor(shape.width) for _ in self._blocks(shape.depth))

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        n, prefix, mask = len(tokens), tokens.prefix, tokens.mask
        keep = self._plan(n - prefix, 1)[0] if self.keep is None else self.keep
        score = torch.nn.functional.pad(self._predicted(tokens, signals)[..., 0], (prefix, 0), value=torch.inf)
        if mask is None:
            return top_k(score, keep, prefix=prefix)
        stays = quota(signals, keep, tokens.count()[:, None] - prefix) + prefix
        most = Budget(keep).count(n - prefix) + prefix
        return pack((rank(score.masked_fill(~mask, -torch.inf)) < stays) & mask, most, ragged=True, prefix=prefix)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        steps: list[Method | None] = [None] * depth
        blocks = self._blocks(depth)
        for stage, (block, left) in enumerate(zip(blocks, self._plan(n, len(blocks)), strict=True)):
            steps[block] = replace(self, keep=left, stage=stage) if left < n else None
        return steps

    def lessons(self, n: int, depth: int) -> list[Method | None]:
        stages = {block: replace(self, stage=stage) for stage, block in enumerate(self._blocks(depth))}
        return [stages.get(block) for block in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self._plan(n, len(self._blocks(depth)))[-1])

    def soften(self, tokens: Tokens, signals: Signals) -> Tokens:
        prefix, seen = tokens.prefix, tokens.seen
        odds = self._predicted(tokens, signals)
        kept = gumbel_choice(odds, self.temperature, signals["learned"].training)[..., 0]
        return replace(tokens, policy=torch.cat([seen[:, :prefix], kept * seen[:, prefix:]], 1))

    def losses(self, softened: list[Tokens], learned: nn.Module | None, shape: Shape) -> dict[str, Tensor]:
        """The squared distance of each stage's share of patches from what it should keep."""
        parts = []
        for tokens, left in zip(softened, self._plan(shape.patches, len(softened)), strict=True):
            kept = tokens.seen[:, tokens.prefix :].sum(1) / (tokens.count() - tokens.prefix)
            parts.append((kept - left / shape.patches).square().mean())
        return {"ratio": self.weight * torch.stack(parts).mean()}

    def flops(self, n: int, shape: Shape) -> float:
        counts = [n, *self._plan(n, len(self._blocks(shape.depth)))]
        return sum(counts[:-1]) * 2.0 * sum(part.numel() for part in Predictor(shape.width).parameters() if part.dim() == 2)

    def _predicted(self, tokens: Tokens, signals: Signals | None) -> Tensor:
        """(B, N - prefix, 2) log-probabilities to be kept and to be dropped."""
        predictors: Any = read(signals, "learned", "dynamicvit", "its trained predictors")
        odds: Tensor = predictors[self.stage](tokens.features[:, tokens.prefix :], tokens.seen[:, tokens.prefix :])
        return odds

    def _blocks(self, depth: int) -> list[int]:
        return blocks_of("dynamicvit", self.locations, depth)

    def _plan(self, n: int, stages: int) -> list[int]:
        """Patches after each stage."""
        if self.keep is not None:
            return geometrically(n, Budget(self.keep).count(n), stages, halving=False)
        share = Fraction(str(self.ratio))
        return [max(1, int(share ** (stage + 1) * n)) for stage in range(stages)]


class Predictor(nn.Module):
    """x (B, N, D), seen (B, N) to (B, N, 2) log-probabilities, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.inward = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.outward = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, width // 4), nn.GELU(), nn.Linear(width // 4, 2)
        )

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = self.inward(x.float())
        own, common = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        common = (common * seen[..., None]).sum(1, keepdim=True) / seen.sum(1).clamp(min=1e-6)[:, None, None]
        out: Tensor = self.outward(torch.cat([own, common.expand(-1, x.shape[1], -1)], -1))
        return out.log_softmax(-1)
