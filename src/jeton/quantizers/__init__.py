"""Quantizers: vectors to ids and back. All share one interface (`Quantizer`, `TokenOut`); tokenizers of every kind compose them.

`VQ`, `CosineVQ`, `EMAVQ`: the nearest row of a codebook. `FSQ`: rounding to a few levels. `LFQ`, `BSQ`, `Bernoulli`: one bit a
dimension. `Residual`, `Product`, `SharedIndex`: made of others. `DimensionWise`: after training, no parameters.
"""

from ._base import Quantizer, TokenOut
from .binary import BSQ, LFQ, Bernoulli
from .compose import Product, Residual, SharedIndex
from .dimwise import DimensionWise
from .fsq import FSQ
from .vq import EMAVQ, VQ, CosineVQ

__all__ = [
    "BSQ",
    "EMAVQ",
    "FSQ",
    "LFQ",
    "VQ",
    "Bernoulli",
    "CosineVQ",
    "DimensionWise",
    "Product",
    "Quantizer",
    "Residual",
    "SharedIndex",
    "TokenOut",
]
