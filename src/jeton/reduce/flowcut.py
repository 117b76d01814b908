"""FlowCut: cut inside the encoder, little by little, by a score that accumulates over its blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..method import (
    Budget,
    ClassAttention,
    ClassSimilarity,
    LastAttention,
    LastSimilarity,
    LayerValues,
    MeanAttention,
    Method,
    Need,
    Promise,
    Signals,
    Values,
    check_keep,
    register,
)
from ..ops.budget import count
from ..ops.entropy import entropy_count
from ..ops.ranking import rank
from ..ops.selection import pack, top_k
from ..tokens import Reduction, Tokens
from ._common import best, check_layers, check_score, quota, read, score_of

CROPS = 0.5  # of the budget of an any-resolution image, each of its crops keeps this much
PICTURES = 5  # thumbnail and crops of the published any-resolution setting: turns a share of the image into a share of a crop


@register(
    title="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
    year=2025,
    source="arXiv:2505.19536",
    family="vlm",
    stage="block",
    headline="+1.6 % over the best before it on LLaVA-1.5-7B at 88.9 % reduction, prefill 3.2 times faster",
)
@dataclass(frozen=True)
class FlowCut(Method):
    """Behind every second encoder block, cut the patches of lowest running score; how many follows the entropy of attention.

    In each block a (B, N) is the class token's attention, averaged over heads, and c (B, N) the softmax of the inner products of
    the class token's value with all values, averaged over heads, both rescaled to sum 1 over the patches; u (B, N) is the L1 norm
    of the head-mean value; s = (a + c) u. The running score is S <- (1 - momentum) S + momentum s, s at first. Of depth L (blocks
    that feed what is handed on) block l has R = L - 2 - l to go. Where R is a multiple of `every`, the
    ``round((N - T) / sqrt(R) (1 - (H(a) / ln N)^2))`` lowest by S go, N patches now, T = `keep`, H the entropy of a; never below
    T; at R = 0 straight down to T. Each picture has its own count, and shorter ones are padded and masked: the release takes the
    largest cut of the batch, and so does `parity`. A block that cuts waits for the device once, to learn the longest row.

    `score` "received", for encoders without a class token: a is the attention of the mean query, and s = a u, as released for
    Qwen2-VL. There the release cuts single patches in front of the merger of 2x2 patches, which then mixes strangers; here
    `where="output"` drops whole cells of what the encoder hands on, once, by s of the last block, each signal averaged over the
    patches of a cell. That is the form for encoders that pack all pictures into one sequence.

    `layer` adds the second cut that is published for any-resolution models (layer=1): each crop keeps half of the image's budget
    (of a share, 5/2 of it, as with the published thumbnail and four crops: it rounds twice and counts padding that the model cuts
    away), newlines go, and behind that language-model layer the best `keep` tokens of the image stay, by the same score with the
    prompt's last token in place of the class token, over the visual tokens alone and with scaled products of values. The release
    renumbers positions: positions="compact" of `apply`.

    Alone, reduce() cuts once, to `keep`.
    """

    site = "block"
    point = "after"
    keep: int | float = 128
    every: int = 2
    momentum: float = 0.5
    score: str = "class"
    where: str = "blocks"
    layer: int | None = None
    parity: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_score(self.score)
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every={self.every!r} must be a number of blocks, 1 or more.")
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {self.momentum!r}.")
        if self.where not in ("blocks", "output"):
            raise ValueError(f'where must be "blocks" or "output", got {self.where!r}.')
        if self.layer is not None:
            check_layers((self.layer,))
            if self.where == "output":
                raise ValueError('where="output" leaves `keep` tokens already, so layer has nothing to cut; set one of the two.')

    def needs(self) -> dict[str, Need]:
        return _needs(self.score, None if self.where == "blocks" else -1)

    def parts(self) -> tuple[Method, ...]:
        if self.layer is None and self.where == "blocks":
            return (self,)
        if self.layer is None:
            return (_Output(self.keep, self.score),)
        if isinstance(self.keep, int):
            return (_Blocks(None, max(1, int(self.keep * CROPS)), self._step), _Second(self.keep, self.layer))
        crop = min(1.0, self.keep * PICTURES * CROPS)
        return (_Blocks(crop, crop, self._step), _Second(self.keep / crop, self.layer))

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        return self._step.reduce(tokens, signals)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return self._step.plan(n, count(self.keep, n), depth)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep).count(n), exact=self.layer is None)

    @property
    def _step(self) -> _Step:
        return _Step(self.keep, 0, self.every, self.momentum, self.score, self.parity)


@dataclass(frozen=True)
class _Blocks(Method):
    """The cuts in the encoder where something follows. keep: the budget of one crop, None where it is capped by its patches."""

    site = "block"
    point = "after"
    keep: float | None
    last: int | float
    step: _Step

    def needs(self) -> dict[str, Need]:
        return self.step.needs()

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return self.step.plan(n, count(self.last, n), depth)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.last, n))


@dataclass(frozen=True)
class _Step(Method):
    """One block. keep: T. remaining: R where something is cut, None where the score only grows."""

    site = "block"
    point = "after"
    keep: int | float
    remaining: int | None
    every: int
    momentum: float
    score: str
    parity: bool

    def needs(self) -> dict[str, Need]:
        return _needs(self.score, None)

    def plan(self, n: int, target: int, depth: int) -> list[Method | None]:
        """The step of each block, down to `target` patches of n."""
        last = max(0, depth - 2)
        if target == n:
            return [None] * depth
        left = [last - block for block in range(last + 1)]
        steps = [replace(self, keep=target, remaining=r if r % self.every == 0 else None) for r in left]
        return [*steps, *[None] * (depth - last - 1)]

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        batch, n, _ = tokens.features.shape
        prefix, k = tokens.prefix, count(self.keep, n - tokens.prefix)
        if k == n - prefix and tokens.mask is None:
            return Reduction.identity(batch, n, tokens.device, prefix)
        share, score = _scored(tokens, signals, self.score)
        if tokens.score is not None:
            score = (1 - self.momentum) * tokens.score + self.momentum * score
        if self.remaining is None:
            return replace(Reduction.identity(batch, n, tokens.device, prefix), score=score)
        real = tokens.count()[:, None] - prefix
        left, ragged = quota(signals, self.keep, real), tokens.mask is not None
        if self.remaining:
            cut = entropy_count(share, real, left, self.remaining)
            left = torch.maximum(real - (cut.amax() if self.parity else cut), left)
            least, k = torch.stack([left.amin(), left.amax()]).tolist()  # the only way to a shorter sequence
            if k == n - prefix and least == k:
                return replace(Reduction.identity(batch, n, tokens.device, prefix), score=score)
            ragged = ragged or least < k
        shown = score.masked_fill(~tokens.real, -torch.inf)
        shown[:, :prefix] = torch.inf
        step = pack(tokens.real & (rank(shown) < prefix + left), prefix + k, ragged, prefix)
        return replace(step, score=score.gather(1, step.index))

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.keep, n), exact=self.remaining == 0)


@dataclass(frozen=True)
class _Output(Method):
    """One cut of what the encoder hands on."""

    site = "encoder"
    keep: int | float
    score: str

    def needs(self) -> dict[str, Need]:
        return _needs(self.score, -1)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        return top_k(_scored(tokens, signals, self.score)[1], self.keep, tokens.mask, tokens.place)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.keep, n))


@dataclass(frozen=True)
class _Second(Method):
    """The cut behind a language-model layer."""

    site = "layer"
    newlines = "drop"
    keep: int | float
    layer: int

    def needs(self) -> dict[str, Need]:
        return {"attention": LastAttention(), "similarity": LastSimilarity(), "values": LayerValues()}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        if tokens.mask is None and count(self.keep, len(tokens)) == len(tokens):
            return Reduction.identity(len(tokens.features), len(tokens), tokens.device)
        # softmax over all keys, rescaled head by head: softmax over the visual tokens alone
        over = {name: _rescaled(read(signals, name, "flowcut", _READS), tokens) for name in ("attention", "similarity")}
        return best(_scored(tokens, {**(signals or {}), **over}, "class")[1], tokens, self.keep, signals)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        if not self.layer + 1 < depth:
            raise ValueError(f"flowcut cannot cut behind layer {self.layer} of {depth}; layers 0 to {depth - 2} are possible.")
        return [self if at == self.layer + 1 else None for at in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.keep, n))


_READS = "attention, similarity of values (B, heads, N) and values (B, N, d)"


def _needs(score: str, layer: int | None) -> dict[str, Need]:
    if score == "received":
        return {"attention": MeanAttention(layer), "values": Values(layer)}
    return {"attention": ClassAttention(layer), "similarity": ClassSimilarity(layer), "values": Values(layer)}


def _scored(tokens: Tokens, signals: Signals | None, score: str) -> tuple[Tensor, Tensor]:
    """a and s, both (B, N) float32, zero at special tokens and padding."""
    seen = a = _rescaled(score_of(signals, "attention", "flowcut"), tokens)
    if score == "class":
        seen = a + _rescaled(score_of(signals, "similarity", "flowcut"), tokens)
    size = read(signals, "values", "flowcut", _READS).float().abs().sum(2)
    return a, seen * size.masked_fill(~tokens.real, 0)


def _rescaled(rows: Tensor, tokens: Tokens) -> Tensor:
    """Rows (B, N) or (B, H, N) that sum to 1 over the patches."""
    patch = tokens.real.clone()
    patch[:, : tokens.prefix] = False
    rows = rows.float().masked_fill(~(patch if rows.dim() == 2 else patch[:, None]), 0)
    return rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


for _part in (_Blocks, _Step, _Output, _Second):
    _part.card = FlowCut.card
