"""SparseVLM: the words that matter to an image choose its tokens, and the best of the rest are recycled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..method import Budget, Method, Promise, Signals, check_keep, register
from ..needs import Need, RaterRank, TextAttention
from ..ops.budget import count
from ..ops.clustering import dpc_knn
from ..ops.merging import merge
from ..ops.selection import best_of_units
from ..tokens import Reduction, Tokens, gather
from ._common import best, check_layers, quota, read, score_of, stages

LAYERS = (Fraction(2, 32), Fraction(6, 32), Fraction(15, 32))
FIRST = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
SECOND = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}


@register(
    title="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    year=2024,
    source="arXiv:2410.04417",
    family="vlm",
    stage="layer",
    headline="54 % fewer FLOPs on LLaVA at 97 % of its accuracy",
)
@dataclass(frozen=True)
class SparseVLM(Method):
    """After some language-model layers keep the visual tokens that the relevant words of the prompt attended to there.

    Raters are the text tokens behind the image whose relevance, softmax over the text of V Tᵀ averaged over visual tokens, from
    the embeddings at the entrance, is above the mean. score (B, N) = attention of the raters to the visual tokens in that layer,
    averaged over heads and raters; the highest survive. With `recycle`, of the d tokens dropped the best floor(0.3 d) + 1 by
    score form floor(m / 10) + 1 clusters (m of them; DPC-KNN with as many neighbours as clusters), whose means stay too; later
    stages treat them as any token.

    `counts` survive each stage, recycled ones beyond them: (300, 200, 110) is the paper's setting "192", (303, 110, 36) "128",
    (238, 48, 26) "96" and (66, 30, 17) "64", which are presets. `keep` instead is what is left at the end, recycled tokens
    included (at most half of it), and the stages before it leave more in the proportions of `counts`. `layers` are those whose
    attention is read, and tokens go behind them; None means the paper's 2, 6, 15 of 32, scaled to the depth: in setting "192"
    without recycling 202.75 tokens enter a layer on average.

    With `rank` each stage finds its own count, in every image, from the rank r of the matrix of raters' attention to the image's
    V tokens: a number is the paper's share of what the rank calls redundant, V - floor(rank (V - r)) survive; a pair (scale,
    bias) is the first release's floor(scale r + bias), at most V - 1 unless r = V. Rows then differ in length and wait once a
    stage for the device to learn the longest. Later releases have the rank set to 0, which is the fixed `counts`.

    SparseVLM+ (the second release) is calibration="192+", "128+", "96+" or "64+": counts of its own, nothing recycled, positions
    as they were. With `unbiased` the raters' attention is first divided by the bias that rotary positions alone give it: ``b(p) =
    mean_f cos(p f)`` over the rotary frequencies f, p the distance of the two tokens, 1 at no distance. With `heads` only that
    many heads are averaged (14 there), those in which the raters attend most to the image after the division. What the release
    divides is attention after softmax, though it calls it logits; these have both signs, and would be turned round. Its b swings
    below zero at some distance (1707 at base 10000 and 128 channels); here it is at least 0.01.

    Differences from the release: a recycled token stands where its cluster's centre stood, not behind the survivors; ties between
    densities go to the lowest index instead of to noise. The first renumbers positions: that is positions="compact" of `apply`.
    """

    site = "layer"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{str(name): {"counts": counts} for name, counts in FIRST.items()},
        **{f"{name}+": {"counts": counts, "recycle": False, "unbiased": True, "heads": 14} for name, counts in SECOND.items()},
    }
    keep: int | float | None = None
    counts: tuple[int, ...] = (300, 200, 110)
    layers: tuple[int, ...] | None = None
    recycle: bool = True
    rank: float | tuple[float, float] | None = None
    unbiased: bool = False
    heads: int | None = None

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        for each in self.counts:
            check_keep(each, "each of counts")
            if isinstance(each, float):
                raise TypeError(f"counts={self.counts!r} must be whole numbers of tokens; a fraction is set with keep.")
        if not self.counts or list(self.counts) != sorted(self.counts, reverse=True):
            raise ValueError(f"counts must list tokens that never grow from stage to stage, got {self.counts!r}.")
        if self.rank is not None:
            self._check_rank()
        if self.heads is not None and (isinstance(self.heads, bool) or not isinstance(self.heads, int) or self.heads < 1):
            raise ValueError(f"heads={self.heads!r} must be a whole number of heads to average, or None for all.")
        check_layers(self.layers, len(self.counts))
        if self.layers is None and len(self.counts) != len(LAYERS):
            raise ValueError(f"counts={self.counts!r} names {len(self.counts)} stages; say with layers where they stand.")

    def _check_rank(self) -> None:
        if self.keep is not None:
            raise ValueError("rank finds the counts itself; leave keep out.")
        numbers = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        if any(isinstance(each, bool) or not isinstance(each, int | float) or not isfinite(each) for each in numbers):
            raise ValueError(f"rank must be a number or a pair (scale, bias), got {self.rank!r}.")
        if isinstance(self.rank, tuple) and (len(self.rank) != 2 or self.rank[0] <= 0):
            raise ValueError(f"rank as a pair is (scale, bias) with a scale above 0, got {self.rank!r}.")
        if not isinstance(self.rank, tuple) and not 0 <= self.rank <= 1:  # type: ignore[operator]
            raise ValueError(f"rank={self.rank!r} is a share of the redundant tokens and must lie in [0, 1].")

    def needs(self) -> dict[str, Need]:
        attention = TextAttention(unbiased=self.unbiased, strongest=self.heads)
        return {"attention": attention} | ({} if self.rank is None else {"rank": RaterRank()})

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        score = score_of(signals, "attention", "sparsevlm")
        if self.rank is not None:
            return self._by_rank(score, tokens, read(signals, "rank", "sparsevlm", "the rank of the raters' attention (B, 1)"))
        n, k = len(tokens), self._left(len(tokens))
        if k == n and tokens.mask is None:
            return Reduction.identity(len(tokens.features), n, tokens.device)
        if not self.recycle:
            return best(score, tokens, self.counts[-1] if self.keep is None else self.keep, signals)
        real = tokens.count()[:, None]
        if self.keep is None:
            stay = real.clamp(max=self.counts[-1])
            made = _clusters(real - stay)
        else:
            total = quota(signals, self.keep, real)
            made = _recycled(total, real)
            stay = total - made
        lost = n if tokens.mask is not None else n - self._survivors(n)
        return _sparse(score, tokens, stay, made, k, min(n, _candidates(lost)))

    def _by_rank(self, score: Tensor, tokens: Tokens, rank: Tensor) -> Reduction:
        real = tokens.count()[:, None]
        if isinstance(self.rank, tuple):
            stay = (rank * self.rank[0] + self.rank[1]).floor().long()
            stay = torch.where(rank >= real, real, torch.minimum(stay, real - 1))
        else:
            stay = real - ((real - rank).clamp(min=0) * self.rank).floor().long()
        stay = torch.minimum(stay.clamp(min=1), real)
        made = _clusters(real - stay) if self.recycle else torch.zeros_like(stay)
        longest = int((stay + made).max())  # the one wait for the device
        return _sparse(score, tokens, stay, made, longest, min(len(tokens), _candidates(len(tokens))), ragged=True)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        places = stages("sparsevlm", self.layers, LAYERS, depth, behind=1)
        if self.keep is None:
            made = [replace(self, counts=(each,), layers=(0,)) for each in self.counts]
        else:
            last, own = count(self.keep, n), self.counts[-1]
            plan = [min(n, round(Fraction(last * each, own))) for each in self.counts]
            made = [replace(self, keep=each, counts=(own,), layers=(0,)) for each in plan]
        at = dict(zip(places, made, strict=True))
        return [at.get(layer) for layer in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        if self.rank is not None:
            return Promise(n, exact=False)
        if self.keep is not None:
            return Promise(Budget(self.keep).count(n))
        for step in self.steps(n, depth):
            n = n if step is None else step._left(n)  # type: ignore[attr-defined]
        return Promise(n)

    def _survivors(self, n: int) -> int:
        """Tokens of n that one stage, the last, leaves as they are."""
        if self.keep is None:
            return min(n, self.counts[-1])
        total = count(self.keep, n)
        return total - (_recycled(total, n) if self.recycle else 0)

    def _left(self, n: int) -> int:
        """Tokens that one stage, the last, leaves of n."""
        if self.keep is not None:
            return count(self.keep, n)
        survive = self._survivors(n)
        return survive + (_clusters(n - survive) if self.recycle else 0)


def _candidates(dropped: Any) -> Any:
    """How many of so many dropped tokens are recycled; for ints and tensors, as what follows."""
    return 3 * dropped // 10 + 1


def _clusters(dropped: Any) -> Any:
    """How many clusters the recycled ones of so many dropped tokens form."""
    return (_candidates(dropped) // 10 + 1) * (dropped > 0)


def _recycled(total: Any, n: Any) -> Any:
    """How many of the `total` tokens that are left of n are clusters: each one lets one token more be dropped."""
    made = 0
    for _ in range(6):  # a cluster comes of 33 dropped tokens, so that this settles at once
        made = _clusters(n - total + made)
    half = total // 2
    return made - (made - half) * (made > half)


def _sparse(score: Tensor, tokens: Tokens, stay: Tensor, made: Tensor, k: int, most: int, ragged: bool = False) -> Reduction:
    """Keep the `stay` (B, 1) best, and `made` (B, 1) clusters of the best of the others, of which no row has more than `most`."""
    here, one = torch.arange(len(tokens), device=tokens.device), torch.zeros_like(tokens.origin)
    survive = best_of_units(score, one, stay, tokens.mask)
    dropped = tokens.real & ~survive
    some = best_of_units(score, one, _candidates(dropped.sum(1, keepdim=True)) * (made > 0), dropped)
    index = (~some).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    real = some.gather(1, index)
    centre = dpc_knn(gather(tokens.features, index), made, made, real)
    into = torch.where(survive, here, -1)
    target = torch.where(real, index.gather(1, centre.clamp(min=0)), into.gather(1, index))
    return merge(into.scatter(1, index, target), k, ragged=ragged or tokens.mask is not None)
