"""DyMU: merge as much as a picture allows, and let the language model attend as if nothing had been merged."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..method import Budget, Keys, Method, Need, Promise, Signals, check_keep, register
from ..ops.budget import evenly, linearly
from ..ops.matching import Pairs, merge_pairs
from ..ops.ranking import rank
from ..tokens import Reduction, Tokens
from ._common import merge_by_parity, parity_pairs

PRESETS = {72: 72 / 576, 192: 192 / 576, 384: 384 / 576, 480: 480 / 576}  # published mean outputs of 576 patches, as shares
SCHEDULES = ("even", "linear", "reverse-linear")


@register(
    title="DyMU: Dynamic Merging and Virtual Unmerging for Efficient Variable-Length VLMs",
    year=2025,
    source="arXiv:2504.17040",
    family="vlm",
    stage="block",
    headline="32 to 85 % fewer visual tokens at comparable performance",
)
@dataclass(frozen=True)
class DyMU(Method):
    """In every encoder block, between attention and MLP, merge what is similar enough; undo it virtually in the language model.

    Merging: ToMe's matching. Tokens at even places of the sequence send, those at odd places receive; S = cos of the attention
    keys, averaged over heads (B, N, d); each sender has an edge to its best receiver, and every edge with S > `thresholds`[l]
    of block l merges into the size-weighted mean. The class token takes no part, and a token of size s counts s times as a key
    in later blocks. Simple pictures thus end with fewer tokens; rows differ in length, are padded and masked, and each block
    waits once for the device to learn the longest.

    Thresholds are fitted on pictures (`calibrating`, and `jeton.engine.calibrate` which runs it): block l has r_l merges a
    picture to give, the best r_l · B edges of a batch merge wherever they are, and the similarity of the first edge left, at
    least 0, is the batch's threshold; its mean over batches is the block's. The r_l lead from all patches to `keep` by
    `schedule`: "even" (the first blocks take the remainder), "linear" (falling to none) or "reverse-linear". `PRESETS` has the
    published budgets as shares. Without thresholds each picture makes just these r_l merges, so that exactly `keep` are left.

    Unmerging (`unmerge`): attention in the language model is that of the full prompt, each merged token standing at all places of
    those it was merged from, and the results for one token are averaged, M their 0/1 map: f' = (MᵀM)⁻¹ Mᵀ f. In the first layer
    this is exactly what the full model computes on the merged embeddings repeated; later layers only resemble it. Projections and
    MLPs run on the merged tokens; attention costs what it costs without merging, and its score products are not reduced at all
    (the paper's exact trigonometric form, in `jeton.ops.rotation`, trades them for n² d/2 numbers a head). The release caches
    keys and values at full length; here the cache holds merged ones and is as short as the merged prompt. Without `unmerge` a
    merged token is one token at the place of its representative.

    Released batches add 1e-4 to all sizes; not so here. Alone, reduce() merges to `keep`, or once by a single threshold; without
    keys as a signal it compares the features.
    """

    site = "block"
    proportional = True
    keep: int | float = PRESETS[192]
    schedule: str = "even"
    thresholds: tuple[float, ...] | None = None
    unmerge: bool = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.schedule not in SCHEDULES:
            raise ValueError(f'schedule must be "even", "linear" or "reverse-linear", got {self.schedule!r}.')
        if self.thresholds is None:
            return
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        numbers = all(isinstance(t, int | float) and not isinstance(t, bool) and t == t for t in self.thresholds)
        if not self.thresholds or not numbers:
            raise ValueError(f"thresholds must list one cosine for each encoder block, got {self.thresholds!r}.")

    @property
    def virtual(self) -> bool:  # type: ignore[override]
        return self.unmerge

    def needs(self) -> dict[str, Need]:
        return {"keys": Keys(layer=None)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        if self.thresholds is None:
            return merge_by_parity(tokens, self.keep, signals)
        if len(self.thresholds) > 1:
            raise ValueError(
                f"reduce() is one merging, but there are {len(self.thresholds)} thresholds; give one, or use steps()."
            )
        return _Threshold(self.thresholds[0]).reduce(tokens, signals)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        if self.thresholds is None:
            return [replace(self, keep=b) if b < a else None for a, b in pairwise([n, *self.plan(n, depth)])]
        if len(self.thresholds) < depth:
            raise ValueError(
                f"dymu has thresholds for {len(self.thresholds)} blocks, but the encoder has {depth}; calibrate on this encoder."
            )
        return [_Threshold(threshold) for threshold in self.thresholds[:depth]]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n, exact=False) if self.thresholds is not None else Promise(self.plan(n, depth)[-1])

    def plan(self, n: int, depth: int) -> list[int]:
        """Patches after each block, of a picture of n; with thresholds their mean on the pictures they were fitted on."""
        k = Budget(self.keep).count(n)
        return evenly(n, k, depth) if self.schedule == "even" else linearly(n, k, depth, self.schedule == "reverse-linear")

    def calibrating(self) -> Calibration:
        """This method while its thresholds are being fitted: apply it to a model, show it pictures, then ask for `fitted`."""
        return Calibration(replace(self, thresholds=None))


class Calibration(Method):
    """Merges the best edges of each batch, and keeps the similarity of the first one left over, block by block."""

    card = DyMU.card
    site = "block"
    proportional = True

    def __init__(self, method: DyMU) -> None:
        self.method, self.keep = method, method.keep
        self.seen: dict[int, list[Tensor]] = {}

    @property
    def spec(self) -> str:
        return self.method.spec

    def needs(self) -> dict[str, Need]:
        return self.method.needs()

    def steps(self, n: int, depth: int) -> list[Method | None]:
        plan = [n, *self.method.plan(n, depth)]
        return [_Pooled(a - b, b, self.seen.setdefault(block, [])) for block, (a, b) in enumerate(pairwise(plan))]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n, exact=False)

    def fitted(self) -> DyMU:
        """The method with the mean threshold of each block."""
        if not self.seen or not all(self.seen.values()):
            raise ValueError("dymu has seen no picture yet, so there is nothing to make thresholds of.")
        thresholds = [float(torch.stack(self.seen[block]).mean()) for block in sorted(self.seen)]
        return replace(self.method, thresholds=tuple(thresholds))


@dataclass(frozen=True)
class _Threshold(Method):
    """One block that merges every edge above its threshold."""

    site = "block"
    proportional = True
    card = DyMU.card
    threshold: float

    def needs(self) -> dict[str, Need]:
        return {"keys": Keys(layer=None)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        tokens, pairs = _paired(tokens, signals)
        assert pairs.edge is not None
        return _merged(tokens, pairs, (pairs.edge.clamp(max=1) > self.threshold).sum(1, keepdim=True))


@dataclass(frozen=True, eq=False)
class _Pooled(Method):
    """One block under calibration: r merges a picture, dealt out over the batch. keep: what is left of a picture on average."""

    site = "block"
    proportional = True
    card = DyMU.card
    r: int
    keep: int
    seen: list[Tensor] = field(repr=False)

    def needs(self) -> dict[str, Need]:
        return {"keys": Keys(layer=None)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        tokens, pairs = _paired(tokens, signals)
        edge = pairs.edge
        assert edge is not None
        best, total = edge.reshape(1, -1), self.r * edge.shape[0]
        first_left = best.sort(descending=True).values[0, min(total, best.shape[1] - 1)]
        self.seen.append(first_left.clamp(min=0, max=1).detach())
        chosen = (rank(best) < total).view_as(edge) & edge.isfinite()
        return _merged(tokens, pairs, chosen.sum(1, keepdim=True))


def _paired(tokens: Tokens, signals: Signals | None) -> tuple[Tokens, Pairs]:
    metric: Any = signals["keys"] if signals and "keys" in signals else tokens.features
    tokens = replace(tokens, features=metric, place=None)
    return tokens, parity_pairs(tokens, 0, None)


def _merged(tokens: Tokens, pairs: Pairs, cap: Tensor) -> Reduction:
    """Merge the best cap (B, 1) pairs of each row, and cut the sequence to its longest row."""
    left = tokens.count()[:, None] - tokens.prefix - cap
    least, most = torch.stack([left.amin(), left.amax()]).tolist()
    if tokens.mask is not None or least < most:
        return merge_pairs(tokens, pairs, most, cap)
    if most == len(tokens) - tokens.prefix:
        return Reduction.identity(left.shape[0], len(tokens), tokens.device, tokens.prefix)
    return merge_pairs(tokens, pairs, most)
