"""What jeton makes of hand-made scores of patches."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.nn import functional as F
from witness import Listening

import tiny
from jeton.engine import apply
from jeton.engine.encoder import EncoderSite
from jeton.needs import ReceivedAttention


def squares(scores: Tensor, height: int, width: int, side: int) -> Tensor:
    """The means of `scores` (height * width,) over squares of patches, row by row; a rest is left out."""
    return F.avg_pool2d(scores.view(1, 1, height, width), side).flatten()


def heard_scores(net: nn.Module, inputs: tiny.Inputs, scores: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What a method is told of each image's tokens where patches, over all pictures in order, have these scores."""
    monkeypatch.setattr(EncoderSite, "flat", lambda site, need: scores)
    listener = Listening("encoder", {"received": ReceivedAttention(layer=-1)})
    with apply(net, listener) as run:
        tiny.run(net, inputs)
        assert run.layout is not None
        counts = run.layout.album.counts
    return [row[:count] for row, count in zip(listener.heard["received"], counts, strict=True)]
