"""Merged tokens that act in the language model's attention as if they stood at every place of those they were merged from.

The cache holds merged keys, each rotated to the place of its representative. At every layer queries and keys are repeated at all
places they stand for and rotated on from there, attention runs over the unreduced length with its causal mask, and results of one
token are averaged. Steps that bring no picture expand keys and values only. So attention costs what it costs without a reduction;
projections, MLPs and the cache are those of the short sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.rotation import between
from ..tokens import gather
from .aside import aside
from .flow import Cut, Flow, Step, Virtual
from .prompt import Prompt
from .tap import Attention, Listener


def remembered(prompt: Prompt, flow: Flow, made: Cut, ids: Tensor | None) -> Virtual:
    """Who stands for the columns of the whole conversation after a prompt was cut; `ids` (B or 1, L) are its position ids."""
    memory, view = prompt.memory, prompt.view
    assert ids is not None
    own = _owners(flow, made)
    like = made.index.new_zeros(own.shape[0], 1, dtype=torch.float32)
    cos, sin = (part.expand(own.shape[0], -1, -1) for part in view.rotary(like, ids))
    at = made.index.gather(1, own.clamp(min=0))  # where the owner stands in this prompt
    cos, sin = between(cos, sin, gather(cos, at), gather(sin, at))
    offset = 0 if memory.entry is None else memory.entry.offset
    before = _continued(memory.virtual, prompt.past, offset, own.shape[0], cos)
    held = prompt.past - offset
    owner = torch.where(own < 0, own, own + held)
    return Virtual(torch.cat([before.owner, owner], 1), torch.cat([before.cos, cos], 1), torch.cat([before.sin, sin], 1))


def _continued(known: Virtual | None, length: int, offset: int, batch: int, like: Tensor) -> Virtual:
    """What is known of the first columns, with those that follow standing for themselves up to `length`."""
    covered = 0 if known is None else known.owner.shape[1]
    tail = torch.arange(covered, length, device=like.device).expand(batch, -1) - offset
    one, none = like.new_ones(batch, length - covered, like.shape[2]), like.new_zeros(batch, length - covered, like.shape[2])
    if known is None:
        return Virtual(tail, one, none)
    return Virtual(torch.cat([known.owner, tail], 1), torch.cat([known.cos, one], 1), torch.cat([known.sin, none], 1))


def _owners(flow: Flow, made: Cut) -> Tensor:
    """(B, L) for every column of the prompt before the cut the column after it that stands for it, -1 where none does."""
    layout, short = flow.layout, made.index.shape[1]
    end = layout.batch * layout.length
    new = torch.arange(short, device=made.index.device).expand_as(made.index)
    spare = made.index if made.valid is None else made.index.masked_fill(~made.valid, layout.length)
    owner = new.new_full((layout.batch, layout.length + 1), -1).scatter(1, spare, new)[:, :-1]
    slot = _slots(flow)
    now = flow.columns.gather(1, slot.clamp(min=0))
    gone = (slot < 0) | (now == layout.batch * short)
    flat = torch.nn.functional.pad(owner.flatten(), (0, 1))
    visual = layout.columns
    structure = layout.album.place.structure
    now = torch.where(structure, flat[visual], (now % short).masked_fill(gone, -1))
    return flat.scatter(0, visual.flatten(), now.flatten())[:end].view(layout.batch, layout.length)


def _slots(flow: Flow) -> Tensor:
    """(R, M) for every token of an image the token that stands for it in the end, -1 where none does."""
    scene, album = flow.scene, flow.layout.album
    slots = torch.arange(album.source.shape[1], device=album.source.device)
    slot = slots.expand(album.source.shape[0], -1)
    if scene.encoded is not None:
        prefix, pictures = scene.encoded.prefix, scene.encoded.assign.shape[0]
        per = scene.encoded.n - prefix
        source = album.source[..., 0]
        patch = source.clamp(min=0)
        new = scene.encoded.assign[patch // per, patch % per + prefix]
        target = scene.encoded.index[patch // per, new.clamp(min=0)] - prefix + patch // per * per
        found = slot.new_full((slot.shape[0], pictures * per + 1), -1)
        found = found.scatter(1, source.masked_fill(source < 0, pictures * per), slot)[:, :-1]
        slot = torch.where((source < 0) | (new < 0), slot.masked_fill(new < 0, -1), found.gather(1, target))
    for step in scene.trail:
        slot = _followed(slot, step, slots.shape[0])
    return slot


def _followed(slot: Tensor, step: Step, slots: int) -> Tensor:
    """The same after one more reduction."""
    before, assign = step.before.slot, step.reduction.assign[:, step.prefix :]
    real = assign >= 0 if step.before.mask is None else (assign >= 0) & step.before.mask
    went = step.after.slot.gather(1, assign.clamp(min=0))
    table = slot.new_full((slot.shape[0], slots + 1), -1).scatter(1, before.masked_fill(~real, slots), went)[:, :-1]
    return torch.where(slot < 0, slot, table.gather(1, slot.clamp(min=0)))


class VirtualSite:
    """Stands in for every attention call of the language model while a conversation with merged tokens runs through it."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.maps: dict[int, tuple[Any, _Map]] = {}

    def attach(self) -> None:
        view, run = self.prompt.view, self.prompt.run
        run.hook(view.decoder.register_forward_pre_hook(self._fresh))
        for layer in view.layers:
            run.taps.listen(view.attention(layer), _Listener(self, layer))

    @aside
    def _fresh(self, module: nn.Module, args: tuple) -> None:
        self.maps.clear()

    def map(self) -> _Map | None:
        """The map of the layers that hold what the layer at hand does; made once a forward."""
        stage, virtual = self.prompt.stage, self.prompt.memory.virtual
        if virtual is None:
            return None
        if id(stage) not in self.maps:
            self.maps[id(stage)] = (stage, _Map.of(self.prompt, virtual))
        return self.maps[id(stage)][1]


