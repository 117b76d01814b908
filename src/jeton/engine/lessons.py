"""What learned methods own beside the model: built for its encoder, read from their weights, trained, and saved again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..learned import Learned, Shape, load, needs_training, save
from ..method import Method, Unsupported
from ..models import Encoder


class Lessons(nn.ModuleDict):
    """The modules of every learned method of a run, by its id, in float32 on the encoder's device."""

    def __init__(self, encoder: Encoder, depth: int, methods: list[Method], train: bool) -> None:
        super().__init__()
        self.methods: dict[str, Learned] = {}
        self.shape = Shape(0, 0, depth, 0, 0)
        for method in methods:
            if train or needs_training(method):
                self._add(method, encoder, depth, train)  # type: ignore[arg-type]
        self.train(train)

    def _add(self, method: Learned, encoder: Encoder, depth: int, train: bool) -> None:
        name = method.card.id
        if name in self.methods:
            raise Unsupported(f"{name} stands twice in the sequence; a learned method can be applied once.")
        if method.weights is None and not train:
            raise ValueError(
                f"{name} decides by modules that are trained, and none were given: pass weights= (a file or folder that "
                f"training wrote, see jeton train {name}), or train=True to train them."
            )
        self.shape = encoder.shape(depth)
        if method.weights is None:
            module = method.build(self.shape)
        else:
            with torch.random.fork_rng(devices=[]):  # what is drawn is read over
                module = load(method, self.shape)
        if module is None:
            return
        self.methods[name] = method
        self[name] = module.float().to(next(encoder.model.parameters()).device)
        if not train:
            module.requires_grad_(False)

    def of(self, method: Method) -> nn.Module | None:
        name = method.card.id
        return self[name] if name in self else None  # noqa: SIM401 (it has no get)

    def flops(self, patches: int) -> float:
        """What the modules cost for one picture."""
        return sum(method.flops(patches, self.shape) for method in self.methods.values())

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        return [save(self[name], method, self.shape, folder) for name, method in self.methods.items()]


class Student(nn.Module):
    """A model with what is learned beside it. Parameters are named "model. ..." and "learned. ...", for `Recipe.rates`."""

    def __init__(self, model: nn.Module, learned: Lessons) -> None:
        super().__init__()
        self.model, self.learned = model, learned

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
