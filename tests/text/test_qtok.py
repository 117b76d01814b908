"""Qtok: a vocabulary made by hand is classified exactly, and real ones sanely."""

from __future__ import annotations

import pytest

from jeton.text._corpus import train_bpe
from jeton.text._vocabulary import vocabulary
from jeton.text.qtok import CATEGORIES, Qtok, classify, seen_in

from .conftest import unigram, wordpiece

BY_HAND = {
    b"<s>": "control_tokens",
    b"\xd0": "pure_unicode",
    "д".encode(): "char_alpha",
    b" the": "spaced_alpha",
    "ция".encode(): "inner_alpha",
    b"7": "char_other",
    b" 42": "spaced_other",
    b"a1": "inner_other",
    b"a\xd0": "unicode_flanks",
    b"\n": "char_errors",
    b" \t": "spaced_errors",
    b"\n\n": "inner_errors",
}


def test_one_entry_of_each_kind():
    assert sorted(BY_HAND.values()) == sorted(CATEGORIES)
    assert {piece: classify(piece)[0] for piece in BY_HAND} == BY_HAND


@pytest.mark.parametrize(
    ("text", "category", "script"),
    [
        ("é", "char_alpha", "LATIN"),
        ("e\u0301t\u0301", "inner_alpha", "LATIN"),  # combining accents
        (" слово", "spaced_alpha", "CYRILLIC"),
        ("ﾊﾟ", "inner_alpha", "KATAKANA"),  # halfwidth
        ("ＡＢ", "inner_alpha", "LATIN"),  # fullwidth
        ("क्‍ष", "inner_alpha", "DEVANAGARI"),  # with a joiner
        ("東京", "inner_alpha", "CJK"),
        ("東と", "inner_other", None),
        ("aд", "inner_other", None),
        (" ", "char_other", None),
        ("  ", "spaced_other", None),
        ("<br>", "inner_other", None),
        ("</td>", "inner_other", None),
        ("[PAD]", "control_tokens", None),
        ("<|end|>", "control_tokens", None),
        ("[]", "inner_other", None),
    ],
)
def test_cases_where_it_matters(text, category, script):
    assert classify(text.encode()) == (category, script)


def test_a_special_token_is_one_whatever_it_looks_like():
    assert classify(b"plain", special=True) == ("control_tokens", None)
    report = Qtok().report(train_bpe(["a b"], 260, special=["BEGIN"]))
    assert report.counts["tokenizer"]["control_tokens"] == 1


def test_single_bytes_are_characters_or_parts_of_them(parallel):
    report = Qtok().report(train_bpe([], 256))
    counts = report.counts["tokenizer"]
    assert sum(counts.values()) == 256 and counts["pure_unicode"] == 128
    assert sum(count for name, count in counts.items() if name == "pure_unicode" or name.startswith("char_")) == 256


def test_no_entry_of_real_tokenizers_is_left_out_or_counted_twice(parallel):
    everything = [text for texts in parallel.values() for text in texts]
    made = {"bpe": train_bpe(everything, 3000), "unigram": unigram(everything, 2500), "wordpiece": wordpiece(everything, 2500)}
    report = Qtok().report(made)
    for name, tokenizer in made.items():
        assert sum(report.counts[name].values()) == tokenizer.get_vocab_size()
        assert sum(report.shares[name].values()) == pytest.approx(100)
        assert sum(report.scripts[name].values()) == pytest.approx(100)
    sizes = [tokenizer.get_vocab_size() for tokenizer in made.values()]
    assert max(sizes) < sum(report.counts["all"].values()) < sum(sizes)
    assert report.counts["unigram"]["unicode_flanks"] == 0 < report.counts["bpe"]["unicode_flanks"]
    assert "| control_tokens |" in str(report) and "CYRILLIC" in str(report)


def test_a_tokenizer_of_one_script_shows_it(parallel):
    russian = [" ".join(word for word in text.split() if word.isalpha() and not word.isascii()) for text in parallel["ru"]]
    report = Qtok().report({"ru": train_bpe(russian, 1500), "en": train_bpe(parallel["en"], 1500)})
    assert report.scripts["ru"]["CYRILLIC"] > 90  # the 52 single bytes that are Latin letters stand beside them
    assert report.scripts["en"]["CYRILLIC"] == 0 and report.scripts["en"]["LATIN"] > 99


def test_credit_is_shared_among_languages(parallel):
    texts = {language: parallel[language] for language in ("en", "de", "ru")}
    made = {"small": train_bpe(texts["en"], 500), "large": train_bpe([text for some in texts.values() for text in some], 2500)}
    seen = seen_in(made.values(), texts)
    report = Qtok(languages=seen).report(made)
    for name, tokenizer in made.items():
        words = vocabulary(tokenizer)
        alpha = [words.text(id) for id in words.ids if classify(words.bytes[id])[1] and len(words.text(id)) > 1]
        known = [text for text in alpha if text in seen or text.strip() in seen]
        assert sum(report.credit[name].values()) == pytest.approx(len(known))
        assert report.unseen[name] == len(alpha) - len(known)
        assert sum(report.languages[name].values()) == pytest.approx(100)
    assert report.languages["small"]["en"] > report.languages["large"]["en"]


def test_rare_rows_are_put_together():
    tokenizer = train_bpe(["word " * 5 + "слово"], 290)
    every, merged = Qtok(least_script=0).report(tokenizer), Qtok(least_script=20).report(tokenizer)
    rare = [share for share in every.scripts["tokenizer"].values() if share < 20]
    assert len(rare) >= 1 and merged.scripts["tokenizer"]["Other"] == pytest.approx(sum(rare))
    assert "Other" not in every.scripts["tokenizer"]


def test_completeness_of_an_alphabet(parallel):
    alphabets = {"russian": "абвгдежзийклмнопрстуфхцчшщъыьэюя", "latin": "abcdefghijklmnopqrstuvwxyz"}
    made = {"ru": train_bpe(parallel["ru"], 1500), "en": train_bpe(parallel["en"], 500)}
    report = Qtok(alphabets=alphabets).report(made)
    assert report.completeness["en"] == {"russian": 0, "latin": 100}
    assert report.completeness["ru"]["russian"] > 90


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        Qtok().report({})
    with pytest.raises(ValueError, match="name the tokenizer otherwise"):
        Qtok().report({"all": train_bpe([], 256)})
