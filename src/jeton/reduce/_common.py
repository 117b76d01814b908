"""What several methods share: how they ask for and read attention as a score, and check the fields they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..method import Method, Promise, Signals, check_keep
from ..needs import ClassAttention, Keys, Need, ReceivedAttention
from ..ops import matching
from ..ops.budget import count, counts, evenly
from ..ops.selection import best_of_units, pack, top_k
from ..tokens import Reduction, Tokens


def check_score(score: str) -> None:
    if score not in ("class", "received"):
        raise ValueError(f'score must be "class" (attention of the class token) or "received" (by each token), got {score!r}.')


def check_per(per: str) -> None:
    if per not in ("image", "crop", "frame"):
        raise ValueError(f'per must be "image", "crop" or "frame", got {per!r}.')


def check_ratio(ratio: object, name: str = "ratio") -> None:
    """A share of the tokens; 1 may be written as an int."""
    if isinstance(ratio, int) and not isinstance(ratio, bool) and ratio != 1:
        hint = "; a number of tokens to keep is set with keep" if name == "ratio" else ""
        raise ValueError(f"{name}={ratio} must be a fraction in (0, 1]{hint}.")
    check_keep(1.0 if ratio == 1 and not isinstance(ratio, bool) else ratio, name)


def check_locations(locations: Sequence[int]) -> tuple[int, ...]:
    """Numbers of encoder blocks, as given."""
    found = tuple(locations)
    if not found or any(isinstance(x, bool) or not isinstance(x, int) or x < 0 for x in found):
        raise ValueError(f"locations must be block numbers from 0, such as (3, 6, 9), got {locations!r}.")
    return found


def check_at_blocks(method: Any) -> None:
    """The fields of a method that keeps a share of the patches at each of some encoder blocks: `ratio`, `keep`, `locations`."""
    check_ratio(method.ratio)
    if method.keep is not None:
        check_keep(method.keep)
    if method.locations is not None:
        object.__setattr__(method, "locations", check_locations(method.locations))


def blocks_of(who: str, locations: Sequence[int] | None, depth: int) -> list[int]:
    """The encoder blocks of `locations`, or (3, 6, 9) of 12 and in proportion for other depths."""
    if locations is None:
        return sorted({max(1, depth * part // 4) for part in (1, 2, 3)} & set(range(depth))) or [0]
    if max(locations) >= depth:
        raise ValueError(
            f"{who}(locations={tuple(locations)}) needs block {max(locations)}, but there are only {depth} "
            f"blocks; use blocks 0 to {depth - 1}, or locations=None."
        )
    return sorted(set(locations))


def attention(score: str, layer: int | None) -> Need:
    """The signal behind `score` at `layer`."""
    return ClassAttention(layer=layer) if score == "class" else ReceivedAttention(layer=layer)


def read(signals: Signals | None, name: str, who: str, what: str) -> Tensor:
    """A declared signal; without it the method cannot decide."""
    if signals is None or name not in signals:
        raise ValueError(f'{who} reads {what}: pass it as signals={{"{name}": ...}}, or apply {who} to a model.')
    return signals[name]


def score_of(signals: Signals | None, name: str, who: str) -> Tensor:
    """(B, N) float32 score from attention (B, H, N), averaged over heads, or (B, N) as it is."""
    attention = read(signals, name, who, "attention (B, heads, N) or (B, N)").float()
    return attention.mean(1) if attention.dim() == 3 else attention


def quota(signals: Signals | None, keep: int | float, real: Tensor) -> Tensor:
    """(B, 1) patches each row keeps in this step: what the engine planned where rows differ in length, else `keep` of `real`."""
    planned = signals.get("quota") if signals else None
    return counts(keep, real) if planned is None else torch.minimum(planned, real)


def merge_by_parity(tokens: Tokens, keep: int | float, signals: Signals | None = None) -> Reduction:
    """ToMe's matching and merging down to `keep` of each row, or to what the engine planned for it, by attention keys; without
    such a signal by the features."""
    metric = signals["keys"] if signals and "keys" in signals else tokens.features
    goals, planned = matching.halvings(len(tokens) - tokens.prefix, count(keep, len(tokens) - tokens.prefix)), None
    if tokens.mask is not None:
        goals.append(goals[-1])  # a fraction of a shorter row may round to one halving more
        planned = quota(signals, keep, tokens.count()[:, None] - tokens.prefix)
    return matching.merge_in_rounds(replace(tokens, features=metric, place=None), goals, planned, parity_pairs)


class Merging(Method):
    """ToMe's rule in every block: `removed` says how many tokens go in each. Subclasses are dataclasses with fields `r`, which
    one step is made with, and `keep`, the number of patches left at last, reached evenly."""

    site = "block"
    proportional = True
    keep: int | float | None = None

    def removed(self, n: int, depth: int) -> list[int]:
        """How many of n patches each of `depth` blocks is to merge, before any clamping to half of its tokens."""
        raise NotImplementedError

    def needs(self) -> dict[str, Need]:
        return {"keys": Keys(layer=None)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        if self.keep is not None:
            return merge_by_parity(tokens, self.keep, signals)
        metric = signals["keys"] if signals and "keys" in signals else tokens.features
        n, planned = len(tokens) - tokens.prefix, None
        r = self.removed(n, 1)[0]
        if tokens.mask is not None:
            real = tokens.count()[:, None] - tokens.prefix
            planned = real - (real // 2).clamp(max=r)
        tokens = replace(tokens, features=metric, place=None)
        return matching.merge_in_rounds(tokens, [n - min(r, n // 2)], planned, parity_pairs)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        if self.keep is not None:
            plan = [n, *evenly(n, count(self.keep, n), depth)]
            return [replace(self, keep=b) if b < a else None for a, b in pairwise(plan)]  # type: ignore[type-var]
        return [replace(self, r=r) if r else None for r in self.removed(n, depth)]  # type: ignore[type-var]

    def promise(self, n: int, depth: int = 12) -> Promise:
        if self.keep is not None:
            return Promise(evenly(n, count(self.keep, n), depth)[-1])
        for r in self.removed(n, depth):
            n -= min(r, n // 2)
        return Promise(n)


def parity_pairs(tokens: Tokens, r: int, cap: object) -> matching.Pairs:
    return matching.by_parity(tokens.features, tokens.prefix, tokens.order, tokens.mask)


def planned(method: Method, tokens: Tokens) -> Tensor:
    """(B, 1) what a method promises to leave of each row, by the row's own length."""
    left = [method.promise(n).count if n else 0 for n in range(len(tokens) + 1)]
    return torch.tensor(left, device=tokens.device)[tokens.count()][:, None]


