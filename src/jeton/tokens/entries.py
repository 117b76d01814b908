"""Sparse matrices of a batch, as lists of their entries or as blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


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


@dataclass(frozen=True)
class Tiles:
    """A matrix as blocks, of which no two share a row or a column: ``A[row[u, i], column[u, j]] = value[b, u, i, j]``, with row
    (U, k), column (U, n) and value (B, U, k, n). -1 is no row and no column: blocks may be smaller than the largest."""

    row: Tensor
    column: Tensor
    value: Tensor

    def __getitem__(self, rows: Tensor) -> Tiles:
        """The blocks of some matrices of the batch."""
        return Tiles(self.row, self.column, self.value[rows])

    def mix(self, x: Tensor, k: int) -> Tensor:
        """``A @ x`` in float32 for x (B, N, C), giving (B, k, C)."""
        parts = self.value @ pad(x.float(), (0, 0, 0, 1))[:, self.column]  # -1 reads the row of zeros behind the last
        out = parts.new_zeros(x.shape[0], k + 1, x.shape[2])
        return out.index_copy(1, self.row.flatten() % (k + 1), parts.flatten(1, 2))[:, :k]

    def sizes(self, old: Tensor, k: int) -> Tensor:
        """(B, k) sizes after, where each old token of size old (B, N) is shared by the new ones in proportion to its entries."""
        share = self.value / self.value.sum(2, keepdim=True).clamp(min=1e-12)
        return Tiles(self.row, self.column, share).mix(old[..., None], k)[..., 0]

    def dense(self, k: int, n: int) -> Tensor:
        out = self.value.new_zeros(self.value.shape[0], k + 1, n + 1)
        out[:, self.row[:, :, None], self.column[:, None]] = self.value
        return out[:, :k, :n]

    def numel(self) -> int:
        return self.value.numel()


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, ...) at index (B, K), giving (B, K, ...). Whole rows are copied: on a CPU ten times as fast as
    `torch.gather`, which looks up every channel by itself. RuntimeError for an index that is none of the row's, on a CPU."""
    if x.dim() == 2:
        return x.gather(1, index)
    if (
        index.device.type == "cpu"
    ):  # elsewhere it would cost launches; the flat index below alone would find the next row's tokens
        torch._assert_async(((index >= 0) & (index < x.shape[1])).all(), "an index is out of bounds of its row")
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    if not x.is_contiguous():
        return x[row, index]
    at = index + row * x.shape[1]
    return x.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)
