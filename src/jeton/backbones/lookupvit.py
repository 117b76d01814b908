"""LookupViT: heavy computation on a few compressed tokens, light computation on the many they look things up in.

Letters: B pictures, N lookup tokens, M compressed tokens, D width, h heads, T places in time (1 for images).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, ViTConfig
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTLayer
from transformers.utils import ModelOutput

from ..registry import register

SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, depth, heads


class LookupViTConfig(ViTConfig):
    """A ViT's fields (`intermediate_size` is the compressed tokens' MLP) and:

    compressed   compressed tokens on a side, where a forward does not say otherwise: M = compressed² (times T)
    light        the lookup tokens' MLP has D / light hidden channels
    pool         what the head averages: "compressed" tokens, or "both" kinds
    frames       frames of a video, tubelet of them in a token; 1 and 1 for images
    """

    model_type = "jeton_lookupvit"

    compressed: int = 5
    light: int = 2
    pool: str = "compressed"
    frames: int = 1
    tubelet: int = 1

    @classmethod
    def preset(cls, size: str, **more: Any) -> LookupViTConfig:
        """The widths and depths of ViT "small", "base" and "large"."""
        if size not in SIZES:
            raise ValueError(f"there is no LookupViT {size!r}; there are {', '.join(SIZES)}.")
        width, depth, heads = SIZES[size]
        shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * width}
        return cls(**{**shape, **more})

    def __post_init__(self, **more: Any) -> None:
        super().__post_init__(**more)
        for name in ("compressed", "light", "frames", "tubelet"):
            if isinstance(getattr(self, name), bool) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive whole number, got {getattr(self, name)!r}.")
        if self.pool not in ("compressed", "both"):
            raise ValueError(f'pool must be "compressed" or "both", got {self.pool!r}.')
        if self.frames % self.tubelet or self.image_size % self.patch_size:
            raise ValueError(
                f"{self.frames} frames of {self.image_size} x {self.image_size} cannot be cut into tokens of {self.tubelet} x "
                f"{self.patch_size} x {self.patch_size}."
            )

    @property
    def grid(self) -> int:
        """Lookup tokens on a side."""
        return self.image_size // self.patch_size

    @property
    def times(self) -> int:
        """Places of tokens in time."""
        return self.frames // self.tubelet


def block_macs(n: int, m: int, width: int, light: int = 2) -> int:
    """Multiply-adds of one block with n lookup and m compressed tokens: keys, values, light MLP and output of the lookup tokens;
    gathering (queries times keys, rows times values) and scattering by the same matrix; query, output, value and a ViT block
    of the compressed tokens."""
    lookup = n * width * (3 * width + 2 * (width // light))
    return lookup + 3 * n * m * width + 15 * m * width**2 + 2 * m**2 * width


class LookupBlock(nn.Module):
    """Gather, refine, scatter. One attention matrix A (B, h, M, N), softmax over the lookup tokens, serves both ways:

    p <- p + O(A V_l)    p <- ViT block(p)    l <- l + O'(Aᵀ V_p)    l <- l + light MLP(l)

    Rows of Aᵀ are not normalised: what a lookup token receives grows with how much it gave. Norms stand in front of every map.
    """

    def __init__(self, config: LookupViTConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.qkv_bias
        self.heads = config.num_attention_heads
        self.norm_lookup, self.norm_compressed, self.norm_refined, self.norm_light = (
            nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in range(4)
        )
        self.query, self.key, self.value, self.value_back = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.output, self.output_back = nn.Linear(width, width), nn.Linear(width, width)
        self.refine = ViTLayer(config)
        hidden = width // config.light
        self.light = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, lookup: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        read = self.norm_lookup(lookup)
        q, k, v = (
            self._split(self.query(self.norm_compressed(compressed))),
            self._split(self.key(read)),
            self._split(self.value(read)),
        )
        attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        compressed = compressed + self.output(_join(attention @ v))
        compressed = self.refine(compressed)
        back = self._split(self.value_back(self.norm_refined(compressed)))
        lookup = lookup + self.output_back(_join(attention.transpose(-1, -2) @ back))
        return lookup + self.light(self.norm_light(lookup)), compressed

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


@dataclass
class LookupViTOutput(ModelOutput):
    """`lookup` (B, N, D) is the dense map, in rows (of every time); `compressed` (B, M, D)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    compressed: Tensor | None = None
    lookup: Tensor | None = None


