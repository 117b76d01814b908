"""Ids of discrete tokens: bits to integers and back, and how much of a codebook is used.

Letters: S sub-codes of a token, c bits of each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """The value of q, bit for bit, with the gradient of z."""
    return q.detach() + (z - z.detach())


def pack_bits(bits: Tensor, subcodes: int = 1) -> Tensor:
    """(..., S) long: bits (..., S c), 0 or 1 (or false and true), in S consecutive chunks, the most significant bit first."""
    n = bits.shape[-1]
    if n % subcodes:
        raise ValueError(f"{n} bits cannot be split into {subcodes} sub-codes of equal length.")
    width = n // subcodes
    if width > 62:
        raise ValueError(f"{width} bits do not fit into one integer; use at least {-(-n // 62)} sub-codes.")
    place = 1 << torch.arange(width - 1, -1, -1, device=bits.device)
    return (bits.unflatten(-1, (subcodes, width)).long() * place).sum(-1)


def unpack_bits(ids: Tensor, width: int) -> Tensor:
    """(..., S c) bool: the bits of ids (..., S), c = `width` each; the inverse of `pack_bits`."""
    place = torch.arange(width - 1, -1, -1, device=ids.device)
    return ((ids[..., None] >> place) & 1).bool().flatten(-2)


def histogram(ids: Tensor, size: int) -> Tensor:
    """(size,) long: how often each id of 0..size-1 occurs in ids of any shape."""
    return torch.bincount(ids.flatten(), minlength=size)


def usage(ids: Tensor, size: int) -> Tensor:
    """The share of a codebook of `size` entries that occurs in ids of any shape, in [0, 1]."""
    return (histogram(ids, size) > 0).float().mean()


def perplexity(ids: Tensor, size: int) -> Tensor:
    """exp(H) of the ids' empirical distribution, H in nats: how many codes are in use, counted by how often; 1 to size."""
    p = histogram(ids, size).double()
    p = p / p.sum().clamp(min=1)
    return torch.special.entr(p).sum().exp().float()


def code_bytes(tokens: int, size: int, subcodes: int = 1) -> float:
    """Bytes of `tokens` tokens, each `subcodes` ids out of `size`, without entropy coding and without a header."""
    return tokens * subcodes * math.log2(size) / 8


def kl_to_uniform(ids: Tensor, size: int, n: int = 1) -> Tensor:
    """KL(empirical n-grams || uniform) in nats, of ids (..., N) along the last axis: 0 where ids look like noise, up to n
    log(size).

    Counts are sparse where size^n is large beside the number of ids: compare streams of the same length and size alone.
    """
    grams = ids.unfold(-1, n, 1).reshape(-1, n)
    place = size ** torch.arange(n, device=ids.device)
    counts = torch.unique((grams * place).sum(-1), return_counts=True)[1].double()
    p = counts / counts.sum()
    return (n * math.log(size) - torch.special.entr(p).sum()).float()
