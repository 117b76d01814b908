"""When an answer is right, and how sure a share of right answers is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_EDGES = " \t\n.,;:!?\"'`()[]"


def normalise(answer: str) -> str:
    """Lower case, single spaces, no punctuation at the ends."""
    return re.sub(r"\s+", " ", answer.casefold()).strip(_EDGES)


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """Normalised exact match with any accepted answer."""
    return normalise(answer) in {normalise(each) for each in accepted}


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `right` in `total` independent questions."""
    if total < 1:
        raise ValueError("an interval needs at least one question.")
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
