"""The two values that flow through every room: `Tokens`, and the `Reduction` that makes fewer of them.

A reduction is a sparse matrix ``A`` of shape (K, N): ``new = A @ old``. Pruning has one-hot rows, merging weighted rows, soft
clustering dense rows. Everything else (features, sizes, positions, masks, un-merging, pictures) follows from ``A`` here.

Letters: B rows (one row is one image, or one picture inside an encoder), N tokens before, K tokens after, D width.
"""

from .entries import Entries, Tiles, gather
from .reduction import Reduction
from .tokens import Tokens

__all__ = ["Entries", "Reduction", "Tiles", "Tokens", "gather"]
