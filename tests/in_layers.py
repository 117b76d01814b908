"""What tests of methods inside the language model share: a method that only looks, and the model's own attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tiny
from jeton.method import Method, Promise, get
from jeton.models import adapt
from jeton.needs import Need
from jeton.tokens import Reduction, Tokens


class Looking(Method):
    """Reads signals in front of one layer and keeps everything."""

    card = get("random").card
    site = "layer"
    spec = "looking"

    def __init__(self, layer: int, **asked: Need) -> None:
        self.layer, self.asked = layer, asked
        self.heard: dict[str, Tensor] = {}
        self.tokens: Tokens | None = None

    def needs(self) -> dict[str, Need]:
        return self.asked

    def reduce(self, tokens: Tokens, signals: Any = None) -> Reduction:
        self.tokens = tokens
        self.heard.update(signals or {})
        return Reduction.identity(tokens.features.shape[0], len(tokens), tokens.device)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return [self if layer == self.layer else None for layer in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n)


@torch.no_grad()
def eager(net: nn.Module, inputs: tiny.Inputs) -> list[Tensor]:
    """(B, L, L) of every layer: the model's own attention, averaged over heads. `net` must run eagerly."""
    found: list[Tensor] = []
    view = adapt(net)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[1].float().mean(1))

    handles = [view.attention(layer).register_forward_hook(keep) for layer in view.layers]
    try:
        tiny.run(net, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def images(net: nn.Module, inputs: tiny.Inputs) -> list[tuple[int, list[int]]]:
    """The prompt and the columns of each image, in order."""
    found: list[tuple[int, list[int]]] = []
    for sample, row in enumerate(inputs["input_ids"].tolist()):
        for column, token in enumerate(row):
            if token != tiny.IMAGE:
                continue
            if found and found[-1][0] == sample and found[-1][1][-1] == column - 1:
                found[-1][1].append(column)
            else:
                found.append((sample, [column]))
    return found
