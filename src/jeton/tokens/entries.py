"""Sparse matrices of a batch, as lists of their entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entries:
    """A matrix as the list of its entries: ``A[row, column] = value``, each (B, E). Entries of value 0 say nothing."""

    row: Tensor
    column: Tensor
    value: Tensor

    def __getitem__(self, rows: Tensor) -> Entries:
        """The entries of some matrices of the batch."""
        return Entries(self.row[rows], self.column[rows], self.value[rows])

    def mix(self, x: Tensor, k: int) -> Tensor:
        """``A @ x`` in float32 for x (B, N, C), giving (B, k, C); never more than N products at a time."""
        b, n, c = x.shape
        base = torch.arange(b, device=x.device)[:, None] * k
        out = torch.zeros(b * k, c, dtype=torch.float32, device=x.device)
        for start in range(0, self.row.shape[1], n):
            part = slice(start, start + n)
            products = gather(x, self.column[:, part]).float() * self.value[:, part, None]
            out = out.index_add(0, (self.row[:, part] + base).flatten(), products.flatten(0, 1))
        return out.unflatten(0, (b, k))

    def sizes(self, old: Tensor, k: int) -> Tensor:
        """(B, k) sizes after, where each old token of size old (B, N) is shared by the new ones in proportion to its entries."""
        total = torch.zeros_like(old).scatter_add(1, self.column, self.value)
        share = self.value * (old / total.clamp(min=1e-12)).gather(1, self.column)
        return old.new_zeros(old.shape[0], k).scatter_add(1, self.row, share)

    def dense(self, k: int, n: int) -> Tensor:
        flat = self.value.new_zeros(self.value.shape[0], k * n)
        return flat.scatter_add(1, self.row * n + self.column, self.value).unflatten(1, (k, n))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, ...) at index (B, K), giving (B, K, ...). Whole rows are copied: on a CPU ten times as fast as
    `torch.gather`, which looks up every channel by itself."""
    if x.dim() == 2:
        return x.gather(1, index)
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    if not x.is_contiguous():
        return x[row, index]
    at = index + row * x.shape[1]
    return x.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)
