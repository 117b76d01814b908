"""Rows of an embedding table for a foreign vocabulary, and putting them into a model.

Most initialisers say of every new token which old tokens it is a mixture of. That is a sparse matrix, new by old: applied to the
input table and to the output table alike, it gives both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._vocabulary import Vocabulary, vocabulary

Embed = Callable[[list[str]], Any]
"""Vectors of strings: (N strings) to (N, e), a tensor or an array."""


@dataclass(frozen=True)
class Rows:
    """A matrix (new, old) by its entries: `row`, `column` and `weight` (E,). `copied` (new,) is the old id whose row a token
    takes over bit for bit, -1 for none. Tokens with neither are drawn."""

    row: Tensor
    column: Tensor
    weight: Tensor
    copied: Tensor

    @property
    def mixed(self) -> Tensor:
        """(new,) whether a token is a mixture."""
        found = torch.zeros(len(self.copied), dtype=torch.bool)
        found[self.row] = True
        return found & (self.copied < 0)

    @property
    def drawn(self) -> Tensor:
        """(new,) whether nothing is known of a token."""
        return (self.copied < 0) & ~self.mixed

    def apply(self, table: Tensor, seed: int = 0) -> Tensor:
        """The new table (new, d) of the old one (old, d) or (old,): mixed in float32; drawn rows have its mean and standard
        deviation in every dimension."""
        old = table.detach().float()
        cells = torch.stack([self.row, self.column]).to(old.device)
        size = (len(self.copied), old.shape[0])
        matrix = torch.sparse_coo_tensor(cells, self.weight.to(old.device), size, check_invariants=False)
        new = torch.sparse.mm(matrix, old.view(old.shape[0], -1)).view(-1, *old.shape[1:])
        drawn = self.drawn.to(old.device)
        noise = torch.randn(new.shape, generator=torch.Generator().manual_seed(seed)).to(old.device)
        new = torch.where(drawn.view(-1, *[1] * (old.dim() - 1)), old.mean(0) + old.std(0) * noise, new).to(table.dtype)
        kept = (self.copied >= 0).to(old.device)
        new[kept] = table.detach()[self.copied.to(old.device)[kept]]
        return new


@dataclass(frozen=True)
class Transplant:
    """What a transplant did: how many tokens were copied, mixed and drawn, of how many; and the rows it used."""

    tokens: int
    copied: int
    mixed: int
    drawn: int
    rows: Rows = field(repr=False)


class Initialiser:
    """Base of everything that finds rows for a new vocabulary. A subclass mixes the tokens that have no old counterpart."""

    ignore_case: bool = False

    def mixture(self, old: Vocabulary, new: Vocabulary, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Entries (row, column, weight) for the new tokens `ids`: each row's weights sum to 1; rows left out are drawn."""
        raise NotImplementedError(f"{type(self).__name__} must say how it mixes rows.")

    def rows(self, old: Any, new: Any, size: int | None = None) -> Rows:
        """Rows for the tokenizer `new` by those of the tokenizer `old`; with `size`, for a table that is padded to it."""
        source, target = vocabulary(old), vocabulary(new)
        copied = torch.full((max(size or 0, len(target)),), -1, dtype=torch.long)
        for id, origin in matches(source, target, self.ignore_case).items():
            copied[id] = origin
        todo = [id for id in target.ids if copied[id] < 0 and id not in target.special]
        row, column, weight = self.mixture(source, target, todo) if todo else _nothing()
        return Rows(row, column, weight, copied)

    def transplant(self, model: Any, old: Any, new: Any, *, multiple: int = 128, seed: int = 0) -> Transplant:
        """Give a model the tokenizer `new` in place of `old`, in the model itself: input and output tables, padded to a multiple,
        ids of special tokens in its configurations, and the chat template where the new tokenizer has none."""
        source, target = vocabulary(old), vocabulary(new)
        ids = _special_ids(model, source, target)
        table = model.get_input_embeddings().weight
        if len(source) > table.shape[0]:
            raise ValueError(
                f"the old tokenizer has {len(source)} entries, the model {table.shape[0]}; it is not the model's own."
            )
        size = -(-len(target) // multiple) * multiple
        rows = self.rows(source, target, size)
        place(model, rows, size, seed)
        for config, name, value in ids:
            setattr(config, name, value)
        if getattr(old, "chat_template", None) and hasattr(new, "chat_template") and not new.chat_template:
            new.chat_template = old.chat_template
        used = torch.zeros(size, dtype=torch.bool)
        used[target.ids] = True
        counts = [int((which & used).sum()) for which in (rows.copied >= 0, rows.mixed, rows.drawn)]
        return Transplant(len(target.ids), *counts, rows)


class Mean(Initialiser):
    """The baseline: the mean of the rows of the old tokens a new one is cut into (FVT; ReTok does the same)."""

    def mixture(self, old: Vocabulary, new: Vocabulary, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        row, column = pieces(old, new, ids)
        return row, column, within(torch.zeros(len(row)), row)


class Drawn(Initialiser):
    """The control: every new token drawn at random."""

    def mixture(self, old: Vocabulary, new: Vocabulary, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        return _nothing()


def place(model: Any, rows: Rows, size: int, seed: int = 0) -> None:
    """Put new rows into a model's input and output tables, tied or not, and into the output's bias."""
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outer is not None and outer.weight is inner.weight
    tables = {"in": rows.apply(inner.weight, seed)}
    if outer is not None and not tied:
        tables["out"] = rows.apply(outer.weight, seed + 1)
    bias = getattr(outer, "bias", None)
    if bias is not None:
        tables["bias"] = rows.apply(bias, seed + 2)
    model.resize_token_embeddings(size, mean_resizing=False)
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        inner.weight.copy_(tables["in"])
        if "out" in tables:
            outer.weight.copy_(tables["out"])
        if "bias" in tables:
            outer.bias.copy_(tables["bias"])


def matches(old: Vocabulary, new: Vocabulary, ignore_case: bool = False) -> dict[int, int]:
    """The old id of every new token that stands for the same bytes, or is a control token of the same name or role. With
    `ignore_case` also of those that do so but for case and surrounding space; the last old one of several."""
    found: dict[int, int] = {}
    names = {old.raw[id]: id for id in old.special}
    loose = {text.strip().lower(): id for id in old.ids if id not in old.special and (text := old.text(id)) and text.strip()}
    roles = {id: old.named[role] for role, id in new.named.items() if role in old.named}
    for id in new.ids:
        if id in new.special:
            origin = names.get(new.raw[id], roles.get(id))
        else:
            origin = old.by_bytes.get(new.bytes[id])
            if origin is None and ignore_case and (text := new.text(id)):
                origin = loose.get(text.strip().lower())
        if origin is not None:
            found[id] = origin
    return found


def pieces(old: Vocabulary, new: Vocabulary, ids: Iterable[int]) -> tuple[Tensor, Tensor]:
    """The old tokens that each new token is cut into, as pairs (E,), (E,) of a new id and an old one, in order."""
    cut = [(id, piece) for id in ids for piece in old.split(new.bytes[id])]
    pairs = torch.tensor(cut, dtype=torch.long).view(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def within(score: Tensor, group: Tensor) -> Tensor:
    """Softmax of scores (E,) within each group (E,) of equal labels."""
    if not len(score):
        return score
    _, group = group.unique(return_inverse=True)
    count = int(group.max()) + 1
    top = torch.full((count,), -torch.inf).scatter_reduce(0, group, score, "amax")
    raised = (score - top[group]).exp()
    return raised / torch.zeros(count).scatter_add(0, group, raised)[group]


def nearest(query: Tensor, keys: Tensor, k: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """The k keys (K, e) of largest cosine to each query (Q, e): cosines and places (Q, k). A vector of zeros is near nothing:
    cosine 0. Queries go in chunks, so that no (Q, K) map is held."""
    unit = F.normalize(keys, dim=-1)
    found = [(F.normalize(part, dim=-1) @ unit.T).topk(min(k, len(keys)), dim=-1) for part in query.split(chunk)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def vectors(embed: Embed, strings: Sequence[str]) -> Tensor:
    """(N, e) float vectors of strings, each distinct string embedded once."""
    distinct = list(dict.fromkeys(strings))
    made = torch.as_tensor(embed(distinct)).detach().float().cpu()
    if made.dim() != 2 or len(made) != len(distinct):
        raise ValueError(f"the embedder must give one vector per string, ({len(distinct)}, e); it gave {tuple(made.shape)}.")
    place_of = {string: number for number, string in enumerate(distinct)}
    return made[torch.tensor([place_of[string] for string in strings], dtype=torch.long)]


def hashed_ngrams(strings: list[str], *, longest: int = 4, width: int = 512) -> Tensor:
    """(N, width) vectors of strings by their spelling: counts of character n-grams up to `longest`, word ends marked, each in a
    place and with a sign that its hash gives. An embedder that needs no model."""
    row: list[int] = []
    code: list[int] = []
    for number, string in enumerate(strings):
        marked = f"\x02{string}\x03"
        grams = [marked[at : at + n] for n in range(1, longest + 1) for at in range(len(marked) - n + 1)]
        code += [crc32(gram.encode("utf-8", "surrogatepass")) for gram in grams]
        row += [number] * len(grams)
    hashed = torch.tensor(code, dtype=torch.long)
    sign = ((hashed >> 31) * 2 - 1).float()
    cell = torch.tensor(row, dtype=torch.long) * width + hashed % width
    return torch.zeros(len(strings) * width).scatter_add(0, cell, sign).view(len(strings), width)


# -- private -----------------------------------------------------------------------------------------------------------


def _nothing() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0)


def _special_ids(model: nn.Module, old: Vocabulary, new: Vocabulary) -> list[tuple[Any, str, Any]]:
    """The (configuration, field, new value) of every token id that a model's configurations name."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config()) if config is not None}
    generation = getattr(model, "generation_config", None)
    changes = []
    names = {new.raw[one]: one for one in new.ids}
    for config in (*configs.values(), *([generation] if generation is not None else [])):
        for name, value in list(config.to_dict().items()):
            if not name.endswith(("_token_id", "_token_index")) or value is None:
                continue
            role = name.partition("_token_")[0]
            if role in new.named:
                changes.append((config, name, new.named[role]))
                continue
            asked = value if isinstance(value, list) else [value]
            strings = [old.raw[one] if 0 <= one < len(old) else None for one in asked]
            found = [names[string] for string in strings if string in names]
            if found:
                changes.append((config, name, found if isinstance(value, list) else found[0]))
            elif role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start", "forced_bos", "forced_eos"):
                changes.append((config, name, None))
            else:
                lost = ", ".join(str(string) for string in strings)
                raise ValueError(f"the model's {name} is {lost}, which the new tokenizer has not; add it as a special token.")
    return changes