def best(score: Tensor, tokens: Tokens, keep: int | float, signals: Signals | None = None, most: int | None = None) -> Reduction:
    """Keep the highest `score` (B, N): `keep` of each row, or what the engine planned for it. No row keeps more than the longest
    one does, unless `most` says so."""
    if tokens.mask is None:
        return top_k(score, keep)
    k, only = count(keep, len(tokens)) if most is None else most, torch.zeros_like(tokens.origin)
    return pack(best_of_units(score, only, quota(signals, keep, tokens.count()[:, None]), tokens.mask), k, ragged=True)


def check_layers(layers: object, stages: int | None = None) -> None:
    """Numbers of language-model layers, ascending; `stages` is how many there must be."""
    if layers is None:
        return
    whole = isinstance(layers, tuple | list) and all(isinstance(at, int) and not isinstance(at, bool) for at in layers)
    if not whole or any(b <= a for a, b in pairwise([-1, *layers])):  # type: ignore[misc]
        raise ValueError(f"layers must list layers in ascending order, e.g. (8, 16, 24), got {layers!r}.")
    if stages is not None and len(layers) != stages:  # type: ignore[arg-type]
        raise ValueError(f"layers={layers!r} should name {stages} layers, one for each stage.")


def stages(who: str, layers: Sequence[int] | None, shares: Sequence[Fraction], depth: int, behind: int = 0) -> list[int]:
    """The layers in front of which the stages stand, `behind` after those given, or after these shares of the depth. In a model
    too shallow to tell them apart several stages share a layer; no stage stands in front of layer 0."""
    if layers is None:
        return [min(depth - 1, max(1, (2 * depth * share.numerator // share.denominator + 1) // 2 + behind)) for share in shares]
    wrong = [layer for layer in layers if not 1 <= layer + behind < depth]
    if wrong:
        raise ValueError(
            f"{who} cannot act at layer {wrong[0]} of {depth}; layers {1 - behind} to {depth - 1 - behind} are possible."
        )
    return [layer + behind for layer in layers]
