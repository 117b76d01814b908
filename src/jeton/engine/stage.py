"""Layers that hold fewer columns than the entrance let in: which, and what they are handed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..tokens import gather
from .entrance import pick
from .flow import Cut, Kept
from .masks import hidden as hidden_columns
from .masks import looking_back, taken
from .prompt import Prompt


@dataclass
class Stage:
    """What the layers from here on hold. kept: their cache columns, as columns of the entrance. cut: which of the new columns
    are left; None when this forward brings no pictures."""

    prompt: Prompt
    kept: Kept
    cut: Cut | None = None
    fitted: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    rotary: dict[int, tuple[Any, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def fit(self, kwargs: dict, hidden: Tensor) -> dict:
        """The layer's arguments, cut to the columns that are left."""
        changed: dict[str, Any] = {"attention_mask": self._mask(kwargs.get("attention_mask"), hidden)}
        if kwargs.get("position_embeddings") is not None:
            changed["position_embeddings"] = self._embeddings(kwargs["position_embeddings"], hidden)
        if isinstance(kwargs.get("position_ids"), Tensor) and self.cut is not None:
            changed["position_ids"] = pick(kwargs["position_ids"], self.cut.index)
        return changed

    def _embeddings(self, given: tuple[Tensor, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.cut is None and not self.prompt.run.compact:
            return given
        if id(given) not in self.rotary:  # layers of one kind are given the same
            self.rotary[id(given)] = given, self._renumbered(hidden) if self.prompt.run.compact else self._gathered(given)
        return self.rotary[id(given)][1]

    def _gathered(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert self.cut is not None
        index = self.cut.index
        cos, sin = (gather(part.expand(index.shape[0], -1, -1), index) for part in given)
        return cos, sin

    def _renumbered(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.prompt.ids
        assert ids is not None
        if self.cut is None:
            ids = ids - self.kept.dropped
        else:  # kept.dropped counts this forward's losses too: take those out, and count them column by column
            ids = pick(ids, self.cut.index) - self.cut.before - (self.kept.dropped - self.cut.dropped)
        return self.prompt.view.rotary(hidden, ids)

    def _mask(self, mask: Tensor | None, hidden: Tensor) -> Tensor | None:
        known = self.fitted.get(id(mask))
        if known is None:
            known = (mask, self._cut(mask, hidden))
            self.fitted[id(mask)] = known
        return known[1]

    def _cut(self, mask: Tensor | None, hidden: Tensor) -> Tensor | None:
        columns, real = self.kept.columns(self.prompt.total), self.kept.real(self.prompt.total)
        if mask is None:
            return None if real is None else self._built(real, hidden)
        if mask.dim() == 2:
            cut = mask.gather(1, columns)
            return cut if real is None else cut * real.to(cut.dtype)
        return taken(mask, None if self.cut is None else self.cut.index, columns, real, hidden.shape[1])

    def _built(self, real: Tensor, hidden: Tensor) -> Tensor:
        """A causal mask where the model left it to its kernel, but samples now differ in length."""
        if "flash" in self.prompt.view.decoder.config._attn_implementation:
            return real.long()
        return hidden_columns(looking_back(hidden.shape[1], real), real)
