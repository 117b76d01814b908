"""Attention with the map of the tokens there were in front of a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from dropping import Dropping
from jeton.engine import apply
from jeton.engine.fused import MapAhead
from jeton.needs import Need, ReceivedAttention
from jeton.tokens import Reduction, Tokens


class Looking(Dropping):
    """Looks ahead at a block's map, as methods that merge do, and merges nothing."""

    ahead, spec = True, "looking"

    def needs(self) -> dict[str, Need]:
        return {"attention": ReceivedAttention(layer=None)}

    def reduce(self, tokens: Tokens, signals: Any = None) -> Reduction:
        each = torch.arange(len(tokens)).repeat(len(tokens.features), 1)
        return Reduction(each, each, weight=torch.ones(each.shape), prefix=tokens.prefix)


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 4])
def test_tokens_that_leave_behind_the_look_get_no_attention(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The map of a method that merges nothing, on the tokens another one leaves, is that of these alone. With one head of
    32 channels the map of 50 tokens is drawn, with four of 8 it is not."""
    net = tiny.tiny_vit(num_attention_heads=heads)
    inputs, drawn = tiny.inputs_for(net), []
    draw = MapAhead.draw
    monkeypatch.setattr(MapAhead, "draw", lambda self: (draw(self), drawn.append(self.map is not None)))
    with apply(net, Dropping()):
        expected = tiny.run(net, inputs)
    with apply(net, Looking() | Dropping()):
        got = tiny.run(net, inputs)
    assert drawn == [heads == 1]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
