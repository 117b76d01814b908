"""Published steps written out, one token at a time, for tests to compare with."""

from __future__ import annotations

import math

from torch import Tensor


def dpc_knn(x: Tensor, clusters: int, neighbours: int) -> list[int]:
    """The centre of each row of x (N, D)."""
    n, d = x.shape
    far = [[math.dist(x[i].tolist(), x[j].tolist()) / d**0.5 for j in range(n)] for i in range(n)]
    density = [math.exp(-sum(v * v for v in sorted(row)[:neighbours]) / min(n, neighbours)) for row in far]
    top = max(max(row) for row in far)
    height = [
        min([far[i][j] for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)], default=top)
        for i in range(n)
    ]
    centres = sorted(range(n), key=lambda i: (-density[i] * height[i], i))[:clusters]
    return [i if i in centres else min(sorted(centres), key=lambda c: far[i][c]) for i in range(n)]
