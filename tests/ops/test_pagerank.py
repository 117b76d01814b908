"""PageRank on causal attention: hand-worked numbers, and any block size gives the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jeton.ops.pagerank import importance, pagerank

WORKED = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [1 / 7, 2 / 7, 4 / 7]])


def ranked(m: Tensor, start: Tensor, rounds: int, block: int) -> Tensor:
    return pagerank(lambda begin, stop: m[:, :, begin:stop, :stop], start, m.shape[1], rounds, block)


@pytest.mark.parametrize("block", [1, 2, 3, 128])
@pytest.mark.parametrize(
    ("rounds", "expected"), [(0, [1 / 3] * 3), (1, [0.54762, 0.26190, 0.19048]), (5, [0.92971, 0.04999, 0.02031])]
)
def test_three_tokens_by_hand(rounds, expected, block):
    p = ranked(WORKED[None, None], torch.full((1, 3), 1 / 3), rounds, block)
    torch.testing.assert_close(p[0, 0], torch.tensor(expected), atol=5e-6, rtol=0)


@pytest.mark.parametrize("block", [1, 7, 16, 40])
def test_blocks_give_what_the_whole_map_gives(block):
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(2, 3, 40, 40, generator=generator).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1)
    start = torch.rand(2, 40, generator=generator)
    p = start[:, None, None].expand(2, 3, 1, 40)
    for _ in range(5):
        p = p @ m
    torch.testing.assert_close(ranked(m, start, 5, block), p[:, :, 0])
    assert not torch.allclose(ranked(m, start, 4, block), p[:, :, 0], atol=1e-4)


def test_heads_count_by_their_squares():
    torch.testing.assert_close(importance(torch.tensor([[[3.0, 1.0], [4.0, 1.0]]])), torch.tensor([[12.5**0.5, 1.0]]))
