"""Training tokenizers under equal conditions, and scoring models that have different ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ._vocabulary import vocabulary

Cut = Callable[[str], Iterable[str]]


def train_bpe(texts: Iterable[str], size: int, *, cut: Cut | None = None, special: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer of `size` entries: the special tokens, 256 bytes, and merges.

    Merges stay inside words (GPT-2's splitting), or with `cut` inside the chunks that it cuts each text into: such chunks may
    hold spaces, and the tokenizer then splits nothing when it encodes. Where a text has fewer merges to offer than asked for, the
    vocabulary is smaller: see ``get_vocab_size()``.
    """
    if size < 256 + len(special):
        raise ValueError(f"size={size} is less than 256 bytes and {len(special)} special tokens.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    if cut is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer
    mark = "\ue000"  # of the private use area: no text has it
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(mark), "removed"), whole])
    tokenizer.train_from_iterator((mark.join(cut(text.replace(mark, ""))) for text in texts), trainer)
    tokenizer.pre_tokenizer = whole
    return tokenizer


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, texts: Iterable[str], *, window: int = 256, batch: int = 16) -> float:
    """How many bits a causal language model takes for a byte of text: the one measure that models with different tokenizers
    share. Total nats / ln 2 / total UTF-8 bytes.

    Texts longer than `window` tokens are read in pieces, each from its first token anew. A piece starts with the beginning-of-
    text token where the tokenizer names one; without, its first token cannot be predicted, and its bytes do not count.
    """
    words = vocabulary(tokenizer)
    start = words.named.get("bos")
    pieces, bytes_ = [], 0
    for text in texts:
        ids = words.tokenizer.encode(text, add_special_tokens=False).ids
        for at in range(0, len(ids), window):
            piece = ids[at : at + window]
            bytes_ += sum(len(words.bytes[id]) for id in (piece if start is not None else piece[1:]))
            pieces.append(piece if start is None else [start, *piece])
    if not bytes_:
        raise ValueError("there is no text to score: every piece is empty.")
    nats = 0.0
    pieces.sort(key=len)
    for group in _groups(pieces, batch):
        longest = max(map(len, group))
        ids = torch.tensor([piece + [0] * (longest - len(piece)) for piece in group], device=model.device)
        mask = torch.tensor([[1] * len(piece) + [0] * (longest - len(piece)) for piece in group], device=model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        nats += float((loss * mask[:, 1:]).double().sum())
    return nats / math.log(2) / bytes_


def _groups(pieces: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    for at in range(0, len(pieces), size):
        yield pieces[at : at + size]
