"""Whether language-model layers agree on which visual tokens matter: what a schedule found by layer rests on (`g-search`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import apply
from ..method import Method, Promise, Signals
from ..needs import Need
from ..ops.ranking import spearman
from ..reduce.g_search import GSearch
from ..tokens import Reduction, Tokens


@torch.no_grad()
def rankings(model: nn.Module, batches: Iterable[Mapping[str, Any]], queries: str = "text") -> Tensor:
    """(L - 1, L - 1) Spearman's correlation between the layers of a vision-language model of the order in which they attend to an
    image's tokens, averaged over the images of all batches. Nothing leaves.

    Row and column l: attention in layer l, from `queries` as in `g-search`, by which tokens would be dropped in front of layer
    l + 1. The last layer's is not read, as nothing stands behind it. Images of a single token, which has no order, are left out.
    """
    look = _Look(GSearch(queries=queries))
    with apply(model, look):
        for inputs in batches:
            model(**inputs, use_cache=False)
            look.close()
    if not look.found:
        raise ValueError("no image with an order of tokens was found; pass input_ids with image tokens and the pictures' pixels.")
    return torch.stack(look.found).mean(0)


class _Look(Method):
    """Reads the score in front of every layer and keeps everything."""

    card = GSearch.card
    site = "layer"

    def __init__(self, inner: GSearch) -> None:
        self.inner = inner
        self.scores: list[tuple[Tensor, Tensor]] = []
        self.found: list[Tensor] = []

    @property
    def spec(self) -> str:
        return f"rankings(queries={self.inner.queries!r})"

    def needs(self) -> dict[str, Need]:
        return self.inner.needs()

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        assert signals is not None
        score = signals["attention"]
        self.scores.append((score.mean(1) if score.dim() == 3 else score, tokens.real))
        return Reduction.identity(len(tokens.features), len(tokens), tokens.device)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return [None, *[self] * (depth - 1)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n)

    def close(self) -> None:
        """A batch has run: correlate what its layers said of every image."""
        if self.scores:
            real = self.scores[0][1]
            for image, scores in enumerate(torch.stack([score for score, _ in self.scores], 1)):
                own = scores[:, real[image]]
                if own.shape[1] > 1:
                    self.found.append(spearman(own))
        self.scores.clear()
