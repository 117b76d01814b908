"""Linear spans of token vectors, and taking them out of others.

Letters: T tokens, D width, m rows that span, r their rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_space(rows: Tensor, rank: int | None = None, tolerance: float = 1e-4) -> Tensor:
    """(D, r) orthonormal basis of the span of `rows` (m, D): the right singular vectors whose singular value is above `tolerance`
    times the largest, at most `rank` of them. Rows are not centred. At least float32, whatever the rows are."""
    if rows.dim() != 2:
        raise ValueError(f"the rows of a span are a matrix (m, D), got {tuple(rows.shape)}.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    _, values, right = torch.linalg.svd(_exact(rows), full_matrices=False)
    if not len(values):
        return right.mT
    return right[values > tolerance * values[0]][:rank].mT


def project_out(x: Tensor, basis: Tensor, alpha: float = 1.0) -> Tensor:
    """x - alpha x P with P = basis basisᵀ, for x (..., D) and an orthonormal basis (D, r): alpha of what lies in its span is
    taken out. Computed in at least float32, returned in the dtype of x; alpha = 0 or an empty basis gives x itself."""
    if x.shape[-1] != basis.shape[0]:
        raise ValueError(f"vectors of width {x.shape[-1]} cannot be projected along a basis of width {basis.shape[0]}.")
    if alpha == 0 or basis.shape[1] == 0:
        return x
    basis = _exact(basis).to(x.device)
    exact = _exact(x)
    basis = basis.to(exact.dtype)
    return (exact - alpha * (exact @ basis) @ basis.mT).to(x.dtype)


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
