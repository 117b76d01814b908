"""TokenAdapt: rows for a new vocabulary by what a token consists of and by what it resembles; and supertokens."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from ..registry import register
from ._corpus import train_bpe
from ._rows import Embed, Initialiser, hashed_ngrams, nearest, pieces, vectors, within
from ._vocabulary import Vocabulary


@register(
    title="Achieving Tokenizer Flexibility in Language Models through Heuristic Adaptation and Supertoken Learning",
    year=2025,
    source="arXiv:2505.09738",
    family="text",
    stage="vocabulary",
)
@dataclass(frozen=True)
class TokenAdapt(Initialiser):
    """Give a language model another tokenizer without training: new rows are mixtures of old ones.

    A token that stands for the same bytes as an old one takes over its row. Any other, with string s, is
    (1 - share) local + share global, by an external embedder f of strings:

    local: the old tokenizer cuts s into s_1..s_m; with sim_i = cos(f(s), f(s_i)), w = softmax(sim / T) and
    len_i = |s_i| / |s| in characters, the rows of the s_i are mixed by softmax(((w + len) / 2) / T). `weighting="raw"` is an
    earlier version, with sim in the place of w.

    global: the k old tokens nearest to s by cos of f are mixed by softmax(sim / T).

    Where one fails the other stands alone; where both do the row is drawn with the old table's mean and deviation. Old tokens
    below `threshold` do not count as neighbours, and count as sim 0 in local. Pieces that are no whole characters have no f: they
    are mixed by length alone and have no neighbours. The output table, where it is not tied, gets the same mixtures.

    `embed` maps a list of strings to vectors (N, e), such as ``SentenceTransformer(...).encode`` (the paper takes
    nomic-embed-text-v2-moe); the default compares spellings and needs no model. `ignore_case`, as in the authors' code, also
    copies rows between tokens that differ only in case or surrounding space ("US" and "us" become one).

    ``TokenAdapt().transplant(model, old_tokenizer, new_tokenizer)`` changes the model; ``rows(old, new)`` gives the mixtures.
    """

    embed: Embed | None = None
    k: int = 3
    temperature: float = 0.3
    share: float = 0.3
    threshold: float | None = None
    weighting: str = "softmax"
    ignore_case: bool = False

    def __post_init__(self) -> None:
        if self.weighting not in ("softmax", "raw"):
            raise ValueError(f'weighting must be "softmax" or "raw", got {self.weighting!r}.')
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} of the global heuristic must be between 0 and 1.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")
        if self.k < 1:
            raise ValueError(f"k={self.k} neighbours are too few; give at least 1.")

    def mixture(self, old: Vocabulary, new: Vocabulary, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        whole = [id for id in ids if new.text(id)]
        known = [id for id in old.ids if id not in old.special and old.text(id)]
        made = vectors(self.embed or hashed_ngrams, [old.text(id) or "" for id in known] + [new.text(id) or "" for id in whole])
        keys, queries = made[: len(known)], made[len(known) :]
        near_row, near_column, near = self._global(torch.tensor(whole), torch.tensor(known), queries, keys)
        part_row, part_column = pieces(old, new, ids)
        part = self._local(part_row, part_column, old, new, dict(zip(whole, queries)), dict(zip(known, keys)))
        if self.share == 0 and len(part_row):
            near_row, near_column, near = near_row[:0], near_column[:0], near[:0]
        if self.share == 1 and len(near_row):
            part_row, part_column, part = (
                one[torch.isin(part_row, near_row, invert=True)] for one in (part_row, part_column, part)
            )
        near = near * torch.where(torch.isin(near_row, part_row), self.share, 1.0)
        part = part * torch.where(torch.isin(part_row, near_row), 1 - self.share, 1.0)
        return torch.cat([part_row, near_row]), torch.cat([part_column, near_column]), torch.cat([part, near])

    def local_weights(self, similarity: Tensor, length: Tensor, group: Tensor | None = None) -> Tensor:
        """Weights (E,) of pieces by their similarity to the whole and their share of its length, within each group."""
        group = torch.zeros(len(similarity), dtype=torch.long) if group is None else group
        likeness = within(similarity / self.temperature, group) if self.weighting == "softmax" else similarity
        return within((likeness + length) / 2 / self.temperature, group)

    def _local(
        self, row: Tensor, column: Tensor, old: Vocabulary, new: Vocabulary, query: dict[int, Tensor], key: dict[int, Tensor]
    ) -> Tensor:
        if not len(row):
            return torch.zeros(0)
        pairs = list(zip(row.tolist(), column.tolist()))
        nothing = torch.zeros_like(next(iter(key.values()), torch.zeros(1)))
        similarity = F.cosine_similarity(
            torch.stack([query.get(id, nothing) for id, _ in pairs]),
            torch.stack([key.get(id, nothing) for _, id in pairs]),
            dim=-1,
        )
        if self.threshold is not None:
            similarity = similarity.masked_fill(similarity < self.threshold, 0)
        length = torch.tensor([_length(old, piece) / _length(new, id) for id, piece in pairs])
        return self.local_weights(similarity, length, row)

    def _global(self, row: Tensor, column: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not len(row) or not len(column):
            return row[:0].long(), row[:0].long(), torch.zeros(0)
        similarity, place = nearest(query, key, self.k)
        kept = (similarity > 0) if self.threshold is None else similarity >= self.threshold
        rows = row[:, None].expand_as(place)[kept]
        return rows, column[place][kept], within(similarity[kept] / self.temperature, rows)


def supertokens(
    texts: Iterable[str],
    size: int,
    *,
    words: Sequence[float] = (0.4, 0.3, 0.2, 0.1),
    tail: float = 0.25,
    seed: int = 0,
    special: Sequence[str] = (),
) -> Tokenizer:
    """A byte-level BPE tokenizer whose tokens may hold several words.

    Before training, texts are cut at random word starts rather than at every one, and merges may span the spaces inside a chunk;
    encoding needs no cuts. The law of chunk lengths is ours: `words[i]` is the probability of i + 1 words, and a chunk of the
    longest kind grows by one word more with probability `tail`, again and again.
    """
    if not words or min(words) < 0 or abs(sum(words) - 1) > 1e-6:
        raise ValueError(f"words={tuple(words)} are the probabilities of chunks of 1, 2, ... words; they must sum to 1.")
    if not 0 <= tail < 1:
        raise ValueError(f"tail={tail} is a probability below 1.")
    chance = random.Random(seed)

    def cut(text: str) -> Iterable[str]:
        starts = [at for at in range(1, len(text)) if text[at].isspace() and not text[at - 1].isspace()]
        chunks, begin, number = [], 0, 0
        while number < len(starts):
            wanted = chance.choices(range(1, len(words) + 1), words)[0]
            while wanted >= len(words) and chance.random() < tail:
                wanted += 1
            number += wanted
            if number <= len(starts):
                chunks.append(text[begin : starts[number - 1]])
                begin = starts[number - 1]
        return [*chunks, text[begin:]]

    return train_bpe(texts, size, cut=cut, special=special)


def _length(words: Vocabulary, id: int) -> int:
    """Characters of a token; where it is no whole characters, its bytes."""
    text = words.text(id)
    return max(1, len(words.bytes[id]) if text is None else len(text))
