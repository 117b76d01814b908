"""Fewer tokens around the halves of blocks that diffusers' models are made of: a UNet's or a DiT's self attention, its MLP.

Hooks alone: whatever attention processor a model uses, it is handed fewer tokens, and what it gives is laid out on all of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..method import Method, Unsupported, get
from ..place import Place
from ..tokens import Reduction, Tokens

_HALVES = {"attention": "attn1", "mlp": "ff"}


def around(model: nn.Module, method: str | Method = "tomesd", downsample: int = 1, **fields: Any) -> Around:
    """Merge image tokens around halves of the blocks of a diffusers UNet or DiT until the result is removed; a context manager.

    method: one that acts `around` halves of a block, such as tomesd. Blocks whose grid is more than `downsample` times coarser
    than the model's finest are left alone. Receivers are drawn anew in every forward of the model, the same again after each
    `around`, and equally for all of a batch: prompted and unprompted halves agree. Raises `Unsupported` where the model has no
    such blocks or the method does not act so.
    """
    made = get(method, **fields)
    if not made.around:
        raise Unsupported(f"{made.card.id} does not give tokens back behind each half of a block; use tomesd.")
    return Around(model, made, downsample).attach()


class Around:
    """One method around the blocks of one model. `counts`: (before, after) of every block that merged in the last forward."""

    def __init__(self, model: nn.Module, method: Method, downsample: int) -> None:
        self.model, self.method, self.downsample = model, method, downsample
        self.blocks = [part for part in model.modules() if type(part).__name__ == "BasicTransformerBlock"]
        if not self.blocks:
            raise Unsupported(
                f"{method.card.id} stands around the halves of diffusers' BasicTransformerBlock, and {type(model).__name__} has "
                f"none; UNet2DConditionModel and DiTTransformer2DModel do."
            )
        self.handles: list[Any] = []
        self.counts: dict[int, tuple[int, int]] = {}
        self.shape, self.forwards = (0, 0), -1

    def attach(self) -> Around:
        self.handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for number, block in enumerate(self.blocks):
            _Block(self, number).attach(block)
        return self

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def __enter__(self) -> Around:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        picture = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        patch = getattr(self.model.config, "patch_size", None) or 1
        self.shape = (picture.shape[-2] // patch, picture.shape[-1] // patch)
        self.forwards += 1
        self.counts.clear()

    def grid(self, n: int) -> tuple[int, int] | None:
        """Rows and columns of n tokens: the model's finest grid, halved as often as n says; None where a block is too coarse."""
        height, width = self.shape
        factor = max(1, round(math.sqrt(height * width / n)))
        grid = (-(-height // factor), -(-width // factor))
        return grid if factor <= self.downsample and grid[0] * grid[1] == n else None

    def decide(self, number: int, x: Tensor) -> Reduction | None:
        grid = self.grid(x.shape[1])
        if grid is None:
            return None
        step = self.method.steps(x.shape[1], len(self.blocks))[number]
        if step is None:
            return None
        if hasattr(step, "seed"):
            step = replace(step, seed=step.seed + self.forwards * len(self.blocks))
        reduction = step.reduce(Tokens(x, place=Place.grid(x.shape[0], *grid, x.device)))
        if reduction.is_identity:
            return None
        self.counts[number] = (x.shape[1], reduction.k)
        return reduction


class _Block:
    """The hooks of one block."""

    def __init__(self, owner: Around, number: int) -> None:
        self.owner, self.number = owner, number
        self.reduction: Reduction | None = None

    def attach(self, block: nn.Module) -> None:
        handles = self.owner.handles
        handles.append(block.register_forward_pre_hook(self._decide, with_kwargs=True))
        for half in self.owner.method.around:
            part = getattr(block, _HALVES[half])
            handles.append(part.register_forward_pre_hook(self._shorten, with_kwargs=True))
            handles.append(part.register_forward_hook(self._restore))

    def _decide(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        with torch.no_grad():
            self.reduction = self.owner.decide(self.number, x)

    def _shorten(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.reduction is None:
            return None
        if args:
            return (self.reduction.mix(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.reduction.mix(kwargs["hidden_states"])}

    def _restore(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output if self.reduction is None else self.reduction.restore(Tokens(output)).features
