"""Finite scalar quantization: every dimension rounded to a few levels, no codebook and no loss."""

from __future__ import annotations

import math

from torch import Tensor

from ..ops.codes import straight_through
from ._base import Quantizer, TokenOut, package


class FSQ(Quantizer):
    """b = tanh(z + shift) half - off, q = round(b), code = q / floor(L/2), id = sum_i (q_i + floor(L_i/2)) prod_{j<i} L_j.

    half = (L-1)(1+1e-3)/2, off = 1/2 for even L and 0 for odd, shift = atanh(off/half); the first dimension runs fastest. Codes
    of an even L are not symmetric: [-1, 0.75] for L = 8. The gradient passes the rounding, not the tanh. Levels are at least 3.
    Finite Scalar Quantization: VQ-VAE Made Simple, 2023, arXiv:2309.15505. The formulas are vector-quantize-pytorch's (extra
    ``tokenizers``); codes are read back from the ids, because its z + (q - z) can miss the code by one rounding.
    """

    def __init__(self, levels: list[int] | tuple[int, ...]) -> None:
        super().__init__()
        if not levels or min(levels) < 3 or math.prod(levels) >= 2**31:
            raise ValueError(f"FSQ takes levels of at least 3 with fewer than 2^31 codes in all, got {list(levels)}.")
        self.levels = list(levels)
        self.dim, self.codebook_size = len(self.levels), math.prod(self.levels)
        self.fsq = package().FSQ(self.levels)

    def quantize(self, z: Tensor) -> TokenOut:
        soft, ids = self.fsq(z.reshape(1, -1, self.dim))
        ids = ids.view(z.shape[:-1]).long()
        return TokenOut(ids, z, straight_through(soft.view(z.shape), self.decode(ids)))

    def decode(self, ids: Tensor) -> Tensor:
        return self.fsq.indices_to_codes(ids.reshape(1, -1)).view(*ids.shape, self.dim)
