"""The prompt on its way through a language model: which columns are still there, and where each visual token stands now.

Two values. `Flow` lives for one forward; `Memory` lives as long as a key/value cache and remembers which columns its layers hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..layout import Album, Layout, Rows
from ..needs import Need
from ..tokens import Entries, Reduction, Tiles


@dataclass(frozen=True)
class Step:
    """One decision: the rows before it, the reduction over them (with `prefix` special tokens in front), the rows after."""

    before: Rows
    reduction: Reduction
    prefix: int
    after: Rows

    def pick(self, images: Tensor) -> Step:
        parts: dict[str, Any] = {
            name: value[images] for name, value in vars(self.reduction).items() if isinstance(value, Tensor | Entries | Tiles)
        }
        return Step(self.before.pick(images), replace(self.reduction, **parts), self.prefix, self.after.pick(images))


@dataclass
class Scene:
    """The pictures of one encoder call on their way: which tokens are left of each, and the signals recorded over the encoder's
    patches, (patches, ...) each. scores: what methods decided by, by their id, (R, M) over each image's tokens, for their later
    parts. met: a prompt has shown them. projected: tokens that went through the projector. encoded_patches: patches a packed
    encoder ran on, None for all. deep: features (R, K, D) of the tokens left, to be added to them further on."""

    album: Album
    rows: Rows
    encoded: Reduction | None = None
    signals: dict[Need, Tensor] = field(default_factory=dict)
    special: Tensor | None = None
    met: bool = False
    projected: int = 0
    encoded_patches: int | None = None
    trail: list[Step] = field(default_factory=list)
    given: dict[Need, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    deep: list[Tensor] = field(default_factory=list)

    @property
    def reduced(self) -> bool:
        """True if tokens left before any prompt was known."""
        return self.encoded is not None or bool(self.trail)

    def left(self) -> list[Tensor]:
        """For each image (slots of the longest,) true at the slots that are still there."""
        longest = max(self.album.counts)
        alive = torch.zeros(len(self.album), longest + 1, dtype=torch.bool, device=self.rows.slot.device)
        slot = self.rows.slot if self.rows.mask is None else self.rows.slot.masked_fill(~self.rows.mask, longest)
        return list(alive.scatter(1, slot, True)[:, :-1])

    def shown(self, album: Album, images: list[int]) -> Scene:
        """The same scene as the prompts show it: in their order, repeated for beams. Always a copy: what one forward decides is
        not left behind for the next one that shows these pictures."""
        self.met = True
        if album is self.album:
            return replace(self, trail=list(self.trail), scores=dict(self.scores))
        at = torch.tensor(images, device=self.rows.slot.device)
        trail = [step.pick(at) for step in self.trail]
        given = {need: value[at] for need, value in self.given.items()}
        scores = {name: score[at] for name, score in self.scores.items()}
        return replace(self, album=album, rows=self.rows.pick(at), trail=trail, given=given, scores=scores)


@dataclass
class Kept:
    """Columns a stage holds, as columns of the stage before. index (B, n) for the first `covered` of them; all later columns
    follow one to one. valid (B, n) false where a column is padding; None when none is. dropped (B, 1): tokens lost so far."""

    index: Tensor
    covered: int
    valid: Tensor | None
    dropped: Tensor

    @property
    def offset(self) -> int:
        return self.covered - self.index.shape[1]

    def columns(self, total: int) -> Tensor:
        """(B, total - offset) columns of the stage before, when that one holds `total`."""
        tail = torch.arange(self.covered, total, device=self.index.device).expand(self.index.shape[0], -1)
        return torch.cat([self.index, tail], 1)

    def real(self, total: int) -> Tensor | None:
        """(B, total - offset) true where a column is no padding of ours."""
        if self.valid is None:
            return None
        return torch.nn.functional.pad(self.valid, (0, total - self.covered), value=True)

    def extended(self, past: int, new: int, cut: Cut) -> Kept:
        """This stage of `past` columns after `new` more came, of which the cut leaves some."""
        before, known = self.columns(past), self.real(past)
        joined = None
        if known is not None or cut.valid is not None:
            left = torch.ones_like(before, dtype=torch.bool) if known is None else known
            right = torch.ones_like(cut.index, dtype=torch.bool) if cut.valid is None else cut.valid
            joined = torch.cat([left, right], 1)
        return Kept(torch.cat([before, past + cut.index], 1), past + new, joined, self.dropped + cut.dropped)


def whole(length: int, like: Tensor) -> Kept:
    """A stage that has lost nothing of its first `length` columns."""
    batch, device = like.shape[0], like.device
    index = torch.arange(length, device=device).expand(batch, -1)
    return Kept(index, length, None, torch.zeros(batch, 1, dtype=torch.long, device=device))


@dataclass
class Virtual:
    """Who stands for each of the first columns of the unreduced conversation. owner (B, n): its column in the entrance's cache,
    -1 for a token that was dropped. cos, sin (B, n, d): the rotation from the owner's position to the column's own."""

    owner: Tensor
    cos: Tensor
    sin: Tensor


@dataclass
class Memory:
    """What one cache holds: the columns at the entrance, and from each reducing layer on (as columns of the entrance). core: the
    core neurons of a layer's MLP for its prompts, and how the MLP runs on them."""

    length: int = 0
    entry: Kept | None = None
    layers: dict[int, Kept] = field(default_factory=dict)
    virtual: Virtual | None = None
    core: dict[int, Any] = field(default_factory=dict)

    def held(self, layer: int) -> Kept | None:
        """What a layer's cache holds; None if all that came through the entrance."""
        from_here = [first for first in self.layers if first <= layer]
        return self.layers[max(from_here)] if from_here else None

    @property
    def touched(self) -> bool:
        return self.entry is not None or bool(self.layers)


