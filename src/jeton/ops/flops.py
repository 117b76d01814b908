"""FLOPs by formula: two for every multiply-add of the matrix products; norms, activations and softmax are left out.

Papers differ: many quote multiply-adds (half of these numbers).
"""

from __future__ import annotations


def block_flops(
    n: float,
    dim: int,
    mlp_dim: int,
    *,
    kv_dim: int | None = None,
    q_dim: int | None = None,
    gated: bool = False,
    n_mlp: float | None = None,
    n_keys: float | None = None,
) -> float:
    """One transformer block over n tokens of width `dim`.

    ``4 n dim q + 4 n dim kv + 4 n m q + c n' dim mlp`` with q = `q_dim` (all query heads, `dim` if not given), kv = `kv_dim`
    (all key heads, q if not given), m = `n_keys` keys attended (n if not given; causal attention is counted in full), n' =
    `n_mlp` tokens left after a reduction in mid-block (n if not given) and c = 4, or 6 where the MLP is `gated`.
    """
    q = dim if q_dim is None else q_dim
    kv = q if kv_dim is None else kv_dim
    projections = 4 * n * dim * q + 4 * n * dim * kv
    attention = 4 * n * (n if n_keys is None else n_keys) * q
    return projections + round(attention) + (6 if gated else 4) * (n if n_mlp is None else n_mlp) * dim * mlp_dim


def decode_flops(
    context: int, dim: int, mlp_dim: int, *, kv_dim: int | None = None, q_dim: int | None = None, gated: bool = False
) -> float:
    """One transformer block for one new token that attends to `context` keys, its own among them."""
    return block_flops(1, dim, mlp_dim, kv_dim=kv_dim, q_dim=q_dim, gated=gated, n_keys=context)


def patch_flops(n: int, dim: int, patch: int, channels: int = 3) -> int:
    """The patch embedding of n patches of patch x patch pixels."""
    return 2 * n * dim * channels * patch * patch