@dataclass
class _Map:
    """owner (B, F): for every column of the unreduced conversation the layer's key that stands there. real (B, F): whether one
    does. query (B, f): the same for the columns of this forward, among its own queries; None where each stands for itself.
    cos, sin (B, F, d): the rotation from the owner's position."""

    owner: Tensor
    real: Tensor
    query: Tensor | None
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, prompt: Prompt, virtual: Virtual) -> _Map:
        full, entry, stage = prompt.past + prompt.new, prompt.memory.entry, prompt.stage
        whole = _continued(virtual, full, 0 if entry is None else entry.offset, len(virtual.owner), virtual.cos)
        owner, held = whole.owner, prompt.held
        if stage is not None:
            columns, valid = stage.kept.columns(prompt.total), stage.kept.real(prompt.total)
            spare = columns if valid is None else columns.masked_fill(~valid, prompt.total)
            rank = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
            table = owner.new_full((owner.shape[0], prompt.total + 1), -1).scatter(1, spare, rank)
            owner = torch.where(owner < 0, owner, table.gather(1, owner.clamp(min=0)))
            held = columns.shape[1] - (prompt.total - prompt.held if stage.cut is None else stage.cut.index.shape[1])
        real = owner >= 0
        if prompt.mask is not None:
            real = real & prompt.mask.bool()
        query = None if prompt.flow is None else owner[:, prompt.past :] - held
        return cls(owner.clamp(min=0), real, query, whole.cos, whole.sin)

    def mask(self, dtype: torch.dtype, queries: int) -> Tensor:
        """(B, 1, f, F) additive: causal, nobody but itself sees what is not there."""
        keys = torch.arange(self.owner.shape[1], device=self.owner.device)
        rows = keys[keys.shape[0] - queries :, None]
        allowed = (keys <= rows) & self.real[:, None, None] | (keys == rows)
        return torch.zeros(allowed.shape, dtype=dtype, device=keys.device).masked_fill(~allowed, torch.finfo(dtype).min)


class _Listener(Listener):
    def __init__(self, site: VirtualSite, layer: nn.Module) -> None:
        self.site, self.layer = site, layer

    def attend(
        self, original: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extra: dict[str, Any]
    ) -> Any:
        map = self.site.map()
        if map is None:
            return None
        key = self._stretched(key, map.owner, map.cos, map.sin)
        value = _picked(value, map.owner)
        short = query.shape[2]
        if map.query is not None:
            queries = map.query.shape[1]
            query = self._stretched(query, map.query.clamp(min=0), map.cos[:, -queries:], map.sin[:, -queries:])
        own = map.mask(query.dtype, query.shape[2])
        mixed, weights = original(query, key, value, own)
        return (mixed if map.query is None else _averaged(mixed, map.query, map.real[:, -queries:], short)), weights

    def _stretched(self, x: Tensor, owner: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, n, d) at all columns (B, F) that its entries stand for, rotated there."""
        return self.site.prompt.view.rotated(self.layer, _picked(x, owner).float(), cos, sin).to(x.dtype)


def _picked(x: Tensor, index: Tensor) -> Tensor:
    return gather(x.transpose(1, 2), index).transpose(1, 2)


def _averaged(x: Tensor, owner: Tensor, real: Tensor, n: int) -> Tensor:
    """(B, n, H, d) the mean of x (B, f, H, d) over the columns of each owner (B, f); zero for one without any."""
    spare = owner.masked_fill(~real | (owner < 0), n)
    count = x.new_zeros(x.shape[0], n + 1, dtype=torch.float32).scatter_add(1, spare, torch.ones_like(spare, dtype=torch.float32))
    into = spare[..., None, None].expand_as(x)
    total = x.new_zeros(x.shape[0], n + 1, *x.shape[2:], dtype=torch.float32).scatter_add(1, into, x.float())
    return (total / count.clamp(min=1)[..., None, None])[:, :n].to(x.dtype)
