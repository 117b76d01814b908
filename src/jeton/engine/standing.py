"""How the tokens of pictures stand inside an encoder: what has been done to them, what they carry, and what there was before."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..method import Method
from ..models import Encoder
from ..place import Lattice, Place
from ..tokens import Reduction, Tokens, gather


class Standing:
    """What an encoder's forward keeps beside the features from step to step. Tokens that leave for a while come back by the
    history: the reductions so far, each with the block it stood at."""

    encoder: Encoder
    _start: int  # patches in front of block 0

    def anew(self) -> None:
        """Nothing has been done yet."""
        self.reduction: Reduction | None = None
        self.size: Tensor | None = None
        self.order: Tensor | None = None
        self.score: Tensor | None = None
        self.memory: Tensor | None = None
        self.policy: Tensor | None = None
        self.mask: Tensor | None = None
        self.place: Place | None = None
        self.start_mask: Tensor | None = None
        self.history: list[tuple[int, Reduction]] = []
        self.undone_at: dict[int, int] = {}  # steps of the history that were undone, and behind which block
        self.held: dict[int, tuple[int, dict[str, Any]]] = {}
        self.variance: Tensor | None = None
        self.lent = False  # tokens that are away for a while will come back

    def forget(self) -> None:
        """What is handed on stands for itself: all patches again, or tokens of a method's own."""
        self.reduction, self.mask = None, self.start_mask
        self.size, self.order, self.score, self.memory, self.policy = None, None, None, None, None

    def tokens(self, x: Tensor) -> Tokens:
        place, index = self.place, None if self.reduction is None else self.reduction.index
        if place is not None and index is not None:
            place = place.gather(index)
        return Tokens(
            x, self.mask, index, self.size, self.encoder.prefix, place, self.order, self.score, self.memory, self.policy
        )

    def as_tokens(self, features: Tensor) -> Tokens:
        """The tokens that left the last block, with these features."""
        index = None if self.reduction is None else self.reduction.index
        return Tokens(features, self.mask, index, self.size, self.encoder.prefix)

    @property
    def lattice(self) -> Lattice | None:
        """The map that the tokens form, where blocks take maps."""
        if not self.encoder.maps or self.place is None or self.place.shape is None:
            return None
        return Lattice(*self.place.shape, self.encoder.window) if self.reduction is None else self.reduction.lattice

    def _advance(self, step: Reduction, number: int) -> None:
        self.history.append((number, step))
        self.reduction = step if self.reduction is None else self.reduction.then(step)

    def until(self, block: int) -> Reduction | None:
        """What all steps together did up to and with a block, but for those undone by then; None where none has acted."""
        last = block % len(self.encoder.blocks)
        done: Reduction | None = None
        for at, (number, step) in enumerate(self.history):
            if number <= last < self.undone_at.get(at, last + 1):
                done = step if done is None else done.then(step)
        return done

    def _state(self) -> dict[str, Any]:
        names = ("reduction", "size", "order", "score", "memory", "mask", "lent")
        return {name: getattr(self, name) for name in names}

    def _set(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _undo(self, number: int, method: Method, x: Tensor) -> Tensor:
        """The tokens there were before this method's last reduction, whatever has been done since."""
        start, state = self.held.pop(id(method), (0, {}))
        if not state or start in self.undone_at:  # another's tokens, given back, have brought these along
            return x
        for at in reversed(range(start, len(self.history))):
            if at not in self.undone_at:
                self.undone_at[at] = number
                x = self.history[at][1].restore(Tokens(x)).features
        self._set(state)
        return x

    def _trim(self, value: Any) -> Any:
        """An attention mask or rotary tables of the full sequence, cut to the tokens that are left; anything else as it is."""
        if self.reduction is None:
            return value
        index = self.reduction.index
        if isinstance(value, tuple) and all(isinstance(part, Tensor) and part.dim() == 2 for part in value):
            return tuple(self._turned(part, index) for part in value)
        if not isinstance(value, Tensor) or value.dim() != 4:
            return value
        mask = value
        keys = gather(mask.expand(index.shape[0], -1, -1, -1).permute(0, 3, 1, 2), index).permute(0, 2, 3, 1)
        if keys.shape[2] == 1:
            return keys
        return gather(keys.transpose(1, 2), index).transpose(1, 2)

    def _turned(self, table: Tensor, index: Tensor) -> Tensor:
        """(B, 1, K, d) the rows of a rotary table (P, d) for the tokens left; special tokens it does not know are not turned."""
        still = self._start + self.encoder.prefix - table.shape[0]
        return table[index[:, still:] - still][:, None]
