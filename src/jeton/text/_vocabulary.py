"""What a tokenizer's entries stand for: the bytes behind each id, whatever alphabet the tokenizer writes them in.

Byte-level BPE writes every byte as a printable character of its own, SentencePiece writes a space as ▁ and lone bytes as <0xNN>,
WordPiece marks what continues a word with ##. Here all of them are plain bytes, a word's leading space included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte: itself where it is printable, else U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


ALPHABET = byte_alphabet()
_BYTES = {char: byte for byte, char in ALPHABET.items()}


@dataclass(frozen=True)
class Vocabulary:
    """The entries of one tokenizer. `raw` are its own strings by id, None where an id is not used; `special` the ids of control
    tokens; `alphabet` how it writes text: "bytes", "sentencepiece", "wordpiece" or "plain"."""

    tokenizer: Tokenizer = field(repr=False)
    raw: tuple[str | None, ...] = field(repr=False)
    special: frozenset[int]
    plain: frozenset[int] = field(repr=False)  # entries added as they are, in no alphabet
    alphabet: str
    named: dict[str, int] = field(default_factory=dict)  # bos, eos, pad ... as far as they are known

    def __len__(self) -> int:
        return len(self.raw)

    @cached_property
    def ids(self) -> list[int]:
        """The ids in use, ascending."""
        return [id for id, raw in enumerate(self.raw) if raw is not None]

    @cached_property
    def bytes(self) -> tuple[bytes, ...]:
        """What each id stands for; empty where an id is not used. A control token stands for its name."""
        return tuple(self._bytes(id, raw) if raw is not None else b"" for id, raw in enumerate(self.raw))

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """The id that stands for these bytes, control tokens aside; the first of several."""
        found: dict[bytes, int] = {}
        for id in self.ids:
            if id not in self.special:
                found.setdefault(self.bytes[id], id)
        return found

    def text(self, id: int) -> str | None:
        """The entry as text, None where its bytes are no whole characters."""
        try:
            return self.bytes[id].decode("utf-8")
        except UnicodeDecodeError:
            return None

    def split(self, piece: bytes) -> list[int]:
        """The ids this tokenizer cuts some bytes into, without control tokens; those it has no entry for are left out."""
        text = piece.decode("utf-8", errors="ignore")
        if text.encode() == piece:
            ids = [id for id in self.tokenizer.encode(text, add_special_tokens=False).ids if id not in self.special]
            if b"".join(self.bytes[id] for id in ids) == piece:
                return ids
        return [id for id in self._by_model(piece) if id not in self.special]

    def _by_model(self, piece: bytes) -> list[int]:
        """Cut by the model alone, past normaliser, dummy prefix and splitting into words."""
        if self.alphabet == "bytes":
            return [token.id for token in self.tokenizer.model.tokenize("".join(ALPHABET[byte] for byte in piece))]
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError:
            return [self.by_bytes[one] for one in (bytes([byte]) for byte in piece) if one in self.by_bytes]
        written = text.strip() if self.alphabet == "wordpiece" else text.replace(" ", _SPACE) if self._marks_space else text
        return [token.id for token in self.tokenizer.model.tokenize(written)] if written else []

    @property
    def _marks_space(self) -> bool:
        return self.alphabet == "sentencepiece"

    def _bytes(self, id: int, raw: str) -> bytes:
        if id in self.special or id in self.plain:
            return raw.encode()
        if self.alphabet == "bytes" and all(char in _BYTES for char in raw):
            return bytes(_BYTES[char] for char in raw)
        if self.alphabet == "sentencepiece":
            byte = _BYTE.fullmatch(raw)
            return bytes([int(byte[1], 16)]) if byte else raw.replace(_SPACE, " ").encode()
        if self.alphabet == "wordpiece":
            return raw[2:].encode() if raw.startswith("##") else f" {raw}".encode()
        return raw.encode()


def vocabulary(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers or tokenizers, or of a tokenizer.json."""
    if isinstance(tokenizer, Vocabulary):
        return tokenizer
    backend = _backend(tokenizer)
    config = json.loads(backend.to_str())
    added = {entry["id"]: entry for entry in config["added_tokens"]}
    entries = backend.get_vocab(with_added_tokens=True)
    raw: list[str | None] = [None] * (max(entries.values(), default=-1) + 1)
    for string, id in entries.items():
        raw[id] = string
    special = {id for id, entry in added.items() if entry["special"]}
    unknown = config["model"].get("unk_token")
    if unknown is None and config["model"].get("unk_id") is not None:
        unknown = raw[config["model"]["unk_id"]]
    if unknown in entries:
        special.add(entries[unknown])
    named = {}
    for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"):
        id = getattr(tokenizer, f"{role}_token_id", None)
        if id is not None:
            named[role] = id
            special.add(id)
    return Vocabulary(backend, tuple(raw), frozenset(special), frozenset(added) - special, _alphabet(config), named)


def _backend(tokenizer: Any) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, str | Path):
        path = Path(tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there; give a tokenizer.json, a folder with one, or a tokenizer itself.")
        return Tokenizer.from_file(str(path))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise TypeError(f"{type(tokenizer).__name__} has no fast tokenizer behind it; load it by AutoTokenizer.from_pretrained.")
    return backend


def _alphabet(config: dict[str, Any]) -> str:
    parts = set(_types(config.get("decoder"))) | set(_types(config.get("pre_tokenizer")))
    if "ByteLevel" in parts:
        return "bytes"
    if parts & {"Metaspace", "ByteFallback"} or config["model"].get("byte_fallback"):
        return "sentencepiece"
    return "wordpiece" if config["model"]["type"] == "WordPiece" else "plain"


def _types(part: Any) -> Iterable[str]:
    """The types of a pre-tokenizer or decoder and of all it consists of."""
    if isinstance(part, dict):
        yield from [part["type"]] if "type" in part else []
        for value in part.values():
            yield from _types(value)
    elif isinstance(part, list):
        for value in part:
            yield from _types(value)
