"""A method that leaves patches of its own choice in front of one block."""

from __future__ import annotations

from typing import Any

import torch

from jeton.method import Method, get
from jeton.tokens import Reduction, Tokens

BLOCK, KEPT = 2, 17


class Dropping(Method):
    """Leaves KEPT patches in front of one block, others in each picture."""

    card = get("random").card
    site, point, spec = "block", "before", "dropping"

    def __init__(self) -> None:
        self.kept = torch.empty(0)

    def reduce(self, tokens: Tokens, signals: Any = None) -> Reduction:
        batch, n = tokens.features.shape[:2]
        draw = torch.Generator().manual_seed(5)
        patches = [torch.randperm(n - tokens.prefix, generator=draw)[:KEPT].sort().values for _ in range(batch)]
        front = torch.arange(tokens.prefix)
        self.kept = torch.stack([torch.cat([front, own + tokens.prefix]) for own in patches])
        return Reduction.keep(self.kept, n, prefix=tokens.prefix)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return [self if at == BLOCK else None for at in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Any:
        return get("random").promise(n, depth)
