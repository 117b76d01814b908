"""ELViT: run the deeper blocks on a small grid of clusters, and make the full map of them at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..method import Budget, Method, Promise, Signals, Undo, check_keep, register
from ..ops.budget import count, shares, unit_sizes
from ..ops.clustering import reconstruction, superpixels
from ..ops.grid import Boxes, boxes, fit, fitted, tiles
from ..ops.resize import adaptive
from ..place import Lattice, Place
from ..tokens import Reduction, Tiles, Tokens


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
    behind 6 of 32 blocks, which share `after` takes by default.

    Where blocks attend in windows (SAM), each window is clustered by itself, W x W patches to the largest square within their
    share of `keep`. Windows of that size are laid over the map of all clusters, which is what blocks that see everything see.
    Windows at the right and lower border hold what is left of the picture, a to a w / W clusters (rounded, one at least): 64 x 64
    patches in windows of 14 become 46 x 46 in windows of 10. The released code clusters border windows with the zeros they are
    padded with (70 x 70 to 50 x 50), which then act as patches where blocks see everything.

    `until` None: the last block in use. All tokens are there at the end. tau goes with the squared distances of an encoder's
    features: 0.01 suits those of SAM; where they are narrower or smaller, clusters stay apart with a larger one. With 0.01 the
    small models here lose nearly everything (0.456 of the digits and 0.143 of the embedded model's questions), with 1.0 the
    digits model gets 0.950 on half of the clusters.
    """

    site = "block"
    point = "after"
    restores = True
    maps = True
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
        x = tokens.features[:, prefix:].detach().float()
        return (self._in_windows(x, place) if place.window else self._clustered(x, place, mask)).behind(prefix)

    def _clustered(self, x: Tensor, place: Place, mask: Tensor | None) -> Reduction:
        """The whole map of each picture."""
        n = x.shape[1]
        box = boxes(place, mask)
        if mask is None and place.units == 1 and place.shape is not None and place.shape[0] * place.shape[1] == n:
            grid = fitted(count(self.keep, n), *place.shape)
            rows, cols, k = torch.full_like(box.height, grid[0]), torch.full_like(box.width, grid[1]), grid[0] * grid[1]
            return replace(self._to(rows, cols, k, x, place, mask), mask=None, lattice=Lattice(*grid))
        share = shares(self.keep, "image", unit_sizes(place.unit, place.units, mask))
        rows, cols = (side.masked_fill(share == 0, 0) for side in fit(share, box.height, box.width))
        return self._to(rows, cols, count(self.keep, n), x, place, mask)

    def _in_windows(self, x: Tensor, place: Place) -> Reduction:
        """Each window of the encoder by itself."""
        (b, n, _), side = x.shape, place.window
        if place.shape is None or place.shape[0] * place.shape[1] != n:
            raise ValueError(
                "elvit clusters the windows of whole maps of one shape; apply it in front of what takes patches away."
            )
        share = self.keep / n if isinstance(self.keep, int) else self.keep
        few = math.isqrt(max(1, round(share * side * side)))
        heights, widths = ([min(side, length - start) for start in range(0, length, side)] for length in place.shape)
        rows, cols = ([max(1, int(a * few / side + 0.5)) for a in lengths] for lengths in (heights, widths))
        old, new = tiles(*place.shape, side, x.device), tiles(sum(rows), sum(cols), few, x.device)
        new = new.gather(1, (new < 0).to(torch.uint8).argsort(dim=1, stable=True))  # what there is of a smaller one in front
        real = (old >= 0).repeat(b, 1)
        of_window = torch.nn.functional.pad(x, (0, 0, 0, 1))[:, old].flatten(0, 1)
        grid = torch.cartesian_prod(torch.tensor(rows), torch.tensor(cols)).to(x.device).repeat(b, 1)
        step = self._to(grid[:, :1], grid[:, 1:], few * few, of_window, Place.grid(len(real), side, side, x.device), real)
        assert step.matrix is not None and isinstance(step.back, Tensor)
        matrix, back = (part.unflatten(0, (b, -1)) for part in (step.matrix, step.back))
        k = sum(rows) * sum(cols)
        return Reduction(
            _spread(step.index, old, new, b, k),
            _spread(step.assign.clamp(min=0), new, old, b, n),
            tiles=Tiles(new, old, matrix),
            back=Tiles(old, new, back),
            lattice=Lattice(sum(rows), sum(cols), few),
        )

    def _to(self, rows: Tensor, cols: Tensor, k: int, x: Tensor, place: Place, mask: Tensor | None) -> Reduction:
        """Clusters of x (B, N, D) on grids of rows x cols (B, U), k in all at most."""
        b, n, _ = x.shape
        box = boxes(place, mask)
        real = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask
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
        return Reduction(first.index, first.assign, matrix=matrix, mask=first.mask, back=back)

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


def _spread(value: Tensor, of: Tensor, at: Tensor, batch: int, length: int) -> Tensor:
    """(B, length) numbers value (B · U, j) within windows as what they mean in `of` (U, i), laid out where `at` (U, j) says."""
    windows = value.unflatten(0, (batch, -1))
    found = of.expand(batch, -1, -1).gather(2, windows).flatten(1)
    return found.new_zeros(batch, length + 1).index_copy(1, at.flatten() % (length + 1), found)[:, :length]
