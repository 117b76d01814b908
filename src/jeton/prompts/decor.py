"""DECOR: what a customised model overfitted on is taken out of the prompt's embeddings, as directions of undesired words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.projection import project_out, row_space
from ..registry import register
from ._common import TextEncoder


def axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens make up the axes of a prompt: singular values (..., k) of x (..., T, D), k = min(T, D), in descending
    order, and the share (..., T, k) of each token in each axis; shares of an axis sum to 1. Not centred: in CLIP the leading
    axes are those of the padding."""
    left, values, _ = torch.linalg.svd(x if x.dtype == torch.float64 else x.float(), full_matrices=False)
    return values, left.square()


def suppress(
    x: Tensor,
    undesired: Tensor,
    alpha: float = 1.0,
    *,
    rank: int | None = None,
    tolerance: float = 1e-4,
    protect: Tensor | None = None,
) -> Tensor:
    """x (..., T, D) without `alpha` of what lies in the span of the undesired rows (m, D). Positions where `protect` (..., T)
    is true stay as they are."""
    return _edit(x, row_space(undesired, rank, tolerance), alpha, protect)


@register(
    title="DECOR: Decomposition and Projection of Text Embeddings for Text-to-Image Customization",
    year=2024,
    source="arXiv:2412.09169",
    family="prompt",
    stage="text encoding",
)
@dataclass(frozen=True)
class Decor:
    """Edits the text embeddings of a customised text-to-image model, between text encoder and cross-attention, so that the
    content or style of its few training images does not leak; nothing is trained.

    X~ (m, D) are the encoder's outputs at the tokens of undesired words, V (D, r) its right singular vectors whose singular value
    is above `tolerance` times the largest, P = V Vᵀ, and the prompt's X (T, D) becomes

        X' = X - alpha X P.

    alpha = 1 removes the span, less weighs the prompt against the reference. The begin-of-text token stays as it is unless
    `begin`: its norm is huge and it knows no word. Apply it to the conditional prompt only, not to the negative one. For a model
    with several text encoders whose outputs are joined along D (SDXL), each has a span of its own, in that order; pooled
    vectors are not touched. To mix content and style, each prompt is edited against the undesired words of the other.

        encoder = TextEncoder(pipe.text_encoder, pipe.tokenizer)                   # of the customised model
        edit = Decor.of("a photo of a cat", ["cat"], [encoder])                    # style images that all showed a cat
        images = pipe(prompt_embeds=edit.encode("a dog in sks style", [encoder]))

    The paper's choice of positions is not public in code; words without padding and alpha = 1 are ours.
    """

    spans: tuple[Tensor, ...]
    alpha: float = 1.0
    begin: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is the share taken out, from 0 to 1, got {self.alpha}.")
        if not self.spans:
            raise ValueError("there must be a span for each text encoder; make them with Decor.of(...).")

    @classmethod
    def of(
        cls,
        prompts: str | Sequence[str],
        words: Sequence[str] | None,
        encoders: Sequence[TextEncoder],
        *,
        alpha: float = 1.0,
        pads: bool = False,
        rank: int | None = None,
        tolerance: float = 1e-4,
        begin: bool = False,
    ) -> Decor:
        """The edit that takes `words` out, as the encoders read them in the prompts, each of which has them all; None takes
        every word. A word is another vector at another place: several prompts catch more of it. `pads` adds what stands at
        end-of-text and padding, a summary of the whole prompt; the begin-of-text token is never part of a span."""
        return cls(tuple(_span(one, prompts, words, pads, rank, tolerance) for one in encoders), alpha, begin)

    def __call__(self, embeds: Tensor, protect: Tensor | None = None) -> Tensor:
        """Embeddings (..., T, D of all encoders) edited, except where `protect` (..., T) is true."""
        widths = [span.shape[0] for span in self.spans]
        if embeds.shape[-1] != sum(widths):
            raise ValueError(f"these embeddings are {embeds.shape[-1]} wide, but the spans {' + '.join(map(str, widths))}.")
        parts = zip(embeds.split(widths, -1), self.spans, strict=True)
        return torch.cat([_edit(part, span, self.alpha, protect) for part, span in parts], -1)

    def encode(self, prompts: str | Sequence[str], encoders: Sequence[TextEncoder]) -> Tensor:
        """(B, T, D of all encoders): prompts read and edited, ready as `prompt_embeds`."""
        read = [(encoder(slots), slots) for encoder in encoders for slots in [encoder.slots(prompts)]]
        lengths = {embeds.shape[1] for embeds, _ in read}
        if len(lengths) > 1:
            raise ValueError(
                f"joined encoders read equally many tokens, these {sorted(lengths)}; edit each with a Decor of its own."
            )
        protect = None if self.begin else read[0][1].begin.to(read[0][0].device)
        return self(torch.cat([embeds for embeds, _ in read], -1), protect)


def _edit(x: Tensor, basis: Tensor, alpha: float, protect: Tensor | None) -> Tensor:
    edited = project_out(x, basis, alpha)
    return edited if protect is None else torch.where(protect.to(x.device)[..., None], x, edited)


@torch.no_grad()
def _span(
    encoder: TextEncoder,
    prompts: str | Sequence[str],
    words: Sequence[str] | None,
    pads: bool,
    rank: int | None,
    tolerance: float,
) -> Tensor:
    slots = encoder.slots(prompts)
    chosen = slots.words if words is None else slots.find(words)
    if pads:
        chosen = chosen | ~(slots.words | slots.begin)
    if not chosen.any():
        raise ValueError("there is no undesired word; name some, or give a prompt that has them.")
    rows = encoder(slots)[chosen.to(next(encoder.model.parameters()).device)]
    basis = row_space(rows, rank, tolerance)
    if basis.shape[1] == basis.shape[0]:
        raise ValueError(
            f"{rows.shape[0]} undesired tokens span all {basis.shape[0]} directions: nothing would be left. Give rank=...."
        )
    return basis
