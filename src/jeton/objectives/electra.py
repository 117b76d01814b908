"""ELECTRA: a small masked language model proposes replacements, and the main encoder tells replaced tokens from original ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from ..registry import register
from ._common import IGNORE, choose, cross_entropy, sample


@dataclass(frozen=True)
class Corrupted:
    """A batch in which a generator replaced tokens, each (B, L): `ids` after replacement, `chosen` where the generator was asked,
    `replaced` where its token differs from the original: the discriminator's labels."""

    ids: Tensor
    chosen: Tensor
    replaced: Tensor


@register(
    title="ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators",
    year=2020,
    source="arXiv:2003.10555",
    family="objective",
    stage="pre-training",
    headline="ELECTRA-Small: GLUE 79.9 after four days on one GPU, above GPT",
    training_free=False,
)
class Electra(nn.Module):
    """Generator and discriminator, trained together; only `discriminator` is kept.

    Of the real tokens of a row, n = max(1, round(share length)) that are not special are chosen, without replacement. The
    generator sees 85 % of them as [MASK], the others as they are, and is trained by cross-entropy averaged over the chosen. One
    token is drawn from its softmax(logits / temperature) at each, without gradient, and written into the original sequence. The
    discriminator says of every real token whether it was replaced (a drawn token that equals the original was not), by binary
    cross-entropy averaged over all of them:  L = L_generator + weight L_discriminator,  weight = 50.

    Token, position and segment embeddings are one for both where `tied` (the generator's narrower layers read them through their
    own projection). `share` is 0.15, or 0.25 for the large model. `disallow_correct` leaves the original token out of the draw.

    The paper's gain over a masked language model at equal steps shows here where the probe is near to what ELECTRA learns.
    Encoders of two layers of width 64 read Python's language reference, 2000 steps of 40 rows of 22 characters; a linear probe
    on their states then finds misprints with an area under the ROC curve of 0.84, 0.81 and 0.83 (three seeds) for the
    discriminator, 0.73, 0.71 and 0.72 for a masked language model and 0.68, 0.69 and 0.74 where the generator is as wide as
    the discriminator. Rows in which neighbours were swapped were told from intact ones at 0.76 and 0.69 (two seeds) against
    0.70 and 0.72, after 3000 steps with the second seed at 0.77 against 0.76: no sure gain. There is none for the topic of a
    row (0.22 both; 0.22 against 0.29 after 600 steps on words).

    `forward(input_ids, attention_mask)` gives {"generator": ..., "discriminator": weight x ...}, which `jeton.train` adds.
    """

    def __init__(
        self,
        generator: ElectraForMaskedLM,
        discriminator: ElectraForPreTraining,
        mask_id: int,
        special_ids: Sequence[int],
        *,
        share: float = 0.15,
        masked: float = 0.85,
        weight: float = 50.0,
        temperature: float = 1.0,
        tied: bool = True,
        disallow_correct: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < share < 1 or not 0 <= masked <= 1 or temperature <= 0:
            raise ValueError(
                f"share={share} must be in (0, 1), masked={masked} in [0, 1] and temperature={temperature} positive."
            )
        if generator.config.vocab_size != discriminator.config.vocab_size:
            raise ValueError("generator and discriminator must have the same vocabulary.")
        self.generator, self.discriminator = generator, discriminator
        self.mask_id, self.share, self.masked = mask_id, share, masked
        self.weight, self.temperature, self.disallow_correct = weight, temperature, disallow_correct
        self.register_buffer("special", torch.tensor(sorted({mask_id, *special_ids})), persistent=False)
        if tied:
            tie(generator, discriminator)

    def chosen(self, ids: Tensor, mask: Tensor, draws: torch.Generator | None = None) -> Tensor:
        """(B, L) the tokens the generator is asked about."""
        length = mask.sum(1)
        count = (self.share * length).round().long().clamp_min(1)
        return choose(mask.bool() & ~torch.isin(ids, self.special), count, draws)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, draws: torch.Generator | None = None) -> dict[str, Tensor]:
        chosen = self.chosen(input_ids, attention_mask, draws)
        hidden = chosen & (torch.rand(chosen.shape, generator=draws, device=chosen.device) < self.masked)
        seen = input_ids.masked_fill(hidden, self.mask_id)
        logits = self.generator(input_ids=seen, attention_mask=attention_mask).logits
        corrupted = self.corrupt(input_ids, chosen, logits, draws)
        scores = self.discriminator(input_ids=corrupted.ids, attention_mask=attention_mask).logits
        return {
            "generator": cross_entropy(logits, input_ids.masked_fill(~chosen, IGNORE)),
            "discriminator": self.weight * detection(scores, corrupted.replaced, attention_mask),
        }

    def corrupt(self, ids: Tensor, chosen: Tensor, logits: Tensor, draws: torch.Generator | None = None) -> Corrupted:
        """Draw the generator's tokens (logits (B, L, V)) at the chosen places of the original sequence (B, L)."""
        if self.disallow_correct:
            logits = logits.detach().scatter(-1, ids[..., None], torch.finfo(logits.dtype).min)
        drawn = torch.where(chosen, sample(logits, self.temperature, draws), ids)
        return Corrupted(drawn, chosen, chosen & (drawn != ids))


def detection(scores: Tensor, replaced: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy of the scores (B, L) that a token was replaced, averaged over all real tokens of the batch."""
    each = F.binary_cross_entropy_with_logits(scores.float(), replaced.float(), reduction="none")
    return (each * mask).sum() / mask.sum()


def tie(generator: ElectraForMaskedLM, discriminator: ElectraForPreTraining) -> None:
    """Give the generator the discriminator's embeddings, and its output layer their transpose."""
    if generator.config.embedding_size != discriminator.config.embedding_size:
        raise ValueError(
            f"tied embeddings are equally wide; the generator's embedding_size is {generator.config.embedding_size}, the "
            f"discriminator's {discriminator.config.embedding_size}."
        )
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.generator_lm_head.weight = discriminator.electra.embeddings.word_embeddings.weight


# hidden width, layers, heads, embedding width, generator's share of the width, share of tokens chosen
SIZES = {"small": (256, 12, 4, 128, 4, 0.15), "base": (768, 12, 12, 768, 3, 0.15), "large": (1024, 24, 16, 1024, 4, 0.25)}


def make(size: str, vocab_size: int, mask_id: int, special_ids: Sequence[int], **options: Any) -> Electra:
    """ELECTRA of a published size ("small", "base", "large") with fresh weights; the generator is as deep as the
    discriminator and a quarter (base: a third) as wide. `options` go to `Electra`."""
    if size not in SIZES:
        raise ValueError(f"there is no size {size!r}; there are {', '.join(SIZES)}.")
    width, layers, heads, embedding, part, share = SIZES[size]
    shared = {"vocab_size": vocab_size, "embedding_size": embedding, "num_hidden_layers": layers}
    main = ElectraConfig(**shared, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width)
    # heads stay as wide as the discriminator's
    small = ElectraConfig(
        **shared, hidden_size=width // part, num_attention_heads=max(1, heads // part), intermediate_size=4 * width // part
    )
    options.setdefault("share", share)
    return Electra(ElectraForMaskedLM(small), ElectraForPreTraining(main), mask_id, special_ids, **options)
