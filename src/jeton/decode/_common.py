"""Drafts as trees, their forward through the target model, acceptance rules, and the commit to the cache.

Shapes: B rows, T nodes of a tree, V tokens of the vocabulary. Node 0 is the root: the last committed token, which is not in the
cache yet. All rows share the shape of the tree; their tokens differ.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..method import Unsupported


@dataclass(frozen=True)
class Shape:
    """The shape of a draft tree: the parent of every node, parents before children; the root's parent is -1."""

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != -1 or any(not 0 <= p < n for n, p in enumerate(self.parents) if n):
            raise ValueError(f"a tree lists parents before their children and begins with the root's -1, got {self.parents!r}.")

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Nodes by depth, the root's level left out."""
        return tuple(tuple(n for n, d in enumerate(self.depths) if d == depth) for depth in range(1, max(self.depths) + 1))

    def ancestors(self, device: Any = None) -> Tensor:
        """(T, T) true where the second node is the first one or one of its ancestors: what a node may look at."""
        seen = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if node:
                seen[node] |= seen[parent]
        return seen.to(device)


@dataclass
class Told:
    """What decoding cost: new tokens (of all rows), forwards of the target after the prompt, tokens gained by each (mean over the
    rows still running), and seconds. `mean_accepted` is tokens per row and forward."""

    tokens: int = 0
    forwards: int = 0
    gained: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def mean_accepted(self) -> float:
        return sum(self.gained) / len(self.gained) if self.gained else 0.0


@dataclass(frozen=True)
class Decoded:
    """`sequences` (B, L + N): prompt and answer, padded behind; `told`: what it cost."""

    sequences: Tensor
    told: Told


