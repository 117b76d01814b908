"""HoliTom: what stands still is kept once, the rest by attention; later the losers fold into the survivors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from ..method import LastAttention, Method, Need, Promise, ReceivedAttention, Signals, check_keep, register
from ..ops.budget import count, counts, split, unit_sizes
from ..ops.clustering import dpc_knn
from ..ops.grid import lookup
from ..ops.merging import fold_weight, mean_weight, merge
from ..ops.neighbours import nearest
from ..ops.segments import best_segments, savings, seams
from ..ops.selection import best_of_units, pack
from ..ops.similarity import normalise
from ..place import Place
from ..tokens import Reduction, Tokens, gather
from ._common import check_layers, quota, score_of, stages

LAYER = Fraction(18, 28)


@register(
    title="HoliTom: Holistic Token Merging for Fast Video Large Language Models",
    year=2025,
    source="arXiv:2505.21334",
    family="vlm",
    stage="layer",
    headline="99.1 % of the performance of OneVision-7B at 6.9 % of its FLOPs, first token 2.28 times faster",
)
@dataclass(frozen=True)
class HoliTom(Method):
    """Merge a clip over time, thin its frames by attention, and halve what is left inside the language model.

    Outer stage, at the language model's entrance, on a clip of F frames of N tokens. A position stays from a frame to the next
    where the cosine of its tokens is above `threshold`. Frames s..e as one segment save (e - s) tokens for each position that
    stays all the way; the cut that saves most is found by dynamic programming (segments of at most `window` frames). In a segment
    such positions are static: one token each, the mean over time, at the place of its first frame. All others are dynamic. With
    rho = min(1, rho0 F N / (F N - saved)) a frame of n dynamic tokens keeps m = n rho: the best round(m (1 - contextual)) by
    attention received in the encoder, and clusters of the others (DPC-KNN, `neighbours` nearest) instead of the rest. The n
    static tokens of a segment become n rho clusters. A cluster is beta · centre + (1 - beta) · mean of its other members, or its
    centre where there are none. A picture that is no frame, crops included, is a clip of one frame.

    Inner stage, in front of layer `inner_layer` (None: 18 of 28, scaled to the depth): the tokens that the prompt's last token
    attended to most in the layer before stay, round(V (1 - drop)) of them. Each other one goes to the survivor of highest cosine,
    in order, by x <- (x + dropped) / 2 (`rule` "halving": the last one weighs most), or all that go there are averaged with it
    ("mean_all"). Positions stay what they were. `drop` 0 leaves this stage out.

    `keep` is what is left at the end, so the paper's retained ratio is rho0 = keep / (1 - drop), at most 1: 0.125 stands for rho0
    0.25 and drop 0.5, with drop=0 keep is rho0 itself. A picture keeps exactly that. So does a clip, shares n rho rounded by
    largest remainder, unless all it shows stands still and fewer tokens are left: then all of those. `published_rounding` takes
    ceil(n rho) of every frame and round(n rho) of every static set instead, which may miss the budget by a token each. A budget
    of all tokens merges nothing. The paper lowers `threshold` to 0.65 at rho0 = 0.1.

    Differences from the release: ties of DPC-KNN go to the lowest index instead of to noise; a static token stands between the
    tokens of its segment's first frame, not in front of them; the outer stage leaves positions as they were, while the release
    renumbers there (positions="compact" of `apply` renumbers at both stages).
    """

    site = "layer"
    keep: int | float = 0.125
    drop: float = 0.5
    threshold: float = 0.8
    contextual: float = 0.0
    beta: float = 0.6
    neighbours: int = 7
    window: int = 1024
    inner_layer: int | None = None
    rule: str = "halving"
    published_rounding: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name in ("contextual", "beta", "drop"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value <= 1
                or (name, value) == ("drop", 1)
            ):
                raise ValueError(f"{name} is a share, from 0 to {'below ' if name == 'drop' else ''}1, got {value!r}.")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float) or not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold is a cosine, from -1 to 1, got {self.threshold!r}.")
        for name in ("neighbours", "window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if self.rule not in ("halving", "mean_all"):
            raise ValueError(f'rule must be "halving" or "mean_all", got {self.rule!r}.')
        check_layers(None if self.inner_layer is None else (self.inner_layer,))

    def needs(self) -> dict[str, Need]:
        return {**self._outer.needs(), **({"last": LastAttention()} if self.drop else {})}

    def parts(self) -> tuple[Method, ...]:
        return (self._outer, self._inner) if self.drop else (self._outer,)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        """Both stages one after the other, on the same tokens: `signals` are those of `needs`."""
        outer = self._outer.reduce(tokens, signals)
        if not self.drop:
            return outer
        left = outer.apply(tokens)
        last = score_of(signals, "last", "holitom").gather(1, outer.index)
        return outer.then(self._inner.reduce(left, {"attention": last}))

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return self._inner.steps(self._outer.promise(n).count, depth) if self.drop else [None] * depth

    def promise(self, n: int, depth: int = 12) -> Promise:
        for part in self.parts():
            n = part.promise(n, depth).count
        return Promise(n, exact=False)

    @property
    def _outer(self) -> _Outer:
        share = self.keep / (1 - self.drop)
        retain = round(share) if isinstance(self.keep, int) else min(1.0, share)
        fields = ("threshold", "contextual", "beta", "neighbours", "window", "published_rounding")
        return _Outer(self.keep, retain, **{name: getattr(self, name) for name in fields})

    @property
    def _inner(self) -> _Inner:
        left = self.keep if isinstance(self.keep, int) else max(self.keep, 1.0 - self.drop)
        return _Inner(left, self.inner_layer, self.rule)


@dataclass(frozen=True)
class _Outer(Method):
    """Between the encoder and the language model. keep: the budget of the whole; retain: what this stage hands on."""

    site = "entry"
    keep: int | float
    retain: int | float
    threshold: float
    contextual: float
    beta: float
    neighbours: int
    window: int
    published_rounding: bool

    def needs(self) -> dict[str, Need]:
        return {"attention": ReceivedAttention(layer=-1)}

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n if self.published_rounding else count(self.retain, n), exact=False)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        n, place = len(tokens), tokens.place
        k, units = count(self.retain, n), 1 if place is None else place.units
        if k == n and tokens.mask is None:
            return Reduction.identity(len(tokens.features), n, tokens.device)
        score = score_of(signals, "attention", "holitom")
        budget = counts(self.retain, tokens.count())
        moving = tokens.real
        still = None
        if place is not None and units > 1:
            still = _Still.find(tokens, place, self.threshold, self.window, budget)
            moving = moving & ~still.token
        unit = torch.zeros_like(tokens.origin) if place is None else place.unit
        unit = torch.where(unit < 0, units, unit)  # structure forms a unit of its own
        sizes = unit_sizes(torch.where(moving, unit, units + 1), units + 2)[:, :-1]
        kept, fixed = self._shares(budget, tokens.count(), sizes, still)
        dominant = (kept.double() * (1 - self.contextual)).round().long()
        dominant[:, units] = kept[:, units]
        best = best_of_units(score, unit, dominant, moving)
        most = n if self.published_rounding else k
        ragged = tokens.mask is not None or units > 1
        if still is None and not self.contextual:
            return pack(best, most, ragged)
        into = torch.where(best, torch.arange(n, device=best.device), -1)
        weight = best.float()
        if still is not None:
            into, weight = still.merged(tokens, into, weight, fixed, self)
        if self.contextual:
            rest, clusters = moving & ~best & (unit < units), (kept - dominant)[:, :units]
            into, weight = self._clustered(tokens, rest, into, weight, clusters)
        return merge(into, most, weight=weight, ragged=ragged)

    def _shares(self, budget: Tensor, real: Tensor, sizes: Tensor, still: _Still | None) -> tuple[Tensor, Tensor]:
        """(B, U + 1) dynamic tokens kept of each frame (structure last), and (B, U) of the static set that begins there."""
        fixed = sizes[:, :0] if still is None else still.sizes
        if not self.published_rounding:
            shared = split(budget, torch.cat([fixed, sizes], 1))
            return shared[:, fixed.shape[1] :], shared[:, : fixed.shape[1]]
        asked = budget if isinstance(self.retain, int) else self.retain * real.double()
        rho = asked.double() / (sizes.sum(1) + fixed.sum(1)).clamp(min=1)
        rho = torch.where(budget < real, rho.clamp(max=1), 1.0)[:, None]
        return (sizes * rho - 1e-9).ceil().long(), (fixed * rho).round().long()

    def _clustered(self, tokens: Tokens, rest: Tensor, into: Tensor, weight: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
        """The dynamic tokens `rest` (B, N) gathered in clusters (B, U) of their own frame."""
        if tokens.place is None or tokens.place.units == 1:
            centre, share = self.mix(tokens.features, clusters, rest)
            return torch.where(rest, centre, into), torch.where(rest, share, weight)
        table = lookup(tokens.place, tokens.mask).flatten(2)
        cells = _Cells(table, len(tokens))
        centre, share = self.mix(
            cells.of(tokens.features).flatten(0, 1), clusters.flatten()[:, None], cells.of(rest).flatten(0, 1)
        )
        target = table.flatten(0, 1).gather(1, centre.clamp(min=0)).masked_fill(centre < 0, -1)
        target, share = (cells.back(each.view_as(table)) for each in (target, share))
        return torch.where(rest, target, into), torch.where(rest, share, weight)

    def mix(self, x: Tensor, clusters: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P) the centre of each of the tokens x (B, P, D) in `mask`, -1 for others and where there are no `clusters` (B, 1);
        and its weight there: beta for a centre, 1 - beta shared by the others that go to it; a centre alone has 1."""
        centre = dpc_knn(x, clusters, clusters.clamp(max=self.neighbours), mask)
        centre = centre.masked_fill(clusters == 0, -1)
        own = centre == torch.arange(x.shape[1], device=x.device)
        group = centre.masked_fill(centre < 0, x.shape[1])
        others = torch.zeros(x.shape[0], x.shape[1] + 1, device=x.device).scatter_add(1, group, (~own).float()).gather(1, group)
        share = torch.where(own, torch.where(others > 0, self.beta, 1.0), (1 - self.beta) / others.clamp(min=1))
        return centre, share.masked_fill(centre < 0, 0)


