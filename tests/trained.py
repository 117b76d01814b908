"""Weights for methods that decide by modules of their own: random ones, wide enough that decisions differ."""

from __future__ import annotations

import tempfile
from functools import cache

import torch
from torch import nn

from jeton.learned import Shape, needs_training, save
from jeton.method import get, reducers

TINY = Shape(width=32, heads=4, depth=5, patches=49, prefix=1)  # of the encoders in tests/tiny.py
LEARNED = [card.id for card in reducers() if needs_training(card.object())]
_FOLDER = tempfile.TemporaryDirectory()


def modules(name: str, shape: Shape = TINY) -> nn.Module:
    """What a method would have learned."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = get(name).build(shape)
        for weight in made.parameters():
            nn.init.normal_(weight, std=0.5)
    return made.requires_grad_(False).eval()


@cache
def weights(name: str) -> str:
    """The same as a file."""
    return str(save(modules(name), get(name), TINY, _FOLDER.name))
