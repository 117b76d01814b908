"""A tokenizer for the tiny models' vocabulary: named special tokens with the ids the models know, and words w10, w11, ..."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import tiny


def tokenizer(named: dict[str, int], **attributes: Any) -> transformers.PreTrainedTokenizerFast:
    """`named`: ids below WORDS, or anywhere else where no word is asked for; `attributes` are set on it."""
    words = {f"w{number}": number for number in range(tiny.VOCABULARY) if number not in named.values()}
    plain = Tokenizer(models.WordLevel({**words, **named}, unk_token="w11"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens(list(named))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0", padding_side="left")
    for name, value in attributes.items():
        setattr(made, name, value)
    return made
