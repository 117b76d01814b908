"""Post-training quantization of continuous latents, dimension by dimension; nothing is trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.codes import straight_through
from ._base import Quantizer, TokenOut


class DimensionWise(Quantizer):
    """Every dimension on its own to one of n = 2^bits levels of a standard normal; ids (..., d).

    Bins have equal probability: boundaries Φ⁻¹(k/n), the outer ones clamped to ±`limit`; level r_k = E[X | X in bin k] = (φ(a)
    - φ(b)) / (Φ(b) - Φ(a)). x is mapped linearly from [low, high] to ±limit, clamped, and takes the nearest level, the lower of
    two equally near. `low` and `high` are numbers or (d,) per dimension; ``DimensionWise.calibrated`` measures them. The bins
    are equally likely for a standard deviation of (high - low) / (2 limit): with the defaults 1.667, the published setting for
    latents of unit variance, which is also far more precise in the tails. Bridging Continuous and Discrete Tokens for
    Autoregressive Visual Generation (TokenBridge), 2025, arXiv:2503.16430.
    """

    def __init__(
        self, dim: int, bits: int = 6, low: float | Tensor = -5.0, high: float | Tensor = 5.0, limit: float = 3.0
    ) -> None:
        super().__init__()
        self.dim, self.codebook_size, self.subcodes, self.bits, self.limit = dim, 1 << bits, dim, bits, limit
        low, high = (torch.as_tensor(end, dtype=torch.float32).expand(dim).clone() for end in (low, high))
        if not bool((low < high).all()):
            raise ValueError("low must be below high in every dimension.")
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        r = levels(bits, limit)
        self.register_buffer("levels", r.float(), persistent=False)
        self.register_buffer("between", ((r[1:] + r[:-1]) / 2).float(), persistent=False)

    @classmethod
    def calibrated(cls, x: Tensor, bits: int = 6, spread: float = 5.0, limit: float = 3.0) -> DimensionWise:
        """For latents like x (..., d): low and high are the mean of each dimension ± `spread` standard deviations."""
        flat = x.detach().float().reshape(-1, x.shape[-1])
        mean, std = flat.mean(0), flat.std(0)
        return cls(x.shape[-1], bits, mean - spread * std, mean + spread * std, limit)

    def quantize(self, z: Tensor) -> TokenOut:
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        x = ((z.detach() - middle) / half * self.limit).clamp(-self.limit, self.limit)
        ids = torch.bucketize(x, self.between)
        return TokenOut(ids, z, straight_through(z, self.decode(ids)))

    def decode(self, ids: Tensor) -> Tensor:
        return self.levels[ids] / self.limit * (self.high - self.low) / 2 + (self.low + self.high) / 2


def levels(bits: int, limit: float = 3.0) -> Tensor:
    """(2^bits,) float64: the mean of a standard normal in each of 2^bits bins of equal probability within ±limit, ascending."""
    n = 1 << bits
    edge = torch.special.ndtri(torch.arange(n + 1, dtype=torch.float64) / n).clamp(-limit, limit)
    density = (-edge.square() / 2).exp() / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(edge)
    r = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
    return (r - r.flip(0)) / 2  # odd to the last bit, so that the middle boundary is 0
