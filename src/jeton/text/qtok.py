"""Qtok: what a tokenizer's vocabulary consists of, entry by entry."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..registry import register
from ._vocabulary import Vocabulary, vocabulary

CATEGORIES = (
    "control_tokens", "pure_unicode", "char_alpha", "spaced_alpha", "inner_alpha", "char_other", "spaced_other", "inner_other",
    "unicode_flanks", "char_errors", "spaced_errors", "inner_errors",
)  # fmt: skip

# first words of Unicode character names that name a script
SCRIPTS = frozenset(
    """ADLAM ARABIC ARMENIAN BALINESE BAMUM BATAK BENGALI BLACK-LETTER BOPOMOFO BRAILLE BUGINESE CANADIAN CHAKMA CHAM CHEROKEE CJK
    COPTIC CYRILLIC DESERET DEVANAGARI DINGBAT EGYPTIAN ETHIOPIC GEORGIAN GLAGOLITIC GOTHIC GREEK GUJARATI GURMUKHI HANGUL HEBREW
    HIRAGANA INSCRIPTIONAL JAVANESE KAITHI KANGXI KANNADA KATAKANA KHMER LAO LATIN LEPCHA LIMBU LISU MALAYALAM MANDAIC MEETEI MODI
    MONGOLIAN MYANMAR NKO OGHAM OL OLD ORIYA PHAGS-PA PHOENICIAN RUNIC SAMARITAN SHAVIAN SINHALA SUNDANESE SYRIAC TAGALOG TAGBANWA
    TAI TAMIL TELUGU THAANA THAI TIBETAN TIFINAGH YI""".split()  # noqa: SIM905
)
_TAGS = frozenset("a b br em h1 h2 h3 h4 h5 h6 i img li p td th tr u".split())  # noqa: SIM905
_WIDTHS = ("HALFWIDTH", "FULLWIDTH")  # the script's name follows
_INHERITED = ("COMBINING", "ZERO WIDTH JOINER", "ZERO WIDTH NON-JOINER", "VARIATION SELECTOR")  # of the letter in front


@register(
    title="Qtok: A Comprehensive Framework for Evaluating Multilingual Tokenizer Quality in Large Language Models",
    year=2024,
    source="arXiv:2410.12989",
    family="text",
    stage="vocabulary",
)
@dataclass(frozen=True)
class Qtok:
    """Classify every entry of one or several vocabularies, and compare what they consist of.

    An entry is, in this order: a control token (special, or ``<...>`` or ``[...]`` but for common HTML tags); bytes that are no
    whole characters, one (pure_unicode) or more (unicode_flanks); one character (char); characters behind a space (spaced); or
    others (inner). The last three are alpha where all characters belong to one script, errors where one has no Unicode name, and
    other else: digits, signs, mixtures. A script is the first word of the character's name, behind FULLWIDTH and HALFWIDTH;
    combining marks and joiners belong to what they stand on.

    The report has counts and percentages of the twelve categories, the share of each script among alpha entries, and with
    `languages` (entry to the languages it occurs in, with or without the leading space: see `seen_in`) the share of each
    language: an entry of more than one character that k languages use counts 1/k for each. Scripts below `least_script` percent
    in all tokenizers, and languages below `least_language`, are put together as Other. `alphabets` (name to characters) adds
    completeness: the share of an alphabet that has entries of its own.

    ``print(Qtok().report({"one": tokenizer, "two": "path/tokenizer.json"}))``. Percentages are of a vocabulary; the
    authors' code divides language credit by a count of uses, so that its shares do not sum to 100.
    """

    languages: Mapping[str, Collection[str]] | None = None
    alphabets: Mapping[str, str] | None = None
    least_script: float = 1.0
    least_language: float = 0.5

    def report(self, tokenizers: Mapping[str, Any] | Any) -> Report:
        """Tables over named tokenizers (or one of them), and over the union of their entries, "all"."""
        named = tokenizers if isinstance(tokenizers, Mapping) else {"tokenizer": tokenizers}
        if not named:
            raise ValueError("there is no tokenizer to report on; give at least one.")
        if "all" in named:
            raise ValueError('"all" is the row of all vocabularies together; name the tokenizer otherwise.')
        entries = {name: _entries(vocabulary(one)) for name, one in named.items()}
        if len(entries) > 1:
            entries["all"] = list(dict.fromkeys(entry for some in entries.values() for entry in some))
        classes = {entry: classify(*entry) for entry in dict.fromkeys(entry for some in entries.values() for entry in some)}
        counts = {name: Counter(classes[entry][0] for entry in some) for name, some in entries.items()}
        scripts = {name: Counter(script for entry in some if (script := classes[entry][1])) for name, some in entries.items()}
        credit, unseen = {}, {}
        for name, some in entries.items():
            credit[name], unseen[name] = self._languages(entry for entry in some if classes[entry][1])
        return Report(
            {name: {category: count[category] for category in CATEGORIES} for name, count in counts.items()},
            _merged({name: _percent(count) for name, count in scripts.items()}, self.least_script),
            _merged({name: _percent(count) for name, count in credit.items()}, self.least_language),
            credit,
            unseen if self.languages is not None else {},
            {name: self._complete(some) for name, some in entries.items()} if self.alphabets else {},
        )

    def _languages(self, alpha: Iterable[tuple[bytes, bool]]) -> tuple[dict[str, float], int]:
        """Credit of each language, and how many entries the dictionary does not know."""
        credit: dict[str, float] = defaultdict(float)
        unseen = 0
        for piece, _ in alpha:
            text = piece.decode()
            if self.languages is None or len(text) < 2:
                continue
            using = self.languages.get(text) or self.languages.get(text.strip())
            unseen += not using
            for language in using or ():
                credit[language] += 1 / len(using or ())
        return dict(credit), unseen

    def _complete(self, some: list[tuple[bytes, bool]]) -> dict[str, float]:
        single = {piece for piece, special in some if not special}
        spaced = {piece[1:] for piece in single if piece[:1] == b" "}
        return {
            name: 100 * sum(char.encode() in single or char.encode() in spaced for char in set(letters)) / len(set(letters))
            for name, letters in (self.alphabets or {}).items()
        }


@dataclass(frozen=True)
class Report:
    """Tables by tokenizer. `counts` of the categories; `scripts` and `languages` in percent, the rare ones together; `credit` of
    each language in entries; `unseen`, alpha entries that the dictionary lacks; `completeness` of alphabets in percent."""

    counts: dict[str, dict[str, int]]
    scripts: dict[str, dict[str, float]]
    languages: dict[str, dict[str, float]]
    credit: dict[str, dict[str, float]] = field(repr=False)
    unseen: dict[str, int]
    completeness: dict[str, dict[str, float]]

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """The categories in percent of each vocabulary."""
        return {name: _percent(count) for name, count in self.counts.items()}

    def __str__(self) -> str:
        """All tables as Markdown, a tokenizer a column."""
        parts = [_table("entries", {name: {"all": sum(count.values()), **count} for name, count in self.counts.items()})]
        shown = {"% of entries": self.shares, "% of alpha entries, by script": self.scripts}
        more = {"% of known alpha entries, by language": self.languages, "% of alphabet": self.completeness}
        parts += [_table(title, table) for title, table in {**shown, **more}.items() if any(table.values())]
        return "\n\n".join(parts)


def classify(piece: bytes, special: bool = False) -> tuple[str, str | None]:
    """The category of an entry, and its script where it is alpha."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return ("pure_unicode" if len(piece) == 1 else "unicode_flanks"), None
    if special or _control(text):
        return "control_tokens", None
    if len(text) == 1:
        place, letters = "char", text
    else:
        place, letters = ("spaced", text[1:]) if text[:1] == " " else ("inner", text)
    names = [unicodedata.name(char, "") for char in letters]
    if not all(names):
        return f"{place}_errors", None
    scripts = {_script(name) for name in names if not name.startswith(_INHERITED)}
    script = scripts.pop() if len(scripts) == 1 else ""
    return (f"{place}_alpha", script) if script in SCRIPTS else (f"{place}_other", None)


