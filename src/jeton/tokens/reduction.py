"""Fewer tokens as a matrix in compact form: made, applied, chained, undone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..place import Lattice
from .entries import Entries, Tiles, gather
from .tokens import Tokens


@dataclass(frozen=True)
class Reduction:
    """N tokens become K: the matrix ``A`` in compact form.

    index: (B, K) for each new token the old token that represents it (gives it position and place), ascending; the
    representative is itself one of the tokens that went there, except under a dense `matrix`, `entries` or `tiles`.
    assign: (B, N) for each old token the new token it went to, -1 if dropped.
    weight: (B, N) float32, the entry ``A[assign[n], n]``; None means 1 for the representative and nothing else: a pure drop.
    matrix: (B, K, N) float32 for dense soft assignments; then `weight` is unused.
    entries: the matrix as a list, for sparse ones in which a token takes part in several new ones; then `weight` is unused.
    tiles: the matrix as blocks, where tokens mix within parts of a picture; then `weight` is unused.
    back: (B, N, K) float32, or tiles, the matrix that restores the old tokens; None where each takes what its new token has.
    mask: (B, K) true where the new token is real; None when all are.
    order: (B, K) rank of each new token in the published method's listing; None when ascending.
    prefix: how many of the new tokens, in front, are the encoder's special tokens.
    score: (B, K) the score a method hands to its next step or part; None passes on the score that tokens carry already.
    memory: (B, ...) what else it hands on; None passes on what tokens carry already.
    sizes: (B, K) float32 sizes of the new tokens where a method has a rule of its own; None for the sums of the old ones'.
    lattice: the map that the new tokens form, where they form one.
    """

    index: Tensor
    assign: Tensor
    weight: Tensor | None = None
    matrix: Tensor | None = None
    mask: Tensor | None = None
    order: Tensor | None = None
    prefix: int = 0
    score: Tensor | None = None
    entries: Entries | None = None
    memory: Tensor | None = None
    sizes: Tensor | None = None
    back: Tensor | Tiles | None = None
    tiles: Tiles | None = None
    lattice: Lattice | None = None

    def __post_init__(self) -> None:
        if self.index.dim() != 2 or self.assign.dim() != 2 or self.index.shape[0] != self.assign.shape[0]:
            raise ValueError(
                f"Reduction needs index (B, K) and assign (B, N), got {tuple(self.index.shape)} and {tuple(self.assign.shape)}."
            )

    # -- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def keep(cls, index: Tensor, n: int, mask: Tensor | None = None, prefix: int = 0) -> Reduction:
        """A pure drop: keep the tokens at `index` (B, K), ascending, of `n`."""
        k = index.shape[1]
        assign = index.new_full((index.shape[0], n), -1)
        target = torch.arange(k, device=index.device).expand_as(index)
        if mask is None:
            assign = assign.scatter(1, index, target)
        else:  # padding slots may repeat an index: write them to a spare column that is cut off
            assign = torch.nn.functional.pad(assign, (0, 1), value=-1)
            assign = assign.scatter(1, index.masked_fill(~mask, n), target)[:, :n]
        return cls(index, assign, mask=mask, prefix=prefix)

    @classmethod
    def select(cls, chosen: Tensor, k: int | None = None, prefix: int = 0) -> Reduction:
        """A pure drop from a boolean map `chosen` (B, N).

        With `k`, every row has exactly k true entries (no host sync); without it rows may differ: the result is padded at
        the end and masked, at the cost of one host sync for the longest row.
        """
        n = chosen.shape[1]
        ragged = k is None
        if ragged:
            k = int(chosen.sum(1).max())
        index = torch.argsort((~chosen).to(torch.uint8), dim=1, stable=True)[:, :k]
        return cls.keep(index, n, chosen.gather(1, index) if ragged else None, prefix)

    @classmethod
    def soft(cls, matrix: Tensor, index: Tensor | None = None, mask: Tensor | None = None) -> Reduction:
        """Dense assignment `matrix` (B, K, N); tokens belong, for pictures and restoring, to their heaviest row."""
        assign = torch.where(matrix.amax(1) > 0, matrix.argmax(1), -1)
        if index is None:
            index = matrix.argmax(2)
        return cls(index, assign, matrix=matrix.float(), mask=mask)

    @classmethod
    def identity(cls, batch: int, n: int, device: torch.device | str | None = None, prefix: int = 0) -> Reduction:
        index = torch.arange(n, device=device).expand(batch, -1)
        return cls(index, index, prefix=prefix)

    # -- what it says ----------------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        return self.assign.shape[1]

    @property
    def k(self) -> int:
        return self.index.shape[1]

    @property
    def is_drop(self) -> bool:
        """True if no new token mixes old ones."""
        return self.weight is None and not self.is_soft

    @property
    def is_soft(self) -> bool:
        """True if an old token may take part in several new ones."""
        return self.matrix is not None or self.entries is not None or self.tiles is not None

    @property
    def is_identity(self) -> bool:
        """True if the shapes alone say that nothing changes (no host sync)."""
        return self.is_drop and self.k == self.n and self.mask is None

    @property
    def real(self) -> Tensor:
        """(B, K) true where the new token is real."""
        return self.mask if self.mask is not None else torch.ones_like(self.index, dtype=torch.bool)

    def count(self) -> Tensor:
        """(B,) number of tokens after."""
        return self.real.sum(1)

    @property
    def size(self) -> Tensor:
        """(B, K) float32: how many old tokens each new one stands for (a drop stands for itself alone)."""
        return self._sizes(torch.ones_like(self.assign, dtype=torch.float32))

    @property
    def dense(self) -> Tensor:
        """(B, K, N) float32: the matrix written out. For looking and testing; nothing on a hot path needs it."""
        if self.matrix is not None:
            return self.matrix
        if (parts := self._sparse) is not None:
            return parts.dense(self.k, self.n)
        row = torch.arange(self.k, device=self.index.device)[None, :, None]
        return (self.assign[:, None, :] == row).float() * self._entries[:, None, :]

    # -- what follows from it --------------------------------------------------------------------------------------

    def mix(self, x: Tensor) -> Tensor:
        """``A @ x`` for x of shape (B, N, ...), summed in float32 where tokens mix, in x's dtype on return."""
        if self.is_drop:
            return gather(x, self.index)
        flat = x.reshape(x.shape[0], x.shape[1], -1)
        if self.matrix is not None:
            out = self.matrix.to(flat.device) @ flat.float()
        elif (parts := self._sparse) is not None:
            out = parts.mix(flat, self.k)
        elif self.mask is None:
            out = self._gather_and_add(flat)
        else:
            out = self._scatter(flat.float() * self._entries[..., None])
        return out.to(x.dtype).reshape(x.shape[0], self.k, *x.shape[2:])

    def apply(self, tokens: Tokens) -> Tokens:
        """The reduced tokens, with index, size, mask, place, order and score carried along."""
        self._check(tokens)
        memory = tokens.memory if self.memory is None else self.memory
        if self.is_identity:
            same = self.score is None and self.memory is None
            return tokens if same else replace(tokens, score=tokens.score if self.score is None else self.score, memory=memory)
        mask = self.mask
        if tokens.mask is not None:
            kept = tokens.mask.gather(1, self.index)
            mask = kept if mask is None else kept & mask
        return replace(
            tokens,
            features=self.mix(tokens.features),
            mask=mask,
            index=tokens.origin.gather(1, self.index),
            size=tokens.size.gather(1, self.index) if self.is_drop and tokens.size is not None else self._grown(tokens),
            prefix=self.prefix,
            place=tokens.place.gather(self.index) if tokens.place is not None else None,
            order=self.order,
            score=tokens.score.gather(1, self.index) if self.score is None and tokens.score is not None else self.score,
            memory=memory,
        )

    def restore(self, tokens: Tokens) -> Tokens:
        """Back to N tokens: each old token takes the features of the new token it went to, or where `back` says so a mixture of
        them; dropped ones are zero and masked."""
        if len(tokens) != self.k:
            raise ValueError(f"restore expects the {self.k} tokens this reduction made, got {len(tokens)}.")
        gone, x = self.assign < 0, tokens.features
        if self.back is None:
            out = gather(x, self.assign.clamp(min=0))
        else:
            out = (self.back.mix(x, self.n) if isinstance(self.back, Tiles) else self.back @ x.float()).to(x.dtype)
        return Tokens(out.masked_fill_(gone[..., None], 0), mask=~gone, prefix=tokens.prefix)

    def behind(self, prefix: int) -> Reduction:
        """The same of tokens with `prefix` special ones more in front, which stay as they are."""
        if prefix == 0:
            return self
        front = torch.arange(prefix, device=self.index.device).expand(self.index.shape[0], -1)
        entries = self.entries
        if entries is not None:
            ones = torch.ones_like(front, dtype=entries.value.dtype)
            row, column = (torch.cat([front, at + prefix], 1) for at in (entries.row, entries.column))
            entries = Entries(row, column, torch.cat([ones, entries.value], 1))
        return Reduction(
            torch.cat([front, self.index + prefix], 1),
            torch.cat([front, torch.where(self.assign < 0, -1, self.assign + prefix)], 1),
            weight=None if self.weight is None else pad(self.weight, (prefix, 0), value=1.0),
            matrix=_bordered(self.dense, prefix) if self.matrix is not None or self.tiles is not None else None,
            mask=None if self.mask is None else pad(self.mask, (prefix, 0), value=True),
            order=None if self.order is None else torch.cat([front, self.order + prefix], 1),
            prefix=self.prefix + prefix,
            score=None if self.score is None else pad(self.score, (prefix, 0)),
            entries=entries,
            memory=self.memory,
            back=None if self.back is None else _bordered(self._back, prefix),
        )

    def then(self, after: Reduction) -> Reduction:
        """The reduction that does this one first, then `after` (which acts on this one's K tokens)."""
        if after.n != self.k:
            raise ValueError(f"cannot chain: the first gives {self.k} tokens, the second takes {after.n}.")
        if self.is_identity:
            return after
        if after.is_identity:
            return self
        index = self.index.gather(1, after.index)
        mask = after.mask
        if self.mask is not None:
            kept = self.mask.gather(1, after.index)
            mask = kept if mask is None else kept & mask
        back = None
        if self.back is not None or after.back is not None:
            back = self._back @ after._back
        if self.is_soft or after.is_soft:
            return Reduction(
                index,
                self._through(after),
                matrix=after.dense @ self.dense,
                mask=mask,
                order=after.order,
                prefix=after.prefix,
                back=back,
                lattice=after.lattice,
            )
        weight = None
        if not (self.is_drop and after.is_drop):
            weight = self._entries * after._entries.gather(1, self.assign.clamp(min=0))
        return Reduction(index, self._through(after), weight, mask=mask, order=after.order, prefix=after.prefix, back=back)

    # -- private -----------------------------------------------------------------------------------------------------

    @property
    def _sparse(self) -> Entries | Tiles | None:
        return self.entries if self.entries is not None else self.tiles

    @property
    def _entries(self) -> Tensor:
        """(B, N) the entry of A that each old token carries into its new token."""
        if self.weight is not None:
            return self.weight
        here = torch.arange(self.n, device=self.assign.device)
        own = self.index.gather(1, self.assign.clamp(min=0)) == here
        return (own & (self.assign >= 0)).float()

    @property
    def _back(self) -> Tensor:
        """(B, N, K) the matrix that restores, written out."""
        if self.back is not None:
            return self.back.dense(self.n, self.k) if isinstance(self.back, Tiles) else self.back
        return (self.assign[..., None] == torch.arange(self.k, device=self.assign.device)).float()

    def _through(self, after: Reduction) -> Tensor:
        chained = after.assign.gather(1, self.assign.clamp(min=0))
        return torch.where(self.assign < 0, self.assign, chained)

    def _gather_and_add(self, x: Tensor) -> Tensor:
        """``A @ x`` for x (B, N, C): gather the K representatives, then add the other N - K, far fewer where little merges."""
        b, k, entries = x.shape[0], self.k, self._entries
        out = gather(x, self.index).float() * entries.gather(1, self.index)[..., None]
        own = torch.zeros_like(self.assign, dtype=torch.uint8).scatter(1, self.index, 1)
        rest = own.argsort(dim=1, stable=True)[:, : self.n - k]
        into = self.assign.gather(1, rest)
        gone = into < 0  # a dropped token adds nothing: zero times a kept token, so that its own values are never read
        share = entries.gather(1, rest).masked_fill(gone, 0)
        rows = gather(x, torch.where(gone, self.index[:, :1], rest)).float() * share[..., None]
        slots = into.clamp(min=0) + k * torch.arange(b, device=into.device)[:, None]
        return out.flatten(0, 1).index_add_(0, slots.flatten(), rows.flatten(0, 1)).unflatten(0, (b, k))

    def _scatter(self, x: Tensor) -> Tensor:
        """Sum x (B, N, C) into its new tokens, giving (B, K, C)."""
        b, _, c = x.shape
        into = torch.where(self.assign < 0, self.k, self.assign)
        out = x.new_zeros(b, self.k + 1, c)
        return out.scatter_add(1, into[..., None].expand(-1, -1, c), x)[:, : self.k]

    def _sizes(self, old: Tensor) -> Tensor:
        if self.is_drop:
            return old.gather(1, self.index)
        if self.matrix is not None:
            share = self.matrix / self.matrix.sum(1, keepdim=True).clamp(min=1e-12)
            return (share @ old[..., None])[..., 0]
        if (parts := self._sparse) is not None:
            return parts.sizes(old, self.k)
        return self._scatter(old[..., None])[..., 0]

    def _grown(self, tokens: Tokens) -> Tensor | None:
        """A drop of tokens of size one needs no sizes."""
        if self.sizes is not None:
            return self.sizes
        return None if self.is_drop and tokens.size is None else self._sizes(tokens.weight)

    def _check(self, tokens: Tokens) -> None:
        if len(tokens) != self.n or tokens.features.shape[0] != self.index.shape[0]:
            raise ValueError(
                f"this reduction takes ({self.index.shape[0]}, {self.n}) tokens, got {tuple(tokens.features.shape[:2])}."
            )


def _bordered(matrix: Tensor, prefix: int) -> Tensor:
    """(B, prefix + K, prefix + N) the matrix (B, K, N) with ones on the diagonal in front of it."""
    out = pad(matrix, (prefix, 0, prefix, 0))
    here = torch.arange(prefix, device=matrix.device)
    out[:, here, here] = 1.0
    return out