@register(
    title="LookupViT: Compressing visual information to a limited number of tokens",
    year=2024,
    source="arXiv:2407.12753",
    family="vit",
    stage="backbone",
    headline="half the FLOPs of ViT at equal or better accuracy on ImageNet, Kinetics-400 and captioning",
    training_free=False,
)
class LookupViT(PreTrainedModel):
    """An image or video classifier with two streams of tokens; the same weights run with any number of compressed ones.

    Lookup tokens are the patches (tubelets of a video) with their positions. Compressed tokens begin as their map, resized to
    m x m (for every time), with positions of their own that are resized alike; both resizings are bilinear, with antialiasing
    where they shrink. Every block is a `LookupBlock`; the head averages the compressed tokens. `pixel_values` (B, C, H, W), or
    (B, F, C, H, W) for videos, and `compressed=m` -> logits. A video's tokens attend jointly over space and time.

    Train with `multi_resolution((3, 5, 7, 10))`, which draws m for each step. A block costs about half of a ViT's: for N = 196,
    M = 25, D = 384, 177.0 against 376.3 million multiply-adds (`block_macs`).

    The authors' code was not published; norms, biases and the antialiasing (their framework's default) are this reading of the
    paper.
    """

    config_class = LookupViTConfig
    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _no_split_modules: ClassVar[list[str]] = ["LookupBlock"]

    def __init__(self, config: LookupViTConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed = nn.Linear(config.num_channels * config.tubelet * config.patch_size**2, width)
        self.positions = nn.Parameter(torch.zeros(1, config.grid**2, width))
        self.compressed_positions = nn.Parameter(torch.zeros(1, config.compressed**2, width))
        self.times = nn.Parameter(torch.zeros(1, config.times, 1, width)) if config.times > 1 else None
        self.blocks = nn.ModuleList(LookupBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            for table in (self.positions, self.compressed_positions, *([] if self.times is None else [self.times])):
                init.trunc_normal_(table, std=self.config.initializer_range)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, compressed: int | None = None, **_: Any
    ) -> LookupViTOutput:
        lookup, few = self.streams(pixel_values, compressed)
        lookup, few = self.encode(lookup, few)
        logits = self.classify(lookup, few)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return LookupViTOutput(loss, logits, few, lookup)

    def streams(self, pixel_values: Tensor, compressed: int | None = None) -> tuple[Tensor, Tensor]:
        """The tokens that enter the first block: lookup (B, N, D) and compressed (B, T m², D)."""
        m = self.config.compressed if compressed is None else compressed
        if isinstance(m, bool) or not isinstance(m, int) or m < 1:
            raise ValueError(f"compressed is the number of tokens on a side, a positive whole number, got {compressed!r}.")
        x = self.embed(self._cut(pixel_values))  # (B, T, rows, cols, D)
        batch, times, rows, cols, _ = x.shape
        at = resize(self.positions, self.config.grid, (rows, cols))
        lookup = x.flatten(2, 3) + at[:, None]
        if self.times is not None:
            lookup = lookup + self.times
        few = resize(lookup.flatten(0, 1), rows, (m, m)).unflatten(0, (batch, times))
        few = few + resize(self.compressed_positions, self.config.compressed, (m, m))[:, None]
        return lookup.flatten(1, 2), few.flatten(1, 2)

    def encode(self, lookup: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        """All blocks. Lookup tokens may stand in any order."""
        for block in self.blocks:
            lookup, compressed = block(lookup, compressed)
        return lookup, compressed

    def classify(self, lookup: Tensor, compressed: Tensor) -> Tensor:
        both = torch.cat([compressed, lookup], 1) if self.config.pool == "both" else compressed
        return self.head(self.norm(both.mean(1)))

    def _cut(self, pixels: Tensor) -> Tensor:
        """(B, T, rows, cols, values) of the tubelets."""
        config, patch = self.config, self.config.patch_size
        if pixels.dim() == 4:
            pixels = pixels[:, None]
        if pixels.dim() != 5 or pixels.shape[1] != config.frames or pixels.shape[2] != config.num_channels:
            raise ValueError(
                f"this LookupViT takes {config.frames} frame(s) of {config.num_channels} channel(s): pixel_values (B, C, H, W), "
                f"or (B, frames, C, H, W) for videos; got {tuple(pixels.shape)}."
            )
        if pixels.shape[3] % patch or pixels.shape[4] % patch:
            raise ValueError(f"pictures of {pixels.shape[3]} x {pixels.shape[4]} pixels are not whole patches of {patch}.")
        x = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(1, (-1, config.tubelet))
        return x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4)


def resize(tokens: Tensor, rows: int, to: tuple[int, int]) -> Tensor:
    """A map of tokens (B, rows · columns, D) as one of `to` rows and columns, bilinear."""
    grid = tokens.unflatten(1, (rows, -1))
    if grid.shape[1:3] == to:
        return tokens
    small = F.interpolate(grid.permute(0, 3, 1, 2), size=to, mode="bilinear", antialias=True)
    return small.flatten(2).transpose(1, 2)


def multi_resolution(sizes: Sequence[int] = (3, 5, 7, 10)) -> Callable[[Any, tuple[Tensor, Tensor]], Tensor]:
    """A loss for `jeton.train` on batches (pixels, labels): cross entropy with compressed tokens on a side drawn from `sizes`,
    the same for a batch."""
    if not sizes:
        raise ValueError("multi_resolution needs at least one size, such as (3, 5, 7, 10).")

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = batch
        return model(pixels, labels, compressed=sizes[int(torch.randint(len(sizes), ()))]).loss

    return loss


AutoConfig.register(LookupViTConfig.model_type, LookupViTConfig, exist_ok=True)
AutoModelForImageClassification.register(LookupViTConfig, LookupViT, exist_ok=True)