def seen_in(tokenizers: Iterable[Any], texts: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """Which languages use which entries: all that occur when the tokenizers encode each language's texts."""
    found: dict[str, set[str]] = defaultdict(set)
    kept = {language: list(some) for language, some in texts.items()}
    for words in map(vocabulary, tokenizers):
        for language, some in kept.items():
            used = {id for one in words.tokenizer.encode_batch(some, add_special_tokens=False) for id in one.ids}
            for id in used - words.special:
                if (text := words.text(id)) is not None:
                    found[text].add(language)
    return dict(found)


# -- private -----------------------------------------------------------------------------------------------------------


def _entries(words: Vocabulary) -> list[tuple[bytes, bool]]:
    """(bytes, special) of every entry."""
    return [(words.bytes[id], id in words.special) for id in words.ids]


def _control(text: str) -> bool:
    if len(text) < 3 or (text[0], text[-1]) not in (("<", ">"), ("[", "]")):
        return False
    return text[1:-1].lower().strip("/ ") not in _TAGS


def _script(name: str) -> str:
    first, _, rest = name.partition(" ")
    return rest.partition(" ")[0] if first in _WIDTHS else first


def _percent(count: Mapping[str, float]) -> dict[str, float]:
    total = sum(count.values())
    return {name: 100 * value / total if total else 0.0 for name, value in count.items()}


def _merged(tables: dict[str, dict[str, float]], least: float) -> dict[str, dict[str, float]]:
    """The tables, largest rows first, with rows that reach `least` nowhere together as Other."""
    most: dict[str, float] = defaultdict(float)
    for table in tables.values():
        for name, value in table.items():
            most[name] = max(most[name], value)
    kept = sorted((name for name in most if most[name] >= least), key=lambda name: (-most[name], name))
    merged = {}
    for column, table in tables.items():
        merged[column] = {name: table.get(name, 0.0) for name in kept}
        if len(kept) < len(most):
            merged[column]["Other"] = sum(value for name, value in table.items() if name not in kept)
    return merged


def _table(title: str, columns: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in names:
        cells = (column.get(name, 0) for column in columns.values())
        lines.append(f"| {name} | {' | '.join(str(cell) if isinstance(cell, int) else f'{cell:.2f}' for cell in cells)} |")
    return "\n".join(lines)
