"""A picture as bits: a convolutional encoder, one bit a channel of its grid, the sum of the set bits' embeddings, a decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..quantizers import Bernoulli, TokenOut
from ._conv import ConvDecoder, ConvEncoder


class BinaryAutoencoder(nn.Module, PyTorchModelHubMixin, library_name="jeton"):  # type: ignore[call-arg]
    """The tokenizer of ELM (arXiv:2410.16257): images (B, C, H, W) in [0, 1] to ids (B, h w, S), `bits` bits a token, and back.

    p = sigmoid(conv1x1(encoder)), bits drawn from p in training and p > 1/2 in eval, with the gradient of p; the latent is
    ``sum_i bit_i E_i`` with E (bits, d). A token's bits are S = `subcodes` ids of equal length, the most significant bit first:
    16 bits with S = 2 are what the paper calls 2-8. ``losses``: mean absolute error and mean(p (1 - p)), which pushes p to the
    ends (the released code applies a second sigmoid there); perceptual and adversarial parts are `tokenizers._losses`'. The sides
    of a picture shrink by 2 with every further entry of `multipliers`.
    """

    def __init__(
        self,
        bits: int = 16,
        subcodes: int = 2,
        channels: int = 3,
        width: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        code_dim: int = 256,
        spread: float = 1.0,
    ) -> None:
        super().__init__()
        self.subcodes, self.down = subcodes, 2 ** (len(multipliers) - 1)
        self.encoder = ConvEncoder(channels, width, tuple(multipliers), blocks, bits)
        self.quantizer = Bernoulli(bits, subcodes, weight=spread)
        self.rows = nn.Parameter(torch.randn(bits, code_dim) * bits**-0.5)
        self.decoder = ConvDecoder(code_dim, width, tuple(multipliers), blocks, channels)

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    def encode(self, images: Tensor) -> TokenOut:
        """ids (B, h w, S), or (B, h w) where S is 1; z_q (B, h w, bits) the bits."""
        if images.shape[2] % self.down or images.shape[3] % self.down:
            raise ValueError(f"both sides of a picture must be multiples of {self.down}, got {tuple(images.shape)}.")
        return self.quantizer(self.encoder(images).flatten(2).mT)

    def decode(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images of ids (B, h w, S); a square picture if the `grid` (h, w) is not given."""
        return self.draw(self.quantizer.decode(ids), grid)

    def draw(self, bits: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images of bits (B, h w, bits), floats of 0 and 1."""
        h, w = grid or (round(bits.shape[1] ** 0.5),) * 2
        if h * w != bits.shape[1]:
            raise ValueError(f"{bits.shape[1]} tokens are no grid of {h} x {w}.")
        return self.decoder((bits.to(self.rows.dtype) @ self.rows).mT.unflatten(2, (h, w)))

    def forward(self, images: Tensor) -> tuple[Tensor, TokenOut]:
        out = self.encode(images)
        return self.draw(out.z_q, (images.shape[2] // self.down, images.shape[3] // self.down)), out

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        drawn, out = self(images)
        return {"pixels": F.l1_loss(drawn, images), **out.losses}
