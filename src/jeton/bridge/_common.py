"""What bridges share: the base class, the two-layer projector, and attention within windows and from learned queries."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..layout import Geometry
from ..ops.squares import resize, side, waves, windows
from ..registry import Card


class Bridge(nn.Module):
    """What stands in the place of a model's projector: P pictures of N encoder features in, K tokens of the language model's
    width d each out. Subclasses take the model's configuration and their own options, which are saved in `config.bridge`.

    layers: hidden states of the encoder that are concatenated on channels, (P, N, m·D); None for the model's own choice.
    tokens: K, for each group of pictures that makes one image. pictures: pictures in such a group.
    fuses: `forward` gives M more rows behind the K, which `fuse` uses to change the prompt's embeddings.
    whole: it reads the encoder's class token too, where there is one, in front of the N features.
    """

    card: ClassVar[Card]
    layers: tuple[int, ...] | None = None
    pictures: int = 1
    fuses: bool = False
    whole: bool = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        vision = config.vision_config
        self.width, self.out = vision.hidden_size, config.text_config.hidden_size
        self.grid = vision.image_size // vision.patch_size
        self.patches = self.grid**2

    @property
    def tokens(self) -> int:
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """(P, N, m·D) to (P, K, d)."""
        raise NotImplementedError

    def fuse(self, embeds: Tensor, visual: Tensor, tokens: Tensor, context: Tensor, instruction: Tensor) -> Tensor:
        """The prompt (B, L, d) with visual tokens in it, where the bridge `fuses`: raw embeddings of the text, `visual` (B, L)
        true at placeholders, tokens (P, K, d), context (P, M, d), `instruction` (B, L) true at text that may be used."""
        raise NotImplementedError

    def adopt(self, projector: nn.Module) -> None:
        """Start from a trained projector where the bridge has one of the same shape."""
        own, its = getattr(self, "projector", None), projector.state_dict()
        if own is not None and {name: value.shape for name, value in own.state_dict().items()} == {
            name: value.shape for name, value in its.items()
        }:
            own.load_state_dict(its)

    def enter(self, tower: nn.Module) -> None:
        """Change what the encoder does, where the bridge has a part inside it; called once, when the model is put together."""

    def geometry(self) -> Geometry:
        """Where the K tokens of an image lie on it: a square grid of equal windows, unless the bridge says otherwise."""
        cells = side(self.tokens)
        source = windows(torch.arange(self.patches)[None, :, None], self.grid // cells)[0, :, :, 0]
        return square(source, cells, self.patches)

    def flops(self, length: int) -> float:
        """FLOPs for one image, in a prompt of `length` tokens."""
        raise NotImplementedError


def square(source: Tensor, cells: int, patches: int) -> Geometry:
    """The geometry of cells x cells tokens of one picture, each made of the encoder patches in its row of `source`."""
    at = torch.arange(cells * cells)
    return Geometry.of(source, torch.zeros_like(at), at // cells, at % cells, [(cells, cells)], patches, ("image",))


class Projector(nn.Module):
    """LLaVA's two-layer MLP, by the same names: a trained one fits."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        out, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(width, out, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(out, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class RegionAttention(nn.Module):
    """Each of h·w queries attends only to the cells of its own window: q (B, h·w, D), k and v (B, H·W, D) to (B, h·w, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = side(k.shape[1]) // side(q.shape[1])
        near = (windows(x, size).flatten(0, 1) for x in (k, v))  # (picture, window) becomes the batch, for q and k alike
        out = self.attention(q.flatten(0, 1)[:, None], *near, need_weights=False)[0]
        return out.view_as(q)


class QueryResampler(nn.Module):
    """C x C learned queries read a square grid of features (B, N, D) to (B, C², D) by one attention, without residual.

    Queries and features are normalised; 2-D sine and cosine positions are added to queries and keys, not to values. Positions of
    the keys are those of their own grid, or with `resized` the query grid's, bicubically resized to it.
    """

    def __init__(self, cells: int, width: int, heads: int, resized: bool = False) -> None:
        super().__init__()
        self.cells, self.resized = cells, resized
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(cells**2, width), std=0.02))
        self.norm_query, self.norm_features = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        width, grid = x.shape[-1], side(x.shape[1])
        mine = waves(self.cells, width).to(x)
        keys = resize(mine[None], grid, "bicubic")[0] if self.resized else waves(grid, width).to(x)
        query, x = self.norm_query(self.query) + mine, self.norm_features(x)
        return self.attention(query.expand(len(x), -1, -1), x + keys, x, need_weights=False)[0]


def linear_flops(module: nn.Module) -> float:
    """FLOPs of all linear maps of a module, for one token."""
    return sum(2.0 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