@dataclass(frozen=True)
class _Cells:
    """Tokens on the grid of their frames and back. table (B, U, P): the token of each cell, n for none."""

    table: Tensor
    n: int

    def of(self, x: Tensor) -> Tensor:
        """(B, U, P, ...) from x (B, N, ...)."""
        flat = gather(torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1), self.table.flatten(1))
        return flat.unflatten(1, self.table.shape[1:])

    def back(self, x: Tensor) -> Tensor:
        """(B, N) from x (B, U, P); tokens that stand in no cell get 0."""
        out = x.new_zeros(x.shape[0], self.n + 1)
        return out.scatter(1, self.table.flatten(1), x.flatten(1))[:, :-1]


@dataclass(frozen=True)
class _Still:
    """The positions of a clip that stand still. cells: the grid; static (B, U, P): true where a token does; first (B, U): the
    first frame of each frame's segment; token (B, N): the same as `static` for tokens."""

    cells: _Cells
    static: Tensor
    first: Tensor
    token: Tensor

    @classmethod
    def find(cls, tokens: Tokens, place: Place, threshold: float, window: int, budget: Tensor) -> _Still:
        n = len(tokens)
        cells = _Cells(lookup(place, tokens.mask).flatten(2), n)
        there = cells.table < n
        unit = cells.of(normalise(tokens.features))
        same = (unit[:, 1:] * unit[:, :-1]).sum(3) > threshold
        stays = same & there[:, 1:] & there[:, :-1]
        if place.time is None:
            stays = torch.zeros_like(stays)
        else:  # crops of a picture lie side by side, they do not follow each other
            time = cells.of(place.time)
            stays = stays & (time[:, 1:] == time[:, :-1] + 1)
        stays = stays & (budget < tokens.count())[:, None, None]
        seam = seams(stays)
        first, _ = best_segments(savings(seam), window)
        frames = torch.arange(first.shape[1], device=first.device).expand_as(first)
        last = torch.zeros_like(first).scatter_reduce(1, first, frames, "amax").gather(1, first)
        static = there & (_at(seam, first) == _at(seam, last)) & (first < last)[..., None]
        return cls(cells, static, first, cells.back(static))

    @property
    def sizes(self) -> Tensor:
        """(B, U) static positions of the segment that begins at a frame, 0 where none begins."""
        return self._begins.sum(2)

    @property
    def _begins(self) -> Tensor:
        frames = torch.arange(self.first.shape[1], device=self.first.device)
        return self.static & (self.first == frames)[..., None]

    def merged(self, tokens: Tokens, into: Tensor, weight: Tensor, fixed: Tensor, how: _Outer) -> tuple[Tensor, Tensor]:
        """Static tokens go to the centre of their position's cluster (`fixed` (B, U) of them), at the segment's first frame."""
        x = self.cells.of(tokens.features).float() * self.static[..., None]
        segment = self.first[..., None, None].expand_as(x)
        length = torch.zeros_like(self.first).scatter_add(1, self.first, torch.ones_like(self.first))
        mean = torch.zeros_like(x).scatter_add(1, segment, x) / length.clamp(min=1)[..., None, None]
        begins, table = self._begins, self.cells.table
        # a static set takes two frames at least, so that half of them hold all beginnings
        at = (~begins.any(2)).to(torch.uint8).argsort(dim=1, stable=True)[:, : table.shape[1] // 2]
        x, rows, begins = (gather(each, at).flatten(0, 1) for each in (mean, table, begins))
        centre, share = how.mix(x, fixed.gather(1, at).flatten()[:, None], begins)
        target = rows.gather(1, centre.clamp(min=0)).masked_fill(centre < 0, -1)
        share = share / length.gather(1, at).flatten()[:, None].clamp(min=1)
        target, share = (self._everywhere(each.view(*at.shape, -1), at) for each in (target, share))
        return torch.where(self.token, target, into), torch.where(self.token, share, weight)

    def _everywhere(self, x: Tensor, at: Tensor) -> Tensor:
        """(B, N) what static tokens find at the beginning of their segment; x (B, S, P) stands at the frames `at` (B, S)."""
        spread = x.new_zeros(self.static.shape).scatter(1, at[..., None].expand_as(x), x)
        return self.cells.back(_at(spread, self.first))


def _at(x: Tensor, frame: Tensor) -> Tensor:
    """x (B, U, P) at the frames (B, U)."""
    return x.gather(1, frame[..., None].expand(-1, -1, x.shape[2]))


@dataclass(frozen=True)
class _Inner(Method):
    """In front of one language-model layer. keep: what is left."""

    site = "layer"
    keep: int | float
    inner_layer: int | None
    rule: str

    def needs(self) -> dict[str, Need]:
        return {"attention": LastAttention()}

    def steps(self, n: int, depth: int) -> list[Method | None]:
        layers = None if self.inner_layer is None else (self.inner_layer,)
        at = stages("holitom", layers, (LAYER,), depth)[0]
        return [replace(self, keep=count(self.keep, n)) if layer == at else None for layer in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(count(self.keep, n))

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        n = len(tokens)
        k, real = count(self.keep, n), tokens.count()[:, None]
        if k == n and tokens.mask is None:
            return Reduction.identity(len(tokens.features), n, tokens.device)
        score = score_of(signals, "attention", "holitom")
        one = torch.zeros_like(tokens.origin)
        stays = best_of_units(score, one, quota(signals, self.keep, real), tokens.mask)
        here = torch.arange(n, device=tokens.device)
        into = torch.where(stays, here, nearest(tokens.features, stays, one, tokens.mask))
        weight = fold_weight(into) if self.rule == "halving" else mean_weight(into, n)
        return merge(into, k, weight=weight, ragged=tokens.mask is not None)


for _part in (_Outer, _Inner):
    _part.card = HoliTom.card
