"""Real text: Django's message catalogues in many languages, and the English of Python's own manual."""

from __future__ import annotations

import gettext
import importlib.util
import pydoc_data.topics
import random
import re
from functools import lru_cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LANGUAGES = ("de", "fr", "ru", "el", "ar", "hi", "ja", "ko", "tr", "vi")


@lru_cache
def messages(language: str) -> dict[str, str]:
    """English message to its translation."""
    root = Path(importlib.util.find_spec("django").origin).parent
    found = {}
    for path in sorted(root.rglob(f"{language}/LC_MESSAGES/django.mo")):
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog
        found.update({key: value for key, value in catalogue.items() if isinstance(key, str) and key and value})
    return found


@pytest.fixture(scope="session")
def parallel() -> dict[str, list[str]]:
    """The same messages in every language and in English."""
    shared = sorted(set.intersection(*(set(messages(language)) for language in LANGUAGES)))
    assert len(shared) > 200
    return {"en": shared} | {language: [messages(language)[key] for key in shared] for language in LANGUAGES}


@pytest.fixture(scope="session")
def prose() -> tuple[list[str], list[str]]:
    """Paragraphs of the manual to train on, and others held out."""
    topics = list(pydoc_data.topics.topics.values())
    random.Random(0).shuffle(topics)
    paragraphs = [" ".join(part.split()) for topic in topics for part in re.split(r"\n\s*\n", topic) if len(part) > 200]
    return paragraphs[60:], paragraphs[:60]


def unigram(texts: list[str], size: int) -> Tokenizer:
    """A SentencePiece-like tokenizer: ▁ for spaces, one in front."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wordpiece(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
