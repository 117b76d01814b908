"""Tokens that leave for a while: all of them come back, whoever else took some in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from jeton.engine import apply
from jeton.method import Method, Promise, Undo, get


class Away(Method):
    """Merges six pairs in block `after` and undoes that behind block `until`."""

    card = get("tome").card
    site, restores, spec = "block", True, "away"

    def __init__(self, after: int, until: int) -> None:
        self.after, self.until = after, until

    def steps(self, n: int, depth: int) -> list[Method | None]:
        steps: list[Method | None] = [None] * depth
        steps[self.after], steps[self.until] = get("tome", r=6), Undo()
        return steps

    def promise(self, n: int, depth: int = 12) -> Any:
        return Promise(n)


@torch.no_grad()
@pytest.mark.parametrize(
    ("other", "lengths"),
    [((1, 2), [43, 37, 37, 43, 49]), ((1, 3), [43, 37, 37, 37, 49]), ((1, 4), [43, 37, 37, 37, 49])],
    ids=["inside", "together", "beyond"],
)
def test_what_is_given_back_twice_is_given_back_once(other: tuple[int, int], lengths: list[int]) -> None:
    net = tiny.model("SiglipVisionModel")
    with apply(net, Away(0, 3) | Away(*other)) as run:
        out = tiny.run(net, tiny.inputs_for(net))
        assert [mlp for _, mlp in run.site.lengths] == lengths
    assert out.shape[1] == len(run.tokens) == 49 and run.tokens.size is None and run.reduction is None
