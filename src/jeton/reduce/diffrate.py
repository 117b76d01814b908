"""DiffRate: how many tokens each block prunes and how many it merges, learned through the rate itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..learned import Learned, Shape, read
from ..method import Budget, Method, Promise, Signals, check_keep, register
from ..needs import Need
from ..ops.budget import count, geometrically
from ..ops.merging import merge
from ..ops.policy import ceil, least, straight_through
from ..ops.ranking import rank
from ..ops.similarity import cosine, normalise
from ..tokens import Reduction, Tokens, gather
from ._common import attention, check_ratio, check_score, quota, score_of

Size = TypeVar("Size", int, Tensor)


def _published() -> dict[str, dict[str, tuple[int, ...]]]:
    """The lists of the release, by model and billions of multiply-adds."""
    lines = [line.split() for line in _LISTS.strip().splitlines()]
    lists = [tuple(int(number) for number in line[-1].split(",")) for line in lines]
    return {line[0]: {"prune": a, "merge": b} for line, a, b in zip(lines[::2], lists[::2], lists[1::2], strict=True)}


_LISTS = """
deit-t-0.6 197,196,180,157,130,107,86,73,63,51,40,3
deit-t-0.6 197,187,167,139,114,90,76,66,57,45,37,3
deit-t-0.7 197,196,194,180,150,123,98,82,68,60,52,3
deit-t-0.7 197,196,192,158,133,103,88,72,64,58,49,3
deit-t-0.8 197,197,196,186,166,147,117,103,92,80,74,3
deit-t-0.8 197,196,190,172,154,125,107,96,84,78,70,3
deit-t-0.9 197,197,196,190,182,166,141,125,113,105,99,3
deit-t-0.9 197,196,194,188,172,147,129,115,107,103,96,3
deit-t-1.0 197,197,196,194,188,184,178,164,156,137,129,21
deit-t-1.0 197,197,196,190,186,154,148,156,145,135,125,21
deit-s-2.3 197,192,168,143,121,105,92,74,62,45,33,3
deit-s-2.3 197,180,156,127,109,98,80,66,52,37,31,3
deit-s-2.5 197,192,174,156,131,115,111,99,76,50,39,3
deit-s-2.5 197,186,160,133,119,107,96,82,66,43,37,3
deit-s-2.7 197,196,182,160,141,127,115,105,88,66,49,3
deit-s-2.7 197,188,170,147,131,119,109,96,76,54,45,3
deit-s-2.9 197,196,190,168,150,139,129,117,99,78,58,3
deit-s-2.9 197,194,176,156,141,133,121,107,88,64,56,3
deit-s-3.1 197,197,194,180,160,147,137,129,115,92,76,3
deit-s-3.1 197,196,186,164,150,141,133,121,103,78,68,3
deit-b-8.7 197,192,172,156,131,107,90,72,56,33,17,3
deit-b-8.7 197,178,162,141,115,96,78,60,47,21,13,3
deit-b-10.0 197,194,182,168,148,129,113,101,82,49,25,3
deit-b-10.0 197,186,174,156,137,117,105,90,66,31,19,3
deit-b-10.4 197,196,188,174,156,141,121,103,90,58,25,3
deit-b-10.4 197,190,184,164,145,131,107,94,74,31,21,3
deit-b-11.5 197,197,197,188,170,154,139,123,107,72,43,3
deit-b-11.5 197,197,192,178,158,145,127,111,94,50,35,3
deit-b-12.5 197,197,196,192,184,170,154,139,129,94,58,3
deit-b-12.5 197,196,194,190,176,160,145,131,115,68,47,3
mae-b-8.7 197,192,166,143,119,103,86,72,54,43,37,23
mae-b-8.7 197,176,150,127,107,92,76,58,47,41,23,23
mae-b-10.0 197,194,173,154,135,120,108,92,76,64,52,40
mae-b-10.0 197,181,160,141,122,116,95,80,67,60,40,40
mae-b-10.4 197,195,179,159,140,122,105,100,89,71,56,45
mae-b-10.4 197,187,166,145,125,109,102,97,75,64,45,45
mae-b-11.5 197,196,182,172,162,147,131,109,101,94,70,49
mae-b-11.5 197,192,178,164,150,133,115,101,96,82,49,49
mae-l-31.0 197,195,188,179,168,157,146,143,131,121,111,102,93,85,76,70,61,53,47,35,31,26,21,14
mae-l-31.0 197,191,184,172,161,151,145,135,125,117,106,96,89,80,72,64,54,50,40,27,27,23,14,14
mae-l-34.7 197,195,192,189,181,170,161,160,149,140,128,118,109,95,91,82,73,68,58,54,43,38,29,18
mae-l-34.7 197,193,190,185,173,164,159,154,142,137,121,111,103,97,82,76,67,61,58,48,35,32,18,18
mae-l-38.5 197,197,195,190,187,183,179,171,164,159,151,143,137,114,106,89,88,85,76,57,47,53,32,24
mae-l-38.5 197,196,193,189,183,180,175,167,161,158,152,134,120,110,97,91,87,83,65,47,54,34,24,24
mae-l-42.3 197,197,197,195,194,193,191,187,182,180,173,149,142,134,125,121,111,106,91,87,77,39,38,32
mae-l-42.3 197,197,196,194,193,192,187,183,181,173,154,146,137,127,123,114,105,98,87,75,43,45,32,32
mae-l-46.1 197,197,197,196,194,192,191,188,185,181,170,157,154,146,143,139,128,125,111,100,92,83,69,60
mae-l-46.1 197,197,196,195,193,191,189,187,183,176,162,155,148,145,139,133,127,118,104,95,86,71,60,60
mae-h-83.7 257,255,246,227,200,178,168,159,155,145,140,139,128,119,114,109,107,100,101,102,117,104,103,97,97,102,95,90,82,83,74,56
mae-h-83.7 257,252,240,212,186,172,160,163,148,142,138,132,118,114,111,108,103,102,105,106,109,105,108,99,96,96,95,86,79,77,56,56
mae-h-93.2 257,257,257,257,248,250,240,239,229,209,160,159,149,111,109,106,104,106,101,104,85,96,88,93,94,88,88,91,81,78,76,75
mae-h-93.2 257,257,257,249,242,241,239,229,209,203,159,150,124,107,107,101,100,101,104,89,101,88,89,88,91,86,86,83,78,78,75,75
mae-h-103.4 257,256,255,251,245,235,204,197,194,189,185,177,169,160,152,144,146,139,139,136,135,133,131,128,126,126,124,121,114,96,82,53
mae-h-103.4 257,256,253,247,238,211,201,195,193,185,179,171,162,154,150,145,141,138,137,135,134,133,130,127,125,125,122,114,101,90,53,53
mae-h-124.5 257,256,252,248,238,237,220,214,198,186,189,191,191,185,188,186,186,183,183,182,182,183,183,181,186,182,182,180,178,180,161,136
mae-h-124.5 257,254,251,244,238,223,221,203,194,192,191,190,188,184,188,185,184,183,185,183,183,185,183,183,185,183,179,167,177,133,136,136
"""  # noqa: E501


@register(
    title="DiffRate: Differentiable Compression Rate for Efficient Vision Transformers",
    year=2023,
    source="arXiv:2305.17997",
    family="vit",
    stage="block",
    training_free=False,
    headline="ViT-H 1.5 times as fast with 40 % fewer FLOPs for 0.16 points of ImageNet accuracy, without fine-tuning",
)
@dataclass(frozen=True)
class DiffRate(Learned):
    """In every block, between attention and MLP, sort patches by the class token's attention, prune the last and merge the next.

    Of n patches the first p by the class token's attention in the same block (mean over heads) stay; of these, each behind the
    first m merges into the most similar one among the first m, by cosine of the features. A merged token is the plain mean of its
    group, and its size the destination's plus each source's times its similarity (a negative one counts 0; the release takes it
    as it is). With `proportional`, log(size) is added to the attention logits of a key.

    `prune` and `merge` list for every block how many tokens it keeps, the class token counted, as published: ``presets`` are the
    release's lists, such as ``calibration="deit-s-2.9"``. They are what is learned: `weights` names rates that were trained,
    which are replayed as such lists. Lists that grow are followed as far as tokens are left. Without any, every block but the
    first keeps the same `ratio` of its patches, or as many as it takes to leave `keep`; of those that go, the `pruned` share is
    pruned.

    In training each block but the first (and, with `spare_last`, the last) has two rates: logits over the candidates
    k = P, P - `granularity`, ..., above 0, of P patches, with p = softmax. It keeps K = ceil(sum p k) tokens, rounded with a
    straight-through gradient, and the token of rank i survives with the probability sum of p over k > i: the hard mask is 1 up to
    K, its gradient is that of this probability. The loss of the task gains `weight` (F / F0 - `target`)², where F are the
    multiply-adds ``sum of 4 N C² + 2 N² C + 8 N' C²`` with N' = min(N, kept), whose gradient reaches every rate alike, and F0
    those of the whole model; the published 5 per (10⁹)² is 106 in shares of DeiT-S. The encoder is to be frozen.
    """

    site = "block"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = _published()
    prune: tuple[int, ...] | None = None
    merge: tuple[int, ...] | None = None
    ratio: float = 0.9
    keep: int | float | None = None
    pruned: float = 0.5
    score: str = "class"
    proportional: bool = True
    weights: str | None = None
    target: float = 0.63
    weight: float = 106.0
    granularity: int = 4
    spare_last: bool = False
    block: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio)
        check_score(self.score)
        if self.keep is not None:
            check_keep(self.keep)
        if not 0 <= self.pruned <= 1:
            raise ValueError(f"pruned must be a share in [0, 1], got {self.pruned!r}.")
        if not 0 < self.target <= 1:
            raise ValueError(f"target is the share of multiply-adds to be left, in (0, 1], got {self.target!r}.")
        if isinstance(self.granularity, bool) or not isinstance(self.granularity, int) or self.granularity < 1:
            raise ValueError(f"granularity must be a positive whole number, got {self.granularity!r}.")
        self._check_lists()

    def _check_lists(self) -> None:
        if (self.prune is None) != (self.merge is None):
            raise ValueError("prune and merge come together: the tokens each block keeps after pruning and after merging.")
        if self.prune is None or self.merge is None:
            return
        for name in ("prune", "merge"):
            kept = tuple(getattr(self, name))
            if any(isinstance(k, bool) or not isinstance(k, int) or k < 2 for k in kept):
                raise ValueError(f"{name} lists tokens kept per block, the class token and at least one patch, got {kept!r}.")
            object.__setattr__(self, name, kept)
        if len(self.prune) != len(self.merge):
            raise ValueError(f"prune and merge must list as many blocks, got {len(self.prune)} and {len(self.merge)}.")
        if self.keep is not None and self.block is None:
            raise ValueError("prune and merge say what is left, and keep says it too; give one of them.")

    # -- at inference ----------------------------------------------------------------------------------------------

    def needs(self) -> dict[str, Need]:
        return {"attention": attention(self.score, layer=None)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        b, n, prefix, mask = len(tokens.features), len(tokens), tokens.prefix, tokens.mask
        p, m = self._counts(n - prefix)
        if m == n - prefix and mask is None:
            return Reduction.identity(b, n, tokens.device, prefix)
        place = self._places(tokens, signals)
        here = torch.arange(n, device=tokens.device).expand(b, n)
        order = place.masked_fill(here < prefix, n).argsort(dim=1)  # patches by rank, special tokens last
        best = order[:, :m]
        if mask is None:
            stays, first, closed = here.new_full((b, 1), p), here.new_full((b, 1), m), None
            others = order[:, m:p]
        else:  # each row has numbers of its own, and what merges in one may be a destination in another
            real = tokens.count()[:, None] - prefix
            stays, first = self._counts(real, quota(signals, m if self.keep is None else self.keep, real))
            others, closed = order[:, :p], here[:, None, :m] >= first[:, None]
        like = cosine(gather(tokens.features, others), gather(tokens.features, best))
        near, at = (like if closed is None else like.masked_fill(closed, -torch.inf)).max(2)
        goes = (place >= first) & (place < stays)
        into = torch.where(goes, here.scatter(1, others, best.gather(1, at)), here)
        close = torch.where(goes, near.new_ones(b, n).scatter(1, others, near.clamp(min=0)), 1.0)
        gone = place >= stays
        into = into.masked_fill(gone, -1)
        step = merge(into, prefix + m, prefix=prefix, ragged=mask is not None)
        grown = (tokens.weight * close).masked_fill(gone, 0)
        sizes = grown.new_zeros(b, step.k + 1).scatter_add(1, step.assign.masked_fill(step.assign < 0, step.k), grown)
        return replace(step, sizes=sizes[:, : step.k])

    def steps(self, n: int, depth: int) -> list[Method | None]:
        lists, plan = self.lists(depth), [n, *self.plan(n, depth)]
        steps: list[Method | None] = []
        for block, (before, after) in enumerate(pairwise(plan)):
            kept = None if lists is None else tuple((each[block],) for each in lists)
            prune, merged = (None, None) if kept is None else kept
            step = replace(self, keep=after, prune=prune, merge=merged, weights=None, block=block)
            steps.append(step if after < before else None)
        return steps

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self.plan(n, depth)[-1])

    def _counts(self, n: Size, left: Size | None = None) -> tuple[Size, Size]:
        """How many of n patches stay, and how many of them do not merge, in one block."""
        if self.prune is not None and self.merge is not None:
            p = _min(n, self.prune[0] - 1)
            return p, _min(p, self.merge[0] - 1)
        if left is None:
            assert isinstance(n, int)
            left = count(self.keep if self.keep is not None else self._after(n), n)
        share = Fraction(str(self.pruned))
        return n - (n - left) * share.numerator // share.denominator, left

    def _after(self, n: int) -> int:
        share = Fraction(str(self.ratio))
        return max(1, round(n * share))

    def plan(self, n: int, depth: int) -> list[int]:
        """Patches after each block."""
        lists = self.lists(depth)
        if lists is None and self.keep is not None:
            later = geometrically(n, Budget(self.keep).count(n), max(1, depth - 1), halving=False)
            return [n, *later] if depth > 1 else later
        plan = []
        for block in range(depth):
            if lists is not None:
                n = min(n, lists[0][block] - 1, lists[1][block] - 1)
            elif block > 0 or depth == 1:
                n = self._after(n)
            plan.append(n)
        return plan

    def lists(self, depth: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        found = None
        if self.prune is not None and self.merge is not None:
            found = self.prune, self.merge
        elif self.weights is not None:
            found = _trained(self)
        if found is not None and len(found[0]) != depth:
            raise ValueError(
                f"diffrate was given lists for {len(found[0])} blocks, but the encoder has {depth}; take the lists of a model of "
                f"that depth, or keep= for a schedule that fits any."
            )
        return found

    def _places(self, tokens: Tokens, signals: Signals | None) -> Tensor:
        """(B, N) rank of every patch by attention, from 0; special tokens have -1."""
        score = score_of(signals, "attention", "diffrate")
        seen = score.masked_fill(tokens.seen == 0, -torch.inf)
        seen[:, : tokens.prefix] = torch.inf
        return (rank(seen) - tokens.prefix).clamp(min=-1)

    # -- in training -----------------------------------------------------------------------------------------------

    def build(self, shape: Shape) -> nn.Module:
        spared = {0, shape.depth - 1} if self.spare_last else {0}
        return Rates(shape.depth, shape.patches, self.granularity, spared)

    def lessons(self, n: int, depth: int) -> list[Method | None]:
        return [replace(self, block=block) for block in range(depth)]

    def soften(self, tokens: Tokens, signals: Signals) -> Tokens:
        assert self.block is not None
        rates, prefix, seen = signals["learned"], tokens.prefix, tokens.seen
        place = self._places(tokens, signals)
        last = (seen[:, prefix:] > 0).sum(1, keepdim=True)
        policy, (p, m) = seen, rates.kept(self.block)
        mid = torch.minimum(last, p.detach().long())
        patch = torch.arange(len(tokens), device=tokens.device) >= prefix
        for logits, kept, before in ((rates.prune, p, last), (rates.merge, m, mid)):
            alive = rates.survival(logits[self.block], len(tokens) - prefix)
            soft = torch.where(patch, alive[place.clamp(min=0)], 1.0)
            hard = ((place < kept.detach()) | (place >= before)).float()  # what is masked already has no say in the gradient
            policy = policy * torch.where(kept.detach() < before, straight_through(hard, soft), 1.0)
        features, size = self._merged(tokens, place, m.detach(), mid)
        return replace(tokens, features=features, size=size, policy=policy)

    def _merged(self, tokens: Tokens, place: Tensor, m: Tensor, mid: Tensor) -> tuple[Tensor, Tensor]:
        """Patches of rank m to mid added to their most similar one before, all tokens in their places."""
        with torch.no_grad():
            unit = normalise(tokens.features)
            goal, source = (place >= 0) & (place < m), (place >= m) & (place < mid)
            near, at = (unit @ unit.mT).masked_fill(~goal[:, None], -torch.inf).max(2)
            here = torch.arange(len(tokens), device=tokens.device)
            into = torch.where(source, at, here)
            near = torch.where(source, near.clamp(min=0), 1.0)
        x = tokens.features
        total = x.scatter_add(1, into[..., None].expand_as(x), x * source[..., None])
        group = torch.ones_like(near).scatter_add(1, into, source.float())
        size = tokens.weight.scatter_add(1, into, tokens.weight * near * source)
        return total / group[..., None], size

    def losses(self, softened: list[Tokens], learned: nn.Module | None, shape: Shape) -> dict[str, Tensor]:
        """The squared distance of the multiply-adds from the target, as shares of the whole model's."""
        assert isinstance(learned, Rates)
        kept = [tuple(k + 1 for k in learned.kept(block)) for block in range(shape.depth)]
        full = multiply_adds([], [], shape.width, shape.patches + 1, shape.depth)
        ran = multiply_adds([p for p, _ in kept], [m for _, m in kept], shape.width, shape.patches + 1, shape.depth)
        return {"rate": self.weight * (ran / full - self.target) ** 2}


