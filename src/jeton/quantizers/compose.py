"""Quantizers made of quantizers: of what the ones before left over, of parts of a vector, of two views at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.codes import straight_through
from ._base import Quantizer, TokenOut


class Residual(Quantizer):
    """r_0 = z, r_{m+1} = r_m - sg q_m(r_m): each stage quantizes what is left; z_q = sum q_m, ids (..., M).

    Losses are the stages', averaged. The gradient passes all stages in one step. To share one codebook, give the same quantizer
    several times. ``decode`` takes ids of the first stages alone as well: (..., m). More stages are not always nearer: only a
    codebook that holds 0 can leave a small residual alone. SoundStream: An End-to-End Neural Audio Codec, 2021,
    arXiv:2107.03312. vector-quantize-pytorch has a residual class for each of its own quantizers; stages here are any.
    """

    def __init__(self, stages: Iterable[Quantizer]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        _alike(self.stages, "stages", equal_dim=True)
        self.dim, self.codebook_size, self.subcodes = self.stages[0].dim, self.stages[0].codebook_size, len(self.stages)

    def quantize(self, z: Tensor) -> TokenOut:
        left, total, outs = z, torch.zeros_like(z), []
        for stage in self.stages:
            out = stage.quantize(left)
            outs.append(out)
            total = total + out.z_q.detach()
            left = left - out.z_q.detach()
        return TokenOut(torch.stack([out.ids for out in outs], -1), z, straight_through(z, total), _mean(outs))

    def decode(self, ids: Tensor) -> Tensor:
        if not 1 <= ids.shape[-1] <= self.subcodes:
            raise ValueError(f"ids must have 1 to {self.subcodes} stages on the last axis, got {tuple(ids.shape)}.")
        total = torch.zeros(*ids.shape[:-1], self.dim, device=ids.device)
        for stage, part in zip(self.stages, ids.unbind(-1), strict=False):
            total = total + stage.decode(part)
        return total


class Product(Quantizer):
    """z is cut into parts, one quantizer each: ids (..., G), losses averaged over the parts. vector-quantize-pytorch's grouped
    classes have residual quantizers of its own for parts, and equal widths."""

    def __init__(self, parts: Iterable[Quantizer]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        _alike(self.parts, "parts")
        self.widths = [part.dim for part in self.parts]
        self.dim, self.codebook_size, self.subcodes = sum(self.widths), self.parts[0].codebook_size, len(self.parts)

    def quantize(self, z: Tensor) -> TokenOut:
        outs = [part.quantize(piece) for part, piece in zip(self.parts, z.split(self.widths, -1))]
        ids = torch.stack([out.ids for out in outs], -1)
        return TokenOut(ids, z, torch.cat([out.z_q for out in outs], -1), _mean(outs))

    def decode(self, ids: Tensor) -> Tensor:
        return torch.cat([part.decode(piece) for part, piece in zip(self.parts, ids.unbind(-1))], -1)


class SharedIndex(Quantizer):
    """Two codebooks, one id: i = argmin_j |s - S_j|² + weight |p - P_j|², z = [s ; p], z_q = [S_i ; P_i].

    Both halves and both codebooks are normalised at the lookup. Loss as `VQ`'s, on the normalised vectors. The shared mapping of
    TokenFlow, 2024, arXiv:2412.03069, which joins meaning and appearance; of equal rows the lowest wins.
    """

    def __init__(self, dims: tuple[int, int], codebook_size: int, weight: float = 1.0, beta: float = 0.25) -> None:
        super().__init__()
        self.dims, self.dim, self.codebook_size, self.weight, self.beta = dims, sum(dims), codebook_size, weight, beta
        bound = 1 / codebook_size
        self.codebooks = nn.ParameterList(torch.empty(codebook_size, d).uniform_(-bound, bound) for d in dims)

    def quantize(self, z: Tensor) -> TokenOut:
        halves = [F.normalize(half, dim=-1) for half in z.split(self.dims, -1)]
        rows = [F.normalize(book.float(), dim=-1) for book in self.codebooks]
        # of unit vectors |a - b|² = 2 - 2 a·b
        semantic, pixel = (2 - 2 * (half @ row.mT).detach() for half, row in zip(halves, rows))
        ids = shared_index(semantic, pixel, self.weight)
        z, q = torch.cat(halves, -1), torch.cat([F.embedding(ids, row) for row in rows], -1)
        losses = {"codebook": F.mse_loss(q, z.detach()), "commitment": self.beta * F.mse_loss(z, q.detach())}
        return TokenOut(ids, z, straight_through(z, q), losses)

    def decode(self, ids: Tensor) -> Tensor:
        return torch.cat([F.embedding(ids, F.normalize(book.float(), dim=-1)) for book in self.codebooks], -1)


def shared_index(semantic: Tensor, pixel: Tensor, weight: float = 1.0) -> Tensor:
    """(...) the row of the least ``semantic + weight * pixel``, both distances (..., K)."""
    return (semantic + weight * pixel).argmin(-1)


def _alike(parts: Sequence[Quantizer] | nn.ModuleList, name: str, equal_dim: bool = False) -> None:
    if not len(parts):
        raise ValueError(f"give at least one of the {name}.")
    if any(part.subcodes != 1 for part in parts):
        raise ValueError(f"the {name} must have one id a token each.")
    sizes = {(part.codebook_size, part.dim if equal_dim else 0) for part in parts}
    if len(sizes) > 1:
        raise ValueError(f"the {name} must have codebooks of one size{' and one width' if equal_dim else ''}.")


def _mean(outs: list[TokenOut]) -> dict[str, Tensor]:
    """Each loss averaged over the quantizers."""
    return {name: sum(out.losses[name] for out in outs if name in out.losses) / len(outs) for name in outs[0].losses}
