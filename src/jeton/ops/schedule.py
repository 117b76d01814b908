"""Shares of the tokens over the layers of a model: the sigmoid schedule, and whole counts that add up to a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from .search import root


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def falling(layers: Sequence[int], kappa: float, low: float, high: float, middle: float) -> list[float]:
    """The share ``low + (high - low) / (1 + exp(kappa (l - middle)))`` of every layer l."""
    return [low + (high - low) * sigmoid(kappa * (middle - layer)) for layer in layers]


def middle_of(layers: Sequence[int], kappa: float, low: float, high: float, mean: float) -> float:
    """The `middle` at which `falling` has this mean over the layers; it must lie between `low` and `high`, kappa above 0."""

    def off(middle: float) -> float:
        return sum(falling(layers, kappa, low, high, middle)) / len(layers) - mean

    reach = 40 / kappa  # there the sigmoid is flat in double precision
    return root(off, min(layers) - reach, max(layers) + reach)


def whole_counts(shares: Sequence[float], n: int) -> list[int]:
    """Counts of n tokens, at least one each, next to falling `shares` of n, that add up to the rounded sum of them all: largest
    remainder, ties to the earliest. They never grow where the shares do not."""
    wanted = [max(1.0, share * n) for share in shares]
    whole = [math.floor(each + 1e-9) for each in wanted]
    rest = [each - count for each, count in zip(wanted, whole, strict=True)]
    more = round(sum(wanted)) - sum(whole)
    for layer in sorted(range(len(rest)), key=lambda at: (-round(rest[at], 9), at))[: max(0, more)]:
        whole[layer] += 1
    return whole


def mean_share(shares: Sequence[float], places: Sequence[int], depth: int) -> float:
    """What `depth` layers see on average, as a share of the tokens: shares[0] from the entrance on, of those shares[1] from layer
    places[0] on, and so forth."""
    left, total = 1.0, 0.0
    for share, (start, end) in zip(shares, pairwise([0, *places, depth]), strict=True):
        left *= share
        total += left * (end - start)
    return total / depth


def last_share(mean: float, shares: Sequence[float], places: Sequence[int], depth: int) -> float:
    """The last share with which `mean_share` is `mean`, after the other ones; at most 1, and 0 or less where those alone spend
    more."""
    left = 1.0
    for share in shares:
        left *= share
    spent = mean_share([*shares, 0.0], places, depth)
    return min(1.0, (mean - spent) * depth / (left * (depth - places[-1])))


def fitted(shares: Sequence[float]) -> tuple[float, float, float]:
    """kappa, low and high of the sigmoid nearest to a falling curve of shares, by least squares on a grid of kappa and middle."""
    low, high, layers = min(shares), max(shares), range(len(shares))

    def off(kappa: float, middle: float) -> float:
        return sum((a - b) ** 2 for a, b in zip(falling(layers, kappa, low, high, middle), shares, strict=True))

    steep = [2 ** (power / 2) for power in range(-8, 9)]
    middles = [layer / 2 for layer in range(2 * len(shares) + 1)]
    _, kappa = min((off(kappa, middle), kappa) for kappa in steep for middle in middles)
    return kappa, low, high
