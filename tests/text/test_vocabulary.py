"""Entries of every kind of tokenizer are plain bytes."""

from __future__ import annotations

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jeton.text._corpus import train_bpe
from jeton.text._vocabulary import ALPHABET, vocabulary

from .conftest import unigram, wordpiece


def test_the_byte_alphabet_is_that_of_byte_level_tokenizers():
    assert len(set(ALPHABET.values())) == 256
    assert set(ALPHABET.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert ALPHABET[ord(" ")] == "Ġ" and ALPHABET[ord("\n")] == "Ċ" and ALPHABET[ord("a")] == "a"


@pytest.mark.parametrize("language", ["en", "ru", "hi", "ja"])
def test_bytes_of_the_tokens_make_the_text(parallel, language):
    texts = parallel[language]
    bpe = vocabulary(train_bpe(texts, 600, special=["<s>"]))
    assert bpe.alphabet == "bytes" and bpe.special == {0} and bpe.text(0) == "<s>"
    piecewise = vocabulary(unigram(texts, 600))
    assert piecewise.alphabet == "sentencepiece" and len(piecewise.special) == 3
    for text in texts[:100]:
        ids = bpe.tokenizer.encode(text).ids
        assert b"".join(bpe.bytes[id] for id in ids) == text.encode()
        assert bpe.split(text.encode()) == ids
        assert b"".join(bpe.bytes[id] for id in bpe.split(text.encode()[1:])) == text.encode()[1:]  # also from inside a character
        ids = piecewise.tokenizer.encode(" ".join(text.split())).ids
        whole = b"".join(piecewise.bytes[id] for id in ids).decode()
        assert whole.strip() == piecewise.tokenizer.normalizer.normalize_str(" ".join(text.split())).strip()


def test_wordpiece_marks_what_continues_a_word(parallel):
    words = vocabulary(wordpiece(parallel["en"], 400))
    assert words.alphabet == "wordpiece" and {words.raw[id] for id in words.special} == {"[UNK]", "[CLS]"}
    ids = words.tokenizer.encode("Enter a valid value").ids
    assert b"".join(words.bytes[id] for id in ids) == b" Enter a valid value"
    ids = words.tokenizer.encode("Entervalid").ids
    assert any(words.raw[id].startswith("##") for id in ids) and b"".join(words.bytes[id] for id in ids) == b" Entervalid"


def test_byte_fallback_entries_are_bytes():
    entries = [("<unk>", 0.0), ("▁a", -1.0), ("a", -2.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    tokenizer = Tokenizer(models.Unigram(entries, 0, byte_fallback=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = vocabulary(tokenizer)
    assert words.bytes[1] == b" a" and words.bytes[3 + 0xD0] == b"\xd0" and words.text(3 + 0xD0) is None
    assert [words.bytes[id] for id in words.split("aд".encode())] == [b"a", b"\xd0", b"\xb4"]
    assert words.split(b"\xd0") == [3 + 0xD0] and words.special == {0}
    assert words.by_bytes[b"a"] == 2 and words.bytes[3 + ord("a")] == b"a"  # the first of several


def test_every_way_to_name_a_tokenizer(tmp_path):
    plain = train_bpe(["one two three"], 270, special=["<s>", "</s>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    ways = [plain, fast, tmp_path, str(tmp_path / "tokenizer.json")]
    assert len({vocabulary(way).bytes for way in ways}) == 1
    assert vocabulary(fast).named == {"bos": 0, "eos": 1}
    with pytest.raises(FileNotFoundError, match="is not there"):
        vocabulary(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="no fast tokenizer"):
        vocabulary(3)
