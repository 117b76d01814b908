"""One-D-Piece: a picture as a row of tokens, the most telling first; any number of them from the front is a picture again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..ops.codes import code_bytes
from ..quantizers import FSQ, CosineVQ, Quantizer, TokenOut
from ..registry import register
from ._common import LatentEncoder, MaskTokenDecoder, draw_length, unpatchify

SIZES = {"S": (512, 8, 8), "B": (768, 12, 12), "L": (1024, 24, 16)}  # width, depth, heads


class PixelCodes(Protocol):
    """A frozen tokenizer of patches (such as MaskGIT's VQGAN), whose ids One-D-Piece learns to predict."""

    codebook: Tensor  # (C, c)

    def encode(self, images: Tensor) -> Tensor:
        """(B, P) ids of a picture's patches."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """A picture of codes (B, P, c)."""
        ...


@dataclass
class Reconstruction:
    """What a pass of the whole tokenizer gives: `prediction` (B, P, out) for each patch, the tokens, how many the decoder saw."""

    prediction: Tensor
    tokens: TokenOut
    length: int | Tensor | None


@register(
    title="One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression",
    year=2025,
    source="arXiv:2501.10064",
    family="tokenizer",
    stage="tokenize",
    training_free=False,
)
class OneDPiece(nn.Module, PyTorchModelHubMixin, library_name="jeton"):  # type: ignore[call-arg]
    """Latent queries beside the patches of a picture become K ids; a decoder of mask tokens draws the picture from any first k.

    Encoder: ``[class ; patches ; K queries]`` through `depth` blocks, queries to d = `code_dim` numbers, quantized on the unit
    sphere (codebook of `codebook_size` rows) or, with `levels`, by FSQ. Decoder: ``[class ; mask tokens ; k codes]``, a
    prediction for every patch. *Tail Token Drop* while training: k is uniform on 1..K, the tokens behind are cut, so what
    matters most moves to the front. `drop="batch"` draws one k for a batch (the paper), "row" one for each picture (masked
    instead of cut), None none.

    `target="codes"` (the paper) predicts the ids that a frozen `PixelCodes` gives each patch, out of `target_codes`; pictures
    are the frozen decoder's, of the expected code. `target="pixels"` predicts the patch itself. Images are (B, channels, H, H)
    in [0, 1]. k tokens cost ``k log2(codebook_size) / 8`` bytes. `legacy_reshape` is for weights of the released code, which
    reads the encoder's (B, K, D) as channels without transposing and so mixes neighbouring latents; by default token k is latent
    k.

    `init_std` of the weights is the paper's, for its widths. Small models that start so draw the mean picture for long: all
    pictures have the same codes, and the decoder does not hear them. `init_std` of about width ** -0.5 / 2 and `batch_norm`,
    which is not the paper's (each number of each latent at mean 0 and variance 1 over the batch), make them learn;
    photographs need a low rate, too.

    Its ids can be generated too: ``ELM(tokens=256, codes=4096, subcodes=1, grid=None, mode="mlm", mask_schedule="arccos")`` is
    the paper's MaskGIT on them, in 8 steps.
    """

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        tokens: int = 256,
        width: int = 512,
        depth: int = 8,
        heads: int = 8,
        codebook_size: int = 4096,
        code_dim: int = 12,
        levels: list[int] | None = None,
        beta: float = 0.25,
        target: str = "codes",
        target_codes: int = 1024,
        channels: int = 3,
        drop: str | None = "batch",
        legacy_reshape: bool = False,
        init_std: float = 0.02,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"a side of {image_size} pixels is no multiple of the patch size {patch_size}.")
        if target not in ("codes", "pixels"):
            raise ValueError(f'target must be "codes" or "pixels", got {target!r}.')
        if drop not in ("batch", "row", None):
            raise ValueError(f'drop must be "batch", "row" or None, got {drop!r}.')
        self.image_size, self.patch_size, self.tokens, self.target, self.drop = image_size, patch_size, tokens, target, drop
        self.quantizer: Quantizer = CosineVQ(code_dim, codebook_size, beta) if levels is None else FSQ(levels)
        d, out = self.quantizer.dim, target_codes if target == "codes" else channels * patch_size**2
        self.encoder = LatentEncoder(
            image_size,
            patch_size,
            tokens,
            width,
            depth,
            heads,
            d,
            channels,
            legacy_reshape=legacy_reshape,
            init_std=init_std,
            batch_norm=batch_norm,
        )
        self.decoder = MaskTokenDecoder(image_size, patch_size, tokens, width, depth, heads, d, out, init_std)
        self.pixel_codes: PixelCodes | None = None

    @classmethod
    def preset(cls, size: str, **changes: Any) -> OneDPiece:
        """The paper's "S", "B" or "L" for 256 x 256 pixels, untrained; `changes` overwrite single fields."""
        if size not in SIZES:
            raise ValueError(f"there is no preset {size!r}; they are {', '.join(SIZES)}.")
        width, depth, heads = SIZES[size]
        return cls(**{"width": width, "depth": depth, "heads": heads, **changes})

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    def bytes(self, k: int) -> float:
        """What k tokens of one picture weigh, without entropy coding and without a header."""
        return code_bytes(k, self.codebook_size)

    def encode(self, images: Tensor) -> TokenOut:
        """Pictures (B, C, H, H) in [0, 1] to tokens: ids (B, K), z_q (B, K, d)."""
        if images.dim() != 4 or images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"images must be (B, C, {self.image_size}, {self.image_size}), got {tuple(images.shape)}.")
        return self.quantizer(self.encoder(images))

    def decode(self, ids: Tensor, length: int | Tensor | None = None) -> Tensor:
        """Pictures (B, C, H, H) of ids (B, k), any k from 1 to K. `length` uses the first ones alone, (B,) for each row its
        own."""
        return self.draw(self.predict(self.quantizer.decode(ids), length))

    def predict(self, codes: Tensor, length: int | Tensor | None = None) -> Tensor:
        """(B, P, out) what the decoder says of every patch, given codes (B, k, d)."""
        if not 1 <= codes.shape[1] <= self.tokens:
            raise ValueError(f"a picture is 1 to {self.tokens} tokens, got {codes.shape[1]}.")
        if isinstance(length, Tensor) and length.dim():
            return self.decoder(codes.to(self.decoder.up.weight.dtype), length)
        if length is not None:
            if not 1 <= int(length) <= codes.shape[1]:
                raise ValueError(f"length must be 1 to {codes.shape[1]}, got {int(length)}.")
            codes = codes[:, : int(length)].contiguous()  # so that a cut row is the same row to the last bit
        return self.decoder(codes.to(self.decoder.up.weight.dtype))

    def draw(self, prediction: Tensor) -> Tensor:
        """(B, C, H, H) pictures of what the decoder says of every patch."""
        if self.target == "pixels":
            return unpatchify(prediction, self.patch_size)
        frozen = self._frozen("turn its predictions into pixels")
        return frozen.decode(prediction.softmax(-1) @ frozen.codebook.to(prediction.dtype))

    def forward(self, images: Tensor, length: int | Tensor | None = None) -> Reconstruction:
        """Encode and predict; in training mode from a drawn number of tokens where `length` does not give it."""
        out = self.encode(images)
        if length is None and self.training and self.drop is not None:
            rows = images.shape[0] if self.drop == "row" else None
            length = draw_length(self.tokens, rows, None if rows is None else images.device)
        return Reconstruction(self.predict(out.z_q, length), dataclasses.replace(out, length=_rows(length, images)), length)

    def first_stage(self, images: Tensor) -> dict[str, Tensor]:
        """Losses to train everything: cross-entropy to the frozen tokenizer's ids, or mean squared error where the target is
        pixels; and the quantizer's."""
        found = self(images)
        if self.target == "pixels":
            return {"pixels": F.mse_loss(unpatchify(found.prediction, self.patch_size), images), **found.tokens.losses}
        ids = self._frozen("learn its ids").encode(images)
        return {"codes": F.cross_entropy(found.prediction.flatten(0, 1), ids.flatten()), **found.tokens.losses}

    def freeze_encoder(self) -> OneDPiece:
        """For the second stage: encoder, queries and codebook stay as they are."""
        self.encoder.requires_grad_(False)
        self.quantizer.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> OneDPiece:
        super().train(mode)
        if not self.encoder.down.weight.requires_grad:  # frozen: running means stay as they are, too
            self.encoder.eval()
            self.quantizer.eval()
        return self

    def _frozen(self, purpose: str) -> PixelCodes:
        if self.pixel_codes is None:
            raise ValueError(
                f'one-d-piece with target="codes" needs a frozen pixel tokenizer to {purpose}: set model.pixel_codes, or make it '
                f'with target="pixels".'
            )
        return self.pixel_codes


class SecondStage(nn.Module):
    """The decoder's fine-tuning on pixels: tokenizer (encoder frozen), perceptual distance and adversary in one module to train.

    ``losses(images)``: mean squared error x 1, `perceptual` x 0.1, the adversary's own (x 0.01 from step 20,000, LeCam 1e-3). The
    tail is still dropped. `perceptual` is any function of two batches of pictures; the paper's is of ConvNeXt-S features.
    """

    def __init__(self, model: OneDPiece, perceptual: Any, adversary: nn.Module | None, perceptual_weight: float = 0.1) -> None:
        super().__init__()
        self.model, self.perceptual, self.adversary = model.freeze_encoder(), perceptual, adversary
        self.perceptual_weight = perceptual_weight

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        drawn = self.model.draw(self.model(images).prediction)
        found = {"pixels": F.mse_loss(drawn, images), "perceptual": self.perceptual_weight * self.perceptual(drawn, images)}
        return found if self.adversary is None else {**found, **self.adversary(images, drawn)}


def _rows(length: int | Tensor | None, images: Tensor) -> Tensor | None:
    """(B,) how many tokens each row has in use."""
    if length is None:
        return None
    return torch.as_tensor(length, device=images.device).expand(images.shape[0])
