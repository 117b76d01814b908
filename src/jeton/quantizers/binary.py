"""Binary codes: one bit a dimension, no codebook. Three flavours of one class each.

Ids have the most significant bit first (1011 is 11). More than 31 bits are kept as G sub-codes of equal length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.codes import pack_bits, straight_through, unpack_bits
from ._base import Quantizer, TokenOut


class _Binary(Quantizer):
    """Bits to ids and back; `values` are what a clear and a set bit stand for."""

    values: tuple[float, float]

    def __init__(self, dim: int, subcodes: int | None = None) -> None:
        super().__init__()
        if subcodes is None:
            subcodes = next(g for g in range(1, dim + 1) if dim % g == 0 and dim // g <= 31)
        if dim % subcodes or dim // subcodes > 31:
            raise ValueError(f"{dim} bits cannot be kept as {subcodes} ids of equal length and at most 31 bits.")
        self.dim, self.subcodes, self.codebook_size = dim, subcodes, 1 << (dim // subcodes)

    def ids_of(self, bits: Tensor) -> Tensor:
        """(...) or (..., G) long, of bits (..., d)."""
        ids = pack_bits(bits, self.subcodes)
        return ids if self.subcodes > 1 else ids[..., 0]

    def bits_of(self, ids: Tensor) -> Tensor:
        """(..., d) bool, the inverse of `ids_of`."""
        return unpack_bits(ids if self.subcodes > 1 else ids[..., None], self.dim // self.subcodes)

    def value(self, bits: Tensor) -> Tensor:
        """(..., d) float32 what the bits stand for."""
        low, high = self.values
        return torch.where(bits, high, low)

    def decode(self, ids: Tensor) -> Tensor:
        return self.value(self.bits_of(ids))


class LFQ(_Binary):
    """c = sign(z) in {-1, 1}^d, with sign(0) = -1. Losses: beta mean((z - sg c)²) and the entropy regulariser below.

    Per group of `group` bits and with P = softmax over the group's codes c of 2 z·c / temperature: gamma0 E[H(P)] - gamma1
    H(E[P]), averaged over groups, times `entropy_weight`; H in nats. E[H(P)] is the sum of the bits' entropies with p =
    sigmoid(4 z_i / temperature): the same number without a table. Language Model Beats Diffusion: Tokenizer is Key to Visual
    Generation, 2023, arXiv:2310.05737. vector-quantize-pytorch's LFQ with inv_temperature 1 agrees where one group is the whole
    code; it cannot keep codes of more bits than its table of 2^d rows has room for.
    """

    values = (-1.0, 1.0)

    def __init__(
        self,
        dim: int,
        subcodes: int | None = None,
        group: int = 9,
        beta: float = 0.25,
        entropy_weight: float = 0.1,
        gamma0: float = 1.0,
        gamma1: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(dim, subcodes)
        self.group = min(group, dim)
        if dim % self.group:
            raise ValueError(f"{dim} bits cannot be split into groups of {group}; use a group that divides {dim}.")
        self.beta, self.entropy_weight, self.gamma0, self.gamma1 = beta, entropy_weight, gamma0, gamma1
        self.temperature = temperature

    def quantize(self, z: Tensor) -> TokenOut:
        bits = z > 0
        c = self.value(bits)
        losses = {"commitment": self.beta * F.mse_loss(z, c), "entropy": self.entropy_weight * self.entropy(z)}
        return TokenOut(self.ids_of(bits), z, straight_through(z, c), losses)

    def entropy(self, z: Tensor) -> Tensor:
        """gamma0 E[H(P)] - gamma1 H(E[P]), averaged over the groups; scalar."""
        z = z.reshape(-1, self.dim // self.group, self.group)
        single = _bit_entropy(4 * z / self.temperature).sum(-1).mean()
        ids = torch.arange(1 << self.group, device=z.device)[:, None]
        codes = unpack_bits(ids, self.group).to(z.dtype) * 2 - 1
        mean = (2 * z @ codes.mT / self.temperature).softmax(-1).mean(0)
        return self.gamma0 * single - self.gamma1 * torch.special.entr(mean).sum(-1).mean()


class BSQ(_Binary):
    """u = z / |z|, c = sign(u) / sqrt(d), with sign(0) = -1: codes on the unit sphere.

    Loss gamma0 sum_i E[H(p_i)] - gamma1 sum_i H(E[p_i]) times `entropy_weight`, with p_i = sigmoid(4 u_i / (temperature
    sqrt(d))): the bits are taken as independent. Image and Video Tokenization with Binary Spherical Quantization, 2024,
    arXiv:2406.07548. vector-quantize-pytorch's spherical LFQ uses the table over all codes instead.
    """

    def __init__(
        self,
        dim: int,
        subcodes: int | None = None,
        entropy_weight: float = 0.1,
        gamma0: float = 1.0,
        gamma1: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(dim, subcodes)
        self.values = (-(dim**-0.5), dim**-0.5)
        self.entropy_weight, self.gamma0, self.gamma1, self.temperature = entropy_weight, gamma0, gamma1, temperature

    def quantize(self, z: Tensor) -> TokenOut:
        u = F.normalize(z, dim=-1)
        bits = u > 0
        return TokenOut(
            self.ids_of(bits), u, straight_through(u, self.value(bits)), {"entropy": self.entropy_weight * self.entropy(u)}
        )

    def entropy(self, u: Tensor) -> Tensor:
        """gamma0 sum E[H(p_i)] - gamma1 sum H(E[p_i]) of unit vectors u (..., d); scalar."""
        logits = 4 * u.reshape(-1, self.dim) * self.dim**-0.5 / self.temperature
        mean = logits.sigmoid().mean(0)
        spread = (torch.special.entr(mean) + torch.special.entr(1 - mean)).sum()
        return self.gamma0 * _bit_entropy(logits).sum(-1).mean() - self.gamma1 * spread


class Bernoulli(_Binary):
    """Bits in {0, 1} of logits z: drawn from sigmoid(z / temperature) in training, 1 where sigmoid(z) > 1/2 in eval.

    The gradient is that of s = sigmoid(z), whatever the bit. Loss `weight` mean(s (1 - s)) pushes s to the ends. Draws come from
    torch's global generator. The quantizer of Instella-T2I (temperature 0.1) and of ELM's binary autoencoder (temperature 1).
    """

    values = (0.0, 1.0)

    def __init__(self, dim: int, subcodes: int | None = None, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(dim, subcodes)
        self.temperature, self.weight = temperature, weight

    def quantize(self, z: Tensor) -> TokenOut:
        s = z.sigmoid()
        bits = torch.bernoulli((z.detach() / self.temperature).sigmoid()).bool() if self.training else z > 0
        return TokenOut(
            self.ids_of(bits), z, straight_through(s, self.value(bits)), {"spread": self.weight * (s * (1 - s)).mean()}
        )


def _bit_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of a bit with these logits, also where it is all but certain."""
    p = logits.sigmoid()
    return -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits))
