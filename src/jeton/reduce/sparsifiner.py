"""Sparsifiner: a low-rank guess of the attention map says which keys each query attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..learned import Learned, Shape
from ..method import Method, Promise, Signals, Unsupported, register
from ..needs import Need, Trained
from ..ops import attention
from ..ops.distillation import attention_mse
from ..tokens import Tokens
from ._common import check_ratio


@register(
    title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
    year=2023,
    source="arXiv:2303.13755",
    family="vit",
    stage="attention",
    training_free=False,
    headline="48 to 69 % fewer FLOPs in attention for at most 0.4 points of ImageNet accuracy",
)
@dataclass(frozen=True)
class Sparsifiner(Learned):
    """In every block each query attends to the ``ceil(keep N)`` of N keys that a small predictor thinks best; special tokens
    attend to all.

    With q, k (B, H, N, d) and n = N // `compress`: C = softmax(H^-1/2 (q Wq) (k Wk)ᵀ P), where Wq and Wk (d, d / 2) are shared by
    the heads and P (N, n) compresses the tokens; the map is guessed as C Uᵀ with a learned basis U (N, n). Of C only the `top`
    largest of a row count, of U the entries above `threshold` in size, by their absolute value. Then the softmax over those keys.

    Trained in two phases. "imitate": the model is frozen and attends to everything; the loss gains `weight` x squared distance of
    the signed guess from the model's own map (which is the teacher's as long as it is frozen), summed over a map and averaged
    over pictures, heads and blocks (the release sums over pictures and heads too). "adapt": masks act and carry no gradient, the
    model adapts, in the paper by cross entropy, KL and token distillation.

    Nothing gets faster: masks are dense, and the report counts attention in full and the predictors on top. `kept_flops` says
    what attention would cost if masked pairs were left out. On pictures of other sizes P and U are interpolated; where tokens
    have left (`evit(fuse=False) | sparsifiner`, the paper's variant with token pruning) those of the tokens that are left count.
    """

    site = "attention"
    point = "attention"
    keep: float = 0.25
    compress: int = 6
    top: int = 8
    threshold: float = 0.02
    weights: str | None = None
    phase: str = "imitate"
    weight: float = 0.01
    block: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.keep, "keep")
        for name in ("compress", "top"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}.")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must not be negative, got {self.threshold!r}.")
        if self.phase not in ("imitate", "adapt"):
            raise ValueError(f'phase must be "imitate" or "adapt", got {self.phase!r}.')

    def needs(self) -> dict[str, Need]:
        return {"learned": Trained()}

    def build(self, shape: Shape) -> nn.Module:
        return nn.ModuleList(Predictor(shape, self.compress) for _ in range(shape.depth))

    def fits(self, trained: Shape, shape: Shape) -> bool:
        same = (trained.width, trained.heads, trained.prefix) == (shape.width, shape.heads, shape.prefix)
        return same and trained.depth >= shape.depth

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return [replace(self, block=block) for block in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n)

    @torch.no_grad()
    def sight(self, query: Tensor, key: Tensor, tokens: Tokens, signals: Signals) -> Tensor | None:
        predictor = signals["learned"][self.block]
        if self.keep == 1 or (predictor.training and self.phase == "imitate"):
            return None
        guess = predictor(query, key, tokens, self.top, self.threshold)
        b, h, rows, n = guess.shape
        best = guess.argsort(dim=-1, descending=True, stable=True)[..., : self.budget(n)]
        seen = torch.zeros_like(guess, dtype=torch.bool).scatter(-1, best, True)
        return torch.cat([seen.new_ones(b, h, n - rows, n), seen], 2)

    def imitated(self, query: Tensor, key: Tensor, scale: float, tokens: Tokens, signals: Signals) -> Tensor | None:
        if self.phase != "imitate":
            return None
        own = attention.rows(query[:, :, tokens.prefix :].detach(), key.detach(), scale)
        guess = signals["learned"][self.block](query.detach(), key.detach(), tokens)
        return self.weight * attention_mse(guess, own, summed=True)

    def budget(self, n: int) -> int:
        """Keys that each query of n tokens attends to."""
        return math.ceil(round(self.keep * n, 9))

    def flops(self, n: int, shape: Shape) -> float:
        size, d = n + shape.prefix, shape.width // shape.heads
        rank, half = (shape.patches + shape.prefix) // self.compress, max(1, d // 2)
        each = 2 * 2 * size * d * half + 2 * size * half * rank * 2 + 2 * n * rank * size
        return float(shape.depth * shape.heads * each)

    def kept_flops(self, n: int, shape: Shape) -> tuple[float, float]:
        """FLOPs of scores and mixing in all blocks for pictures of n patches, with masked pairs left out and in full."""
        size = n + shape.prefix
        pairs = shape.prefix * size + n * self.budget(size)
        return tuple(4.0 * shape.depth * shape.width * count for count in (pairs, size**2))  # type: ignore[return-value]


class Predictor(nn.Module):
    """q, k (B, H, N, d) to the guessed attention (B, H, N - prefix, N) of all but the special tokens, in float32.

    Without `top` and `threshold` it is the signed guess that is trained."""

    def __init__(self, shape: Shape, compress: int) -> None:
        super().__init__()
        size, d = shape.patches + shape.prefix, shape.width // shape.heads
        half, rank = max(1, d // 2), max(1, size // compress)
        self.patches, self.scale = shape.patches, shape.heads**-0.5
        self.query, self.key = nn.Linear(d, half), nn.Linear(d, half)
        self.gather = nn.Parameter(nn.init.trunc_normal_(torch.empty(size, rank), std=0.02))
        self.basis = nn.Parameter(nn.init.trunc_normal_(torch.empty(size, rank), std=0.02))

    def forward(
        self, query: Tensor, key: Tensor, tokens: Tokens, top: int | None = None, threshold: float | None = None
    ) -> Tensor:
        inward, basis = self._for(self.gather, tokens), self._for(self.basis, tokens)
        if threshold is not None:
            basis = F.threshold(basis.abs(), threshold, 0.0)
        compressed = self.key(key.float()).mT @ inward[:, None]
        share = (self.scale * self.query(query[:, :, tokens.prefix :].float()) @ compressed).softmax(-1)
        if top is not None and top < share.shape[-1]:
            best = share.argsort(dim=-1, descending=True, stable=True)[..., :top]
            share = torch.zeros_like(share).scatter(-1, best, share.gather(-1, best))
        return share @ basis[:, None].mT

    def _for(self, table: Tensor, tokens: Tokens) -> Tensor:
        """Rows of a table (size, n) for the tokens: interpolated to the grid of another picture, picked where tokens left."""
        if tokens.mask is not None:
            raise Unsupported(
                "sparsifiner's predictors know where each token of a picture stands and take no padded pictures of different "
                "shapes; use it on an encoder with pictures of one size, e.g. CLIPVisionModel."
            )
        place, prefix = tokens.place, tokens.prefix
        grid = None if place is None else place.shape
        if grid is not None and grid[0] * grid[1] != self.patches:
            side = math.isqrt(self.patches)
            map = table[prefix:].T.reshape(1, -1, side, self.patches // side)
            rows = F.interpolate(map, size=grid, mode="bilinear", align_corners=False).flatten(2)[0].T
            table = torch.cat([table[:prefix], rows])
        return table[None] if tokens.index is None else table[tokens.index]
