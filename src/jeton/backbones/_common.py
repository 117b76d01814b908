"""Networks that were published in several sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Size = TypeVar("Size")


def of_size(family: str, sizes: Mapping[str, Size], size: str) -> Size:
    """What the size of this name says; a sentence with the names there are where there is none."""
    if size not in sizes:
        raise ValueError(f"there is no {family} {size!r}; there are {', '.join(sizes)}.")
    return sizes[size]
