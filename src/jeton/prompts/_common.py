"""Prompts as tokens: which tokens make a word, which begin, end or pad; and the text encoder that reads them.

Shapes: B prompts, T tokens of each (padded), D width of an encoder's output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

UNLIMITED = 100_000  # tokenizers without a length of their own say a very large one


@dataclass(frozen=True)
class TokenSlots:
    """What stands where in tokenized prompts. `ids` (B, T); `real` (B, T) true where no padding; `begin` (B, T) true at the
    begin-of-text token, nowhere if the tokenizer has none; `end` (B,) the last real position, where end-of-text stands;
    `offsets` (B, T, 2) the characters each token covers, none for special tokens."""

    texts: tuple[str, ...]
    ids: Tensor
    real: Tensor
    begin: Tensor
    end: Tensor
    offsets: Tensor

    @property
    def words(self) -> Tensor:
        """(B, T) true at the tokens of the text itself."""
        return self.offsets[..., 1] > self.offsets[..., 0]

    def find(self, phrases: Sequence[str]) -> Tensor:
        """(B, T) true at every token of every occurrence of the phrases, as whole words, whatever their case. A phrase that a
        prompt lacks, or of which a token was cut off, is an error."""
        found = torch.zeros_like(self.real)
        for row, text in enumerate(self.texts):
            for phrase in phrases:
                spans = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", text, re.IGNORECASE)]
                if not phrase.strip() or not spans:
                    raise ValueError(f"{phrase!r} is not among the words of {text!r}.")
                for start, stop in spans:
                    if int(self.offsets[row, :, 1].max()) < stop:
                        raise ValueError(f"{phrase!r} was cut off: {text!r} is longer than {self.ids.shape[1]} tokens.")
                    found[row] |= self.words[row] & (self.offsets[row, :, 0] < stop) & (self.offsets[row, :, 1] > start)
        return found


def token_slots(tokenizer: PreTrainedTokenizerBase, prompts: str | Sequence[str], length: int | None = None) -> TokenSlots:
    """Tokenize prompts, padded and cut to `length` (by default the longest the tokenizer allows, 77 for CLIP)."""
    if not tokenizer.is_fast:
        raise TypeError(f"{type(tokenizer).__name__} does not say which characters a token covers; load the fast tokenizer.")
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if length is None and tokenizer.model_max_length > UNLIMITED:
        raise ValueError("this tokenizer has no longest length; say how many tokens the model takes, length=....")
    out = tokenizer(
        list(texts), padding="max_length", max_length=length or tokenizer.model_max_length, truncation=True,
        return_offsets_mapping=True, return_special_tokens_mask=True, return_attention_mask=True, return_tensors="pt",
    )  # fmt: skip
    real = out["attention_mask"].bool()
    place = torch.arange(real.shape[1]).expand_as(real)
    first = torch.where(real, place, real.shape[1]).amin(1, keepdim=True)
    last = torch.where(real, place, -1).amax(1)
    # with one real token only it is the end: encoders of the T5 kind have no begin
    begin = (place == first) & (first < last[:, None]) & out["special_tokens_mask"].bool()
    offsets = out["offset_mapping"].masked_fill((~real | out["special_tokens_mask"].bool())[..., None], 0)
    return TokenSlots(texts, out["input_ids"], real, begin, last, offsets)


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of transformers (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel ...) with its tokenizer, as a
    text-to-image model reads it: `layer` None takes the last hidden state, as Stable Diffusion 1 and T5 are read; -2 the last
    but one, as SDXL reads both of its. `masked` hides padding from attention; most text-to-image models leave it visible."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    layer: int | None = None
    length: int | None = None
    masked: bool = False

    def slots(self, prompts: str | Sequence[str]) -> TokenSlots:
        return token_slots(self.tokenizer, prompts, self.length)

    def __call__(self, slots: TokenSlots) -> Tensor:
        """(B, T, D)."""
        device = next(self.model.parameters()).device
        inputs: dict[str, Any] = {"input_ids": slots.ids.to(device)}
        if self.masked:
            inputs["attention_mask"] = slots.real.long().to(device)
        if self.layer is None:
            return self.model(**inputs).last_hidden_state
        return self.model(**inputs, output_hidden_states=True).hidden_states[self.layer]
