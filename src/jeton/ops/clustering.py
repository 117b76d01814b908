"""Clusters of tokens, without a generator and without a loop over them: density peaks among nearest neighbours (DPC-KNN)."""

from __future__ import annotations

import torch
from torch import Tensor

from .ranking import rank


def dpc_knn(x: Tensor, clusters: Tensor | int, neighbours: Tensor | int, mask: Tensor | None = None) -> Tensor:
    """(B, N) position of the centre each token of x (B, N, D) belongs to: its own for a centre, -1 outside `mask` (B, N).

    Distance d_ij = |x_i - x_j| / sqrt(D); density_i = exp(-mean of d_ij² over the `neighbours` nearest j, i itself among them);
    height_i = the distance to the nearest token of higher density, the largest distance of the row where there is none. The
    `clusters` tokens of highest density x height are the centres, every other token goes to the nearest one. Both numbers may
    differ between rows, as (B, 1). Of equal densities the lowest index counts as the higher one: published codes add noise.
    """
    n = x.shape[1]
    here = torch.arange(n, device=x.device)
    x = x.detach().float()  # without the matrix form: large hidden states would cancel in it
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5
    if mask is not None:
        distance = distance.masked_fill(~(mask[:, :, None] & mask[:, None, :]), torch.inf)
    density = _density(distance, neighbours, n)
    finite = distance.masked_fill(distance == torch.inf, 0)
    if mask is not None:
        density = density.masked_fill(~mask, -1)
    below, above = density[:, :, None], density[:, None, :]
    denser = (above > below) | ((above == below) & (here[None, :] < here[:, None]))
    farthest = finite.amax((1, 2), keepdim=True)
    height = torch.where(denser, torch.minimum(distance, farthest), farthest).amin(2)
    score = density * height
    centre = rank(score if mask is None else score.masked_fill(~mask, -torch.inf)) < clusters
    centre = centre if mask is None else centre & mask
    target = distance.masked_fill(~centre[:, None, :], torch.inf).argmin(2)
    into = torch.where(centre, here, target)
    return into if mask is None else into.masked_fill(~mask, -1)


def _density(distance: Tensor, neighbours: Tensor | int, n: int) -> Tensor:
    """(B, N) of each token, from its nearest neighbours; there are fewer where fewer are finite."""
    near = distance.sort(dim=2).values
    counted = near < torch.inf
    wanted = torch.as_tensor(neighbours, device=distance.device).reshape(-1, 1, 1)
    counted = counted & (torch.arange(n, device=distance.device) < wanted)
    mean = near.square().masked_fill(~counted, 0).sum(2) / counted.sum(2).clamp(min=1)
    return (-mean).exp()
