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


def superpixels(x: Tensor, start: Tensor, near: Tensor, temperature: float, iterations: int) -> tuple[Tensor, Tensor]:
    """K soft clusters of x (B, N, D) around `start` (B, K, N), a matrix that makes the first centres: (B, K, N) the matrix that
    makes the last ones, its rows adding up to 1, and (B, K, D) these centres, in float32.

    Again and again: d_ip = |x_p - c_i|², a_ip = softmax over i of -temperature · d_ip, c_i = sum_p a_ip x_p / sum_p a_ip. `near`
    (B, K, N) says which centres a token may belong to. Nothing flows back through the assignment.
    """
    x = x.float()
    matrix = start.float()
    for _ in range(iterations):
        with torch.no_grad():
            far = squared_distances(matrix @ x, x)
            share = (-temperature * far).masked_fill(~near, -torch.inf).softmax(1).masked_fill(~near, 0)
            matrix = share / share.sum(2, keepdim=True).clamp(min=1e-16)
    return matrix, matrix @ x


def reconstruction(x: Tensor, centres: Tensor, temperature: float, k: int, norm: str, real: Tensor) -> Tensor:
    """(B, N, K) how x (B, N, D) is made of `centres` (B, K, D): exp(-temperature |x_p - c_i|²) of the k nearest (and what is
    as near as the last of them), divided by their "sum", or by their "l2" norm. `real` (B, K) says which centres there are."""
    with torch.no_grad():
        far = squared_distances(x.float(), centres).masked_fill(~real[:, None], torch.inf)
        last = far.topk(min(k, far.shape[2]), dim=2, largest=False).values[..., -1:]
        near = (far <= last) & real[:, None]
        # relative to the nearest, which changes nothing after the division: exp of the distance itself may be 0 for all
        weight = (-temperature * (far - far.amin(2, keepdim=True))).exp().masked_fill(~near, 0)
        total = weight.sum(2, keepdim=True) if norm == "sum" else weight.norm(dim=2, keepdim=True)
        return weight / total


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, M) squared distances of a (B, N, D) to b (B, M, D), at least 0. Both are moved to the mean of b first: large hidden
    states would cancel."""
    middle = b.mean(1, keepdim=True)
    a, b = a - middle, b - middle
    return (a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None] - 2 * a @ b.mT).clamp(min=0)


def _density(distance: Tensor, neighbours: Tensor | int, n: int) -> Tensor:
    """(B, N) of each token, from its nearest neighbours; there are fewer where fewer are finite."""
    near = distance.sort(dim=2).values
    counted = near < torch.inf
    wanted = torch.as_tensor(neighbours, device=distance.device).reshape(-1, 1, 1)
    counted = counted & (torch.arange(n, device=distance.device) < wanted)
    mean = near.square().masked_fill(~counted, 0).sum(2) / counted.sum(2).clamp(min=1)
    return (-mean).exp()
