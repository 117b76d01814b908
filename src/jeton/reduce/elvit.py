"""ELViT: run the deeper blocks on a small grid of clusters, and make the full map of them at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..method import Budget, Method, Promise, Signals, Undo, check_keep, register
from ..ops.budget import count, shares, unit_sizes
from ..ops.clustering import reconstruction, superpixels
from ..ops.grid import Boxes, boxes, fit, fitted
from ..ops.resize import adaptive
from ..place import Place
from ..tokens import Reduction, Tokens


@register(
    title="Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
    year=2022,
    source="arXiv:2210.01035",
    family="vit",
    stage="block",
    headline="SAM-H 1.10 to 1.49 times as fast, without training",
)
@dataclass(frozen=True)
class ELViT(Method):
    """Behind block `after`, cluster each picture's map (H, W) to a grid (h, w); behind block `until`, reconstruct the map.

    Centres c begin as the map pooled to h x w. `iterations` times: d_ip = |z_p - c_i|², a_ip = softmax over i of -tau d_ip,
    c_i = sum_p a_ip z_p / sum_p a_ip; token p may belong to the centres within `window` x `window` cells around its own. The
    blocks between see the centres alone. Then z'_p = sum_i w_pi c'_i with c' the centres as they come out and
    w_pi = exp(-tau |z_p - c_i|²), from where they were clustered, of the `neighbours` nearest, divided by their sum. The released
    code divides by their L2 norm: norm="l2".

    `keep` sets h · w: the largest grid of the map's shape within it. Published for SAM: 100 clusters for each window of 14 x 14,
    behind 6 of 32 blocks, which share `after` takes by default. Windows of an encoder are not looked at: the whole map is one.
    `until` None: the last block in use. All tokens are there at the end. tau goes with the squared distances of an encoder's
    features: 0.01 suits those of SAM; where they are narrower or smaller, clusters stay apart with a larger one. With 0.01 the
    small models here lose nearly everything (0.456 of the digits and 0.143 of the embedded model's questions), with 1.0 the
    digits model gets 0.950 on half of the clusters.
    """

    site = "block"
    point = "after"
    restores = True
    keep: int | float = 100 / 196
    after: int | None = None
    until: int | None = None
    iterations: int = 5
    tau: float = 0.01
    window: int = 5
    neighbours: int = 20
    norm: str = "sum"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.norm not in ("sum", "l2"):
            raise ValueError(f'norm must be "sum" (the paper) or "l2" (its code), got {self.norm!r}.')
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window must be an odd number of cells, got {self.window!r}.")
        if self.iterations < 1 or self.neighbours < 1 or self.tau <= 0:
            raise ValueError("iterations and neighbours must be at least 1, and tau above 0.")

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        b, n, prefix = tokens.features.shape[0], len(tokens), tokens.prefix
        if tokens.place is None or tokens.place.sides is None:
            raise ValueError("elvit clusters the picture's grid, but these tokens have no place; use tome or divprune.")
        if count(self.keep, n - prefix) == n - prefix and tokens.mask is None:
            return Reduction.identity(b, n, tokens.device, prefix)
        place = tokens.place
        mask = None if tokens.mask is None else tokens.mask[:, prefix:]
        if prefix:
            place = place.gather(torch.arange(prefix, n, device=tokens.device).expand(b, -1))
        return self._clustered(tokens.features[:, prefix:].detach().float(), place, mask).behind(prefix)

    def _clustered(self, x: Tensor, place: Place, mask: Tensor | None) -> Reduction:
        b, n, _ = x.shape
        real = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask
        box = boxes(place, mask)
        whole = mask is None and place.units == 1 and place.shape is not None and place.shape[0] * place.shape[1] == n
        if whole:
            assert place.shape is not None
            grid = fitted(count(self.keep, n), *place.shape)
            rows, cols, k = torch.full_like(box.height, grid[0]), torch.full_like(box.width, grid[1]), grid[0] * grid[1]
        else:
            share = shares(self.keep, "image", unit_sizes(place.unit, place.units, mask))
            rows, cols = (x.masked_fill(share == 0, 0) for x in fit(share, box.height, box.width))
            k = count(self.keep, n)
        first = adaptive(place, rows, cols, k, mask)
        own = first.assign >= 0
        x = x.masked_fill(~own[..., None], 0)
        near = self._near(place, box, rows, cols, first.index) & first.real[:, :, None] & own[:, None]
        matrix, centres = superpixels(x, first.dense, near, self.tau, self.iterations)
        back = reconstruction(x, centres, self.tau, self.neighbours, self.norm, first.real)
        stays = (rows * cols).sum(1, keepdim=True) == real.sum(1, keepdim=True)  # a small picture keeps what it has
        same = ((first.index[..., None] == torch.arange(n, device=x.device)) & first.real[..., None]).float()
        matrix, back = torch.where(stays[..., None], same, matrix), torch.where(stays[..., None], same.mT, back)
        # for pictures each token belongs to the cell it stands in
        return Reduction(first.index, first.assign, matrix=matrix, mask=None if whole else first.mask, back=back)

    def _near(self, place: Place, box: Boxes, rows: Tensor, cols: Tensor, index: Tensor) -> Tensor:
        """(B, K, N) which centres, represented by the tokens at `index` (B, K), each token may belong to."""
        unit = place.unit.clamp(min=0)
        reach, centre = self.window // 2, unit.gather(1, index)
        near = centre[:, :, None] == unit[:, None]
        for at, start, length, parts in ((place.row, box.top, box.height, rows), (place.col, box.left, box.width, cols)):
            of_token = (at - start.gather(1, unit)) * parts.gather(1, unit) // length.gather(1, unit)
            middle = 2 * (at.gather(1, index) - start.gather(1, centre)) + 1
            of_centre = middle * parts.gather(1, centre) // (2 * length.gather(1, centre))
            near = near & ((of_token[:, None] - of_centre[:, :, None]).abs() <= reach)
        return near

    def steps(self, n: int, depth: int) -> list[Method | None]:
        steps: list[Method | None] = [None] * depth
        keep = Budget(self.keep).count(n)
        if keep == n:
            return steps
        until = depth - 1 if self.until is None else self.until
        after = max(0, min(round(depth * 6 / 32) - 1, until - 1)) if self.after is None else self.after
        if not 0 <= after < until < depth:
            raise ValueError(
                f"elvit clusters behind block {after} and reconstructs behind block {until}; it needs after < until < {depth}."
            )
        steps[after] = replace(self, keep=keep)
        steps[until] = Undo()
        return steps

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n)
