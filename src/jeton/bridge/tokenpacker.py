"""TokenPacker: a coarse grid of queries, each of which takes in the details of its own window."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..ops.squares import resize
from ..registry import register
from ._common import Bridge, Projector, RegionAttention, linear_flops

_OF = 24  # blocks of the encoder for which the paper names its layers, CLIP ViT-L/14
_LAYERS = (12, 16, 22, 23)


@register(
    title="TokenPacker: Efficient Visual Projector for Multimodal LLM",
    year=2024,
    source="arXiv:2407.02392",
    family="bridge",
    stage="projector",
    training_free=False,
    headline="144 or 64 of 576 tokens at LLaVA-1.5's accuracy or slightly better",
)
class TokenPacker(Bridge):
    """(P, N, D) features x and (P, N, m D) features m of several layers to (P, N / scale², d).

    q = x resized bilinearly to a grid of 1 / scale the side;  Q = LN(Wq q), K = LN(MLP_k(m)), V = LN(MLP_v(m)), each D wide.
    Query (i, j) attends, with `heads` heads, only to the scale² features of its own window; a two-layer MLP maps what it read to
    the language model's width. 576 features become 144, 64 or 36 tokens at scale 2, 3 or 4.

    The paper's text speaks of an update of the coarse query; the released module hands on the attention's output alone.
    `residual=True` adds Q. `layers` are hidden states of the encoder, by default 12, 16, 22 and 23 of 24 blocks and the same
    share of the depth elsewhere. x is what the model hands on by itself (the last layer but one).

    `tiles` prepares pictures of high resolution; their tokens are those of their tiles.
    """

    def __init__(
        self,
        config: Any,
        scale: int = 2,
        layers: Iterable[int] | None = None,
        heads: int = 8,
        residual: bool = False,
    ) -> None:
        super().__init__(config)
        if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1 or self.grid % scale:
            raise ValueError(f"scale must be a whole number that divides the grid's side {self.grid}, got {scale!r}.")
        depth = config.vision_config.num_hidden_layers
        chosen = [round(layer * depth / _OF) for layer in _LAYERS] if layers is None else list(layers)
        if not chosen or any(not -depth - 1 <= layer <= depth for layer in chosen):
            raise ValueError(f"layers are hidden states of an encoder of {depth} blocks, 0 to {depth}; got {chosen}.")
        own = config.vision_feature_layer
        base = own if isinstance(own, int) else own[0]  # a saved model names this one first
        self.scale, self.residual = scale, residual
        self.layers = (base, *chosen)
        width, many = self.width, len(chosen) * self.width
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key, self.to_value = (_mlp(many, width) for _ in range(2))
        self.norm_query, self.norm_key, self.norm_value = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.read = RegionAttention(width, heads)
        self.projector = Projector(config, width)
        self.apply(_start)
        nn.init.trunc_normal_(self.read.attention.in_proj_weight, std=0.02)

    @property
    def tokens(self) -> int:
        return (self.grid // self.scale) ** 2

    def forward(self, features: Tensor) -> Tensor:
        return self.projector(self.pack(features))

    def pack(self, features: Tensor) -> Tensor:
        """(P, N, (1 + m) D), x first, to (P, N / scale², D): what is projected."""
        x, fine = features.split([self.width, features.shape[-1] - self.width], -1)
        coarse = resize(x, self.grid // self.scale)
        query = self.norm_query(self.to_query(coarse))
        out = self.read(query, self.norm_key(self.to_key(fine)), self.norm_value(self.to_value(fine)))
        return out + query if self.residual else out

    def flops(self, length: int) -> float:
        d, per = self.width, self.scale**2
        attention = self.tokens * (2 * 2 * d * d + 4 * per * d) + self.patches * 2 * 2 * d * d
        coarse = self.tokens * (linear_flops(self.projector) + linear_flops(self.to_query))
        return coarse + attention + self.patches * (linear_flops(self.to_key) + linear_flops(self.to_value))


def _mlp(wide: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))


def _start(part: nn.Module) -> None:
    if isinstance(part, nn.Linear):
        nn.init.trunc_normal_(part.weight, std=0.02)
        if part.bias is not None:
            nn.init.zeros_(part.bias)


# -- high resolution -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def layouts(most: int = 9) -> tuple[tuple[int, int], ...]:
    """Rows and columns of tiles, at most so many tiles: fewer tiles first, then the squarer layout. The released lists for 16 and
    25 leave some long strips out."""
    found = [(h, w) for h in range(1, most + 1) for w in range(1, most // h + 1)]
    return tuple(sorted(found, key=lambda each: (each[0] * each[1], abs(each[0] - each[1]), each)))


def layout(height: int, width: int, tile: int, choices: Iterable[tuple[int, int]] | None = None) -> tuple[int, int]:
    """The rows and columns of tiles that suit a picture of height x width pixels: the largest of
    ``share of the area that the picture fills + 0.1 IoU(layout, picture enlarged 1.4 times)``, the first on ties."""
    grid = torch.tensor(layouts() if choices is None else list(choices))
    box, picture = (grid * tile).double(), torch.tensor([height, width]).double()
    ratio = (box / picture).amin(1, keepdim=True)
    area = box.prod(1)
    filled = (picture * ratio).round().prod(1) / area
    both = torch.minimum(box, 1.4 * picture).prod(1)
    score = filled + 0.1 * both / (area + (1.4 * picture).prod() - both)
    rows, columns = grid[int((score >= score.max() - 1e-9).nonzero()[0])].tolist()
    return rows, columns


def tiles(
    image: Image.Image, tile: int, mark: str = "<image>", choices: Iterable[tuple[int, int]] | None = None
) -> tuple[list[Image.Image], str]:
    """The pictures to encode for one of high resolution, and what stands for them in the prompt in the place of one `mark`.

    The picture is resized, its ratio kept, and padded with zeros to rows x columns tiles. A comma stands between tiles of a row,
    a newline behind it; where there are several tiles, the whole picture follows as a thumbnail, with a newline of its own.
    """
    rows, columns = layout(image.height, image.width, tile, choices)
    ratio = min(rows * tile / image.height, columns * tile / image.width)
    size = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
    canvas = Image.new("RGB", (columns * tile, rows * tile))
    canvas.paste(image.convert("RGB").resize((min(size[0], canvas.width), min(size[1], canvas.height)), Image.Resampling.BICUBIC))
    parts = [canvas.crop((x * tile, y * tile, (x + 1) * tile, (y + 1) * tile)) for y in range(rows) for x in range(columns)]
    text = (",".join([mark] * columns) + "\n") * rows
    return (parts, text) if len(parts) == 1 else ([*parts, image], text + mark + "\n")
