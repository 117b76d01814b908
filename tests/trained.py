"""Weights for methods that decide by modules of their own: random ones, wide enough that decisions differ."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from jeton.learned import Shape, needs_training, save
from jeton.method import get, methods

TINY = Shape(width=32, heads=4, depth=5, patches=49, prefix=1)  # of the encoders in tests/tiny.py
LEARNED = [card.id for card in methods() if needs_training(card.object())]
_FOLDER = tempfile.TemporaryDirectory()


def modules(name: str, shape: Shape = TINY) -> nn.Module:
    """What a method would have learned; where that depends on a budget, for the largest."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = get(name, keep=1.0).build(shape)
        for weight in made.parameters():
            nn.init.normal_(weight, std=0.5)
    return made.requires_grad_(False).eval()


@cache
def weights(name: str) -> str:
    """The same as a file, for the largest pictures."""
    shape = replace(TINY, patches=400)
    return str(save(modules(name, shape), get(name, keep=1.0), shape, _FOLDER.name))