def _min(a: Size, b: int) -> Size:
    return a.clamp(max=b) if isinstance(a, Tensor) else min(a, b)


def _trained(method: DiffRate) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lists that trained rates stand for."""
    state, shape = read(method)
    rates = Rates(shape.depth, shape.patches, 1, ())
    rates.candidates, rates.spared = state["candidates"], state["spared"]
    rates.prune, rates.merge = nn.Parameter(state["prune"]), nn.Parameter(state["merge"])
    return rates.lists()


class Rates(nn.Module):
    """Logits over how many patches each block keeps, when pruning and when merging; blocks in `spared` keep all."""

    candidates: Tensor
    spared: Tensor

    def __init__(self, depth: int, patches: int, granularity: int, spared: Iterable[int]) -> None:
        super().__init__()
        self.register_buffer("candidates", torch.arange(patches, 0, -granularity).float())
        self.register_buffer("spared", torch.tensor([block in spared for block in range(depth)]))
        self.prune = nn.Parameter(torch.zeros(depth, len(self.candidates)))
        self.merge = nn.Parameter(torch.zeros(depth, len(self.candidates)))

    def kept(self, block: int) -> tuple[Tensor, Tensor]:
        """Patches left after pruning and after merging, whole numbers with the gradient of the expected ones."""
        found = []
        for logits in (self.prune[block], self.merge[block]):
            expected = ceil((logits.softmax(0) * self.candidates).sum())
            found.append(torch.where(self.spared[block], self.candidates[0], expected))
        return found[0], found[1]

    def survival(self, logits: Tensor, n: int) -> Tensor:
        """(n,) the probability with which the patch of each rank stays."""
        longer = self.candidates > torch.arange(n, device=logits.device)[:, None]
        return (logits.softmax(0) * longer).sum(1)

    @torch.no_grad()
    def lists(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What `prune` and `merge` of the method are, the class token counted."""
        kept = [self.kept(block) for block in range(len(self.prune))]
        return tuple(int(p) + 1 for p, _ in kept), tuple(int(m) + 1 for _, m in kept)


def multiply_adds(prune: Sequence[Any], merge: Sequence[Any], width: int, tokens: int, depth: int) -> Tensor:
    """Multiply-adds of the blocks of a vision transformer whose MLP is 4 times as wide, when each block keeps so many tokens (all
    where the lists are empty), the class token counted. The published figures add ``tokens width 3 P²`` for the patches of P x P
    pixels and ``width classes`` for the head."""
    total, n = torch.zeros((), dtype=torch.float64), torch.tensor(float(tokens), dtype=torch.float64)
    for block in range(depth):
        total = total + 4 * n * width**2 + 2 * n * n * width
        if prune:
            n = least(n, *(torch.as_tensor(kept[block], dtype=torch.float64) for kept in (prune, merge)))
        total = total + 8 * n * width**2
    return total
