"""The text side of tokens: what a vocabulary holds, and how a model gets another one.

A tokenizer is one of transformers, one of tokenizers, or the path of a tokenizer.json or of a folder with one.

`train_bpe` and `supertokens` make tokenizers, `bits_per_byte` compares models that have different ones, `Mean` and `Drawn` are
the baselines of everything that finds rows for a new vocabulary.
"""

from ._corpus import bits_per_byte, train_bpe
from ._rows import Drawn, Initialiser, Mean, Rows, Transplant
from ._vocabulary import Vocabulary, vocabulary
from .tokenadapt import supertokens

__all__ = [
    "Drawn",
    "Initialiser",
    "Mean",
    "Rows",
    "Transplant",
    "Vocabulary",
    "bits_per_byte",
    "supertokens",
    "train_bpe",
    "vocabulary",
]
