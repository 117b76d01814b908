"""Signals of an encoder, each from one attention call."""

from __future__ import annotations

import pytest
import torch

from jeton.engine.readings import measure, tokens_last
from jeton.needs import AnchorAttention, ClassAttention, ClassSimilarity, Keys, MeanAttention, Need, ReceivedAttention, Values

FROM_ATTENTION = [
    ClassAttention(),
    ClassAttention(logits=True),
    MeanAttention(),
    ClassSimilarity(),
    ReceivedAttention(),
    AnchorAttention(threshold=0.01),
    AnchorAttention(),
]


@pytest.mark.parametrize("need", [*FROM_ATTENTION, ClassAttention(joined=True), Keys(), Values()], ids=str)
def test_a_padded_picture_says_what_it_says_alone(need: Need) -> None:
    """Under a bias for every pair, with padding hidden as keys and counting for nothing as queries."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 7, 4)
    bias, real = torch.randn(1, 1, 7, 7), torch.arange(7)[None] < 5
    hidden = bias.masked_fill(~real[:, None, None], torch.finfo(torch.float32).min)
    padded = tokens_last(need, measure(need, query, key, value, hidden, real, 0.5))[..., :5]
    short = (part[:, :, :5] for part in (query, key, value))
    alone = tokens_last(need, measure(need, *short, bias[..., :5, :5], None, 0.5))
    torch.testing.assert_close(padded, alone)
    if need in FROM_ATTENTION:
        unbiased = tokens_last(need, measure(need, query, key, value, None, None, 0.5))[..., :5]
        assert (unbiased - alone).abs().max() > 0.01