@dataclass(frozen=True)
class Cut:
    """index (B, n): the columns that stay, right-aligned. valid (B, n): false where a sample has fewer than others and a dropped
    column stands in as padding; None when none does. before (B, n): dropped columns in front of each. dropped (B, 1): all."""

    index: Tensor
    valid: Tensor | None
    before: Tensor
    dropped: Tensor

    @classmethod
    def nothing(cls, like: Tensor) -> Cut:
        """The cut of (B, n, ...) columns that all stay."""
        index = torch.arange(like.shape[1], device=like.device).expand(like.shape[0], -1)
        return cls(index, None, torch.zeros_like(index), torch.zeros_like(index[:, :1]))

    def then(self, after: Cut) -> Cut:
        """This cut first, then one of what it left."""
        valid = after.valid
        if self.valid is not None:
            seen = self.valid.gather(1, after.index)
            valid = seen if valid is None else valid & seen
        before = self.before.gather(1, after.index) + after.before
        return Cut(self.index.gather(1, after.index), valid, before, self.dropped + after.dropped)


@dataclass
class Flow:
    """One forward that brings pictures. columns: (R, M) where each visual token stands in the flattened current sequence.
    between: (B, length) its columns between the tokens of one image; see `Layout`."""

    layout: Layout
    scene: Scene
    columns: Tensor
    length: int
    structure: str
    between: Tensor | None = None

    @classmethod
    def start(cls, layout: Layout, scene: Scene, structure: str) -> Flow:
        return cls(layout, scene, layout.columns, layout.length, structure, layout.between)

    def __post_init__(self) -> None:
        self._present = list(self.layout.album.counts)

    @property
    def first(self) -> list[int]:
        """How many tokens each image had that could leave, before any did."""
        album = self.layout.album
        extra = (0,) * len(album) if self.structure == "pool" else album.structure
        return [count - structure for count, structure in zip(album.counts, extra, strict=True)]

    @property
    def at(self) -> Tensor:
        """(R, K) where each remaining token stands in the flattened sequence; padding points one past its end."""
        rows = self.scene.rows
        where = self.columns.gather(1, rows.slot)
        return where if rows.mask is None else where.masked_fill(~rows.mask, self.layout.batch * self.length)

    def cut(self) -> Cut | None:
        """Drop the columns of visual tokens that are no longer in the scene; None if nothing goes. No host sync where every image
        keeps a fixed number; else one."""
        batch = self.layout.batch
        keep = torch.ones(batch * self.length + 1, dtype=torch.bool, device=self.columns.device)
        gone = self.columns
        if self.structure == "keep":
            gone = gone.masked_fill(self.layout.album.place.structure, batch * self.length)
        keep[gone.flatten()] = False
        keep[self.at.flatten()] = True
        keep = keep[:-1].view(batch, self.length)
        short, uneven = self._shortened(keep)
        if short == self.length and not uneven:
            return None
        index = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)[:, self.length - short :]
        valid = keep.gather(1, index) if uneven else None
        gone_before = (~keep).cumsum(1)
        self._move(keep, short)
        self.between = None if self.between is None else self.between.gather(1, index)
        return Cut(index, valid, gone_before.gather(1, index), gone_before[:, -1:])

    def _shortened(self, keep: Tensor) -> tuple[int, bool]:
        """The new length, and whether prompts differ."""
        rows = self.scene.rows
        if rows.mask is not None:
            counts = keep.sum(1).tolist()
            return max(counts), len(set(counts)) > 1
        lost = [0] * self.layout.batch
        structure = self.layout.album.structure
        for image, sample in enumerate(self.layout.sample):
            stays = rows.slot.shape[1] + (structure[image] if self.structure == "keep" else 0)
            lost[sample] += self._present[image] - stays
            self._present[image] = stays
        return self.length - min(lost), len(set(lost)) > 1

    def _move(self, keep: Tensor, short: int) -> None:
        """Renumber the visual tokens' columns after a cut; tokens that went point one past the end."""
        rank = keep.cumsum(1)
        now = rank - 1 + (short - rank[:, -1:])
        sample = torch.arange(keep.shape[0], device=keep.device)[:, None] * short
        end = keep.shape[0] * short
        flat = torch.where(keep, now + sample, end).flatten()
        self.columns = torch.nn.functional.pad(flat, (0, 1), value=end)[self.columns]
        self.length = short
