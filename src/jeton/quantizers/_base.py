"""What all quantizers share: the value they return and the calls they answer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from ..ops.codes import perplexity, usage


@dataclass
class TokenOut:
    """What a quantizer or a tokenizer's encoder returns.

    `ids` (B, N) long, or (B, N, G) where a token has G sub-codes, None where tokens are continuous. `z_e`, `z_q` (B, N, d) before
    and after the quantizer; z_q carries a straight-through gradient. `losses` are scalars, weighted already: `loss` is their sum.
    `length` (B,) tokens in use where rows differ, `keep` (B, N0) bool the patches selected, where a tokenizer has these.
    """

    ids: Tensor | None
    z_e: Tensor
    z_q: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    length: Tensor | None = None
    keep: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        return sum(self.losses.values(), self.z_q.new_zeros((), dtype=torch.float32))


class Quantizer(nn.Module):
    """Vectors (..., d) to ids (...) or (..., G), and ids back to vectors.

    Call it for training: ``out = quantizer(z)`` is a `TokenOut`. ``encode(z)`` gives ids alone, ``decode(ids)`` the vectors they
    stand for. In eval mode ``decode(out.ids)`` equals ``out.z_q`` bit for bit. All arithmetic is in float32, outside autocast.
    `codebook_size` is the number of ids of one (sub-)code, `subcodes` how many a token has (1: ids without a last axis for them).
    """

    dim: int
    codebook_size: int
    subcodes: int = 1

    def forward(self, z: Tensor) -> TokenOut:
        self._check(z)
        with torch.autocast(z.device.type, enabled=False):
            out = self.quantize(z.float())
        return dataclasses.replace(out, z_e=z, z_q=out.z_q.to(z.dtype))

    def quantize(self, z: Tensor) -> TokenOut:
        """The quantizer itself, for float32 z (..., d)."""
        raise NotImplementedError

    def decode(self, ids: Tensor) -> Tensor:
        """(..., d) float32 vectors of the ids."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """The ids of z (..., d), as in eval mode; nothing is learned from the call."""
        was = self.training
        self.eval()
        try:
            ids = self(z).ids
        finally:
            self.train(was)
        assert ids is not None
        return ids

    def usage(self, ids: Tensor) -> Tensor:
        """The share of the codebook that occurs in `ids`."""
        return usage(ids, self.codebook_size)

    def perplexity(self, ids: Tensor) -> Tensor:
        """exp(entropy) of `ids`: how many codes are in use, counted by how often."""
        return perplexity(ids, self.codebook_size)

    def _check(self, z: Tensor) -> None:
        if z.shape[-1] != self.dim:
            raise ValueError(f"{type(self).__name__} quantizes vectors of {self.dim} numbers, got {tuple(z.shape)}.")


def package() -> ModuleType:
    """vector-quantize-pytorch, or how to get it."""
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise ImportError(
            "this quantizer uses the package vector-quantize-pytorch; install it with pip install 'jeton[tokenizers]'."
        ) from error
    return vector_quantize_pytorch
