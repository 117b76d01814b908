"""The same vectors through different quantizers: bits a vector, error, and how much of the codebook is in use."""

import math

import torch

from jeton.quantizers import EMAVQ, FSQ, LFQ, DimensionWise, Product, Residual

torch.manual_seed(0)
mix = torch.randn(4, 4)
vectors = torch.randn(4000, 4) @ mix / mix.norm(dim=0)  # correlated, of unit variance

quantizers = {
    "EMAVQ 256": EMAVQ(4, 256, decay=0.9),
    "Residual 2 x 256": Residual([EMAVQ(4, 256, decay=0.9) for _ in range(2)]),
    "Product 2 x 256": Product([EMAVQ(2, 256, decay=0.9) for _ in range(2)]),
    "FSQ 5 5 5 5": FSQ([5, 5, 5, 5]),
    "LFQ 4": LFQ(4, group=4),
    "DimensionWise 4 x 4 bits": DimensionWise(4, bits=4),
}
for name, quantizer in quantizers.items():
    for _ in range(20):  # codebooks follow what they see; the others have nothing to learn
        quantizer.train()(vectors)
    quantizer.eval()
    ids = quantizer.encode(vectors)
    error = (quantizer.decode(ids) - vectors).square().mean().item()
    bits = quantizer.subcodes * math.log2(quantizer.codebook_size)
    print(f"{name:26} {bits:5.1f} bits  error {error:.3f}  used {quantizer.usage(ids).item():.0%}")