class Target:
    """The model that has the last word, with its cache and the columns in it.

    It takes what a transformers causal or vision-language model takes, batches padded on the left included, and works under
    `jeton.apply`: columns are counted as the whole conversation has them, whatever a method has taken out.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 1:
            raise ValueError("decoding needs input_ids (B, L) of at least one token.")
        attention = getattr(model.config, "_attn_implementation", None) or ""
        if "flash" in attention or "flex" in attention:
            raise Unsupported(
                f"{type(model).__name__} runs {attention}, which takes no mask in the form of a tree; load it with "
                'attn_implementation="sdpa".'
            )
        self.model, self.cache = model, DynamicCache(config=model.config)
        if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
            raise Unsupported(f"{type(model).__name__} has sliding-window layers, whose cache cannot keep a path of a tree.")
        mask = inputs.get("attention_mask")
        self.valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if not self.valid[:, -1].all():
            raise ValueError("prompts must be padded on the left: the last column must hold a token of every row.")
        inner, ids = getattr(model, "model", None), (self.valid.cumsum(1) - 1).clamp_min(0)
        self.rows = 3 if hasattr(inner, "get_rope_index") else 1  # positions by time, height and width, equal in text
        shown = self.rows > 1 and any(name.endswith("grid_thw") for name in inputs)
        if not shown:  # else the model numbers its pictures itself
            inputs = {**inputs, "position_ids": ids if self.rows == 1 else ids.expand(self.rows, -1, -1)}
        inputs = {**inputs, "attention_mask": self.valid.long(), "past_key_values": self.cache, "use_cache": True}
        self.first = model(**inputs, logits_to_keep=1).logits  # (B, 1, V) what follows the prompt
        # (B, 1) position of what follows
        self.position = self.valid.sum(1, keepdim=True) + (inner.rope_deltas.view(-1, 1) if shown else 0)

    def forward(self, shape: Shape, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of every node of a tree with these tokens (B, T), each after its own path."""
        batch, nodes = tokens.shape
        seen = shape.ancestors(tokens.device)
        seen = torch.cat([self.valid[:, None].expand(-1, nodes, -1), seen.expand(batch, -1, -1)], -1)[:, None]
        dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=tokens.device).masked_fill(~seen, torch.finfo(dtype).min)
        ids = self.position + torch.tensor(shape.depths, device=tokens.device)
        if self.rows > 1:  # in text all rows are equal
            ids = ids.expand(self.rows, -1, -1)
        self.tree = nodes
        return self.model(
            input_ids=tokens, attention_mask=mask, position_ids=ids, past_key_values=self.cache, use_cache=True
        ).logits

    def commit(self, nodes: Tensor, accepted: Tensor) -> None:
        """Keep, of the tree's columns, those of the accepted nodes (B, A), in path order; `accepted` (B, A) says which are real.
        Rows that accepted fewer get columns nobody may look at."""
        tree = self.tree
        for layer in self.cache.layers:
            start = layer.keys.shape[2] - tree
            at = (nodes + start)[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys = torch.cat([layer.keys[:, :, :start], layer.keys.gather(2, at)], 2)
            at = at[..., :1].expand(-1, -1, -1, layer.values.shape[3])
            layer.values = torch.cat([layer.values[:, :, :start], layer.values.gather(2, at)], 2)
        self.valid = torch.cat([self.valid, accepted], 1)
        self.position = self.position + accepted.sum(1, keepdim=True)


def verify(shape: Shape, tokens: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Walk down the tree: from each accepted node to the first child that holds the token the target wants after it.

    `tokens` (B, T) of the nodes, `wanted` (B, T) what the target puts after each: its argmax (then the output is that of greedy
    decoding), or one draw from its distribution (then the output is distributed as its own sampling). Gives the accepted nodes
    (B, A) from the root on, which of them are real (B, A), and the next token (B, 1): what is wanted after the last one.
    """
    batch = tokens.shape[0]
    parents = torch.tensor(shape.parents, device=tokens.device)
    fits = tokens[:, 1:] == wanted.gather(1, parents[None, 1:].expand(batch, -1))
    rows = torch.arange(batch, device=tokens.device)
    at = torch.zeros(batch, dtype=torch.long, device=tokens.device)
    nodes, real = [at], [torch.ones(batch, dtype=torch.bool, device=tokens.device)]
    for level in shape.levels:
        ids = torch.tensor(level, device=tokens.device)
        hit = fits[:, ids - 1] & (parents[ids][None] == at[:, None]) & real[-1][:, None]
        found = hit.any(1)
        # the first of siblings that hold the same token: a second draw below another would be a second chance
        at = torch.where(found, ids[hit.to(torch.uint8).argmax(1)], at)
        nodes.append(at)
        real.append(found)
    return torch.stack(nodes, 1), torch.stack(real, 1), wanted[rows, at][:, None]


def warpers(temperature: float, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    """The processors of sampling, as transformers applies them."""
    chain = LogitsProcessorList()
    if temperature != 1.0:
        chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p))
    return chain


def draw(logits: Tensor, chain: LogitsProcessorList, generator: torch.Generator | None = None) -> Tensor:
    """(B, T) one token for every node from its warped distribution."""
    batch, nodes, vocabulary = logits.shape
    flat = chain(None, logits.reshape(-1, vocabulary).float())  # type: ignore[arg-type]
    return torch.multinomial(flat.softmax(-1), 1, generator=generator).view(batch, nodes)


class Writer:
    """Collects what is committed, row by row, and knows when all rows are done."""

    def __init__(self, prompt: Tensor, most: int, ends: Sequence[int], pad: int) -> None:
        self.prompt, self.most, self.pad = prompt, most, pad
        self.ends = torch.tensor(sorted(ends), device=prompt.device, dtype=torch.long)
        self.rows = prompt.new_full((prompt.shape[0], most), pad)
        self.count = torch.zeros(prompt.shape[0], dtype=torch.long, device=prompt.device)
        self.done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        self.told, self.start = Told(), time.perf_counter()

    def begin(self, tokens: Tensor) -> bool:
        """The first tokens (B, 1), which came of the prompt's own forward."""
        done = self.add(tokens, torch.ones_like(tokens, dtype=torch.bool))
        self.told.forwards, self.told.gained = 0, []
        return done

    def add(self, tokens: Tensor, real: Tensor) -> bool:
        """Append the real ones of `tokens` (B, A), up to the end token or the limit; true when nothing is left to do."""
        real = real & ~self.done[:, None]
        ended = torch.isin(tokens, self.ends) & real
        real &= (ended.cumsum(1) - ended.long()) == 0
        place = self.count[:, None] + real.cumsum(1) - 1
        real &= place < self.most
        spare = torch.where(real, place, self.most)
        self.rows = torch.nn.functional.pad(self.rows, (0, 1)).scatter(1, spare, tokens)[:, : self.most]
        gained, running = real.sum(1), int((~self.done).sum())
        self.count = self.count + gained
        self.done = self.done | (ended & real).any(1) | (self.count >= self.most)
        self.told.forwards += 1
        self.told.gained.append(float(gained.sum()) / max(1, running))
        return bool(self.done.all())

    def finish(self) -> Decoded:
        self.told.tokens, self.told.seconds = int(self.count.sum()), time.perf_counter() - self.start
        beyond = torch.arange(self.most, device=self.rows.device) >= self.count[:, None]
        rows = self.rows.masked_fill(beyond, self.pad)[:, : int(self.count.max())]
        return Decoded(torch.cat([self.prompt, rows], 1), self.told)


def ends_of(model: nn.Module, eos_token_id: int | Sequence[int] | None) -> list[int]:
    """The end tokens: those given, else the model's own."""
    ends = getattr(model.generation_config, "eos_token_id", None) if eos_token_id is None else eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
