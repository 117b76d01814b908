"""STViT: a few semantic tokens, cluster centres of the image tokens, go through the later blocks in their place.

Letters: B pictures, N = H x W image tokens, S semantic tokens, C width, s seeds on a side of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
)
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..registry import register
from ._semantic import Alone, LocalGeneration, ReadingBlock, SemanticGroup, begin, fitted, scaled

SWINS = {"tiny": (96, (2, 2, 6, 2)), "small": (96, (2, 2, 18, 2)), "base": (128, (2, 2, 18, 2))}  # width, depths


# -- on a plain vision transformer -------------------------------------------------------------------------------------


class STViTConfig(ViTConfig):
    """A ViT's fields and:

    sample     seeds on a side: S = sample² semantic tokens
    base       ordinary blocks in front; None: a third of `num_hidden_layers`
    recover    whether image tokens read back, so that a map comes out; blocks behind the base then form groups of `group`
    table      whether learned tokens are added before the second generation
    residual   whether the first generation adds to its seeds
    """

    model_type = "jeton_stvit"

    sample: int = 4
    base: int | None = None
    recover: bool = False
    group: int = 6
    table: bool = True
    residual: bool = True

    def __post_init__(self, **more: Any) -> None:
        super().__post_init__(**more)
        if self.base is None:
            self.base = self.num_hidden_layers // 3
        grid, rest = self.image_size // self.patch_size, self.num_hidden_layers - self.base
        if isinstance(self.sample, bool) or not 1 <= self.sample <= grid:
            raise ValueError(f"sample is the number of seeds on a side of a map of {grid} x {grid} tokens, got {self.sample!r}.")
        if self.base < 0 or rest < 2:
            raise ValueError(
                f"{self.num_hidden_layers} blocks with {self.base} in front leave no two to make semantic tokens with."
            )
        if self.recover and (self.group < 4 or rest % self.group):
            raise ValueError(
                f"{rest} blocks behind the base are no whole groups of {self.group} (image, two generations, recovery and more)."
            )


@dataclass
class STViTOutput(ModelOutput):
    """`last_hidden_state` holds semantic tokens (B, S, C), or with recovery the map of all image tokens (B, N, C)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None


@register(
    title="Making Vision Transformers Efficient from A Token Sparsification View",
    year=2023,
    source="arXiv:2303.08685",
    family="vit",
    stage="backbone",
    headline="16 tokens: DeiT over 100 % faster with 60 % fewer FLOPs at the same accuracy; Swin-B 83.2 % on ImageNet-1K",
    training_free=False,
)
class STViT(PreTrainedModel):
    """A vision transformer whose later blocks run on S semantic tokens; `STSwin` is the same within windows.

    `base` ordinary blocks on all N image tokens. Seeds are their maxima over a grid of s x s cells. Two generations refine them
    by attention: first the seeds read themselves and the image tokens, then, learned tokens added, once more. All other blocks
    are for the S tokens alone, and the head reads their mean (there is no class token). `pixel_values` (B, C, H, W) -> logits.

    With `recover` (STViT-R) the blocks behind the base form groups: an ordinary block, two generations, blocks on semantic
    tokens, and one in which the image tokens read them, which gives back the map of the original grid, for dense tasks.

    This form's code was not published; pooling by maxima, the residual on and the split in thirds are this reading of the paper.
    """

    config_class = STViTConfig
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = ["ReadingBlock"]

    def __init__(self, config: STViTConfig) -> None:
        super().__init__(config)
        width, grid = config.hidden_size, config.image_size // config.patch_size
        self.patch_embed = nn.Conv2d(config.num_channels, width, config.patch_size, config.patch_size)
        self.positions = nn.Parameter(torch.zeros(1, grid**2, width))
        self.base = nn.ModuleList(self._block() for _ in range(config.base))
        rest = config.num_hidden_layers - config.base
        sizes = [config.group - 4] * (rest // config.group) if config.recover else [rest - 2]
        self.groups = nn.ModuleList(self._group(among) for among in sizes)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.num_labels)
        self.post_init()

    def _block(self, residual: bool = True) -> ReadingBlock:
        config = self.config
        shape = config.hidden_size, config.num_attention_heads, config.intermediate_size
        return ReadingBlock(*shape, bias=config.qkv_bias, residual=residual)

    def _group(self, among: int) -> SemanticGroup:
        config = self.config
        return SemanticGroup(
            Alone(self._block()) if config.recover else None,
            LocalGeneration(self._block(config.residual), config.sample, region=config.image_size),
            self._block(),
            [self._block() for _ in range(among)],
            self._block() if config.recover else None,
            config.sample**2 if config.table else 0,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        begin(module, self.config.initializer_range)
        if module is self:
            init.trunc_normal_(self.positions, std=self.config.initializer_range)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> STViTOutput:
        x = self.patch_embed(pixel_values)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + fitted(self.positions, grid.numel())
        for block in self.base:
            x = block(x, x)
        for group in self.groups:
            x = group(x, grid)[0]
        x = self.norm(x)
        logits = self.head(x.mean(1))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return STViTOutput(loss, logits, x)


# -- within windows ----------------------------------------------------------------------------------------------------


class STSwinConfig(SwinConfig):
    """A Swin's fields and:

    stage         whose blocks form groups of `group` (2 is the third)
    sample        seeds on a side of each window; region: tokens on a side of what they read
    layer_scale   where the gains of every block begin; None: none
    residual      whether the first generation adds to its seeds. As released it does not, so semantic tokens begin near zero; to
                  train on few data it should
    table         learned tokens before the second generation of the first group
    stem          two 3 x 3 convolutions of stride 2 with batch norm in the place of the patch embedding
    """

    model_type = "jeton_stswin"

    stage: int = 2
    sample: int = 3
    region: int = 10
    group: int = 6
    layer_scale: float | None = 1e-5
    residual: bool = False
    table: bool = False
    stem: bool = True
    depths: list[int] | tuple[int, ...] = (2, 2, 18, 2)

    @classmethod
    def preset(cls, size: str, **more: Any) -> STSwinConfig:
        """Swin "tiny", "small" or "base"."""
        if size not in SWINS:
            raise ValueError(f"there is no Swin {size!r}; there are {', '.join(SWINS)}.")
        width, depths = SWINS[size]
        heads = tuple(width // 32 * 2**stage for stage in range(4))
        return cls(**{"embed_dim": width, "depths": depths, "num_heads": heads, **more})

    def __post_init__(self, **more: Any) -> None:
        super().__post_init__(**more)
        if not 0 <= self.stage < len(self.depths):
            raise ValueError(f"stage must be one of 0 to {len(self.depths) - 1}, got {self.stage!r}.")
        if self.group < 4 or self.depths[self.stage] % self.group:
            raise ValueError(
                f"the {self.depths[self.stage]} blocks of stage {self.stage} are no whole groups of {self.group} (image, two "
                "generations, recovery and more)."
            )
        if not 1 <= self.sample <= self.window_size:
            raise ValueError(f"sample must be 1 to {self.window_size}, the side of a window, got {self.sample!r}.")
        if self.stem and self.patch_size != 4:
            raise ValueError(f"the stem of convolutions makes patches of 4, not of {self.patch_size}; use stem=False.")


class STSwin(SwinForImageClassification):
    """transformers' Swin with semantic tokens in its third stage, whose output is the map of image tokens, as every stage's.

    A group of six blocks: Swin's own on image tokens, unshifted; seeds (3 x 3 maxima of every 7 x 7 window) read themselves and
    the 10 x 10 tokens around their window; the semantic tokens of all windows, one grid, read themselves and all image tokens;
    two blocks among them; the image tokens read them. Attention of semantic tokens has no positions and no bias on q, k, v.
    """

    config_class = STSwinConfig

    def __init__(self, config: STSwinConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForImageClassification"  # transformers looks it up by the name of its own classes
        if config.stem:
            self.swin.embeddings.patch_embeddings.projection = _stem(config.num_channels, config.embed_dim)
        stages = self.swin.encoder.layers
        if config.layer_scale is not None:
            for layer in (layer for stage in stages for layer in stage.blocks):
                layer.attention.o_proj = scaled(layer.attention.o_proj, config.layer_scale)
                layer.mlp.fc2 = scaled(layer.mlp.fc2, config.layer_scale)
        chosen = stages[config.stage]
        chosen.blocks = nn.ModuleList(
            self._group(chosen.blocks[first], first == 0) for first in range(0, len(chosen.blocks), config.group)
        )
        self.post_init()

    def _group(self, image: nn.Module, first: bool) -> SemanticGroup:
        config = self.config
        width, heads = config.embed_dim * 2**config.stage, config.num_heads[config.stage]
        side = config.image_size // config.patch_size // 2**config.stage
        image.shift_size = 0

        def block(residual: bool = True) -> ReadingBlock:
            hidden = int(config.mlp_ratio * width)
            return ReadingBlock(width, heads, hidden, bias=False, scale=config.layer_scale, residual=residual)

        local = LocalGeneration(block(config.residual), config.sample, config.window_size, config.region)
        count = (-(-side // config.window_size) * config.sample) ** 2
        among = [block() for _ in range(config.group - 4)]
        return SemanticGroup(image, local, block(), among, block(), count if config.table and first else 0)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        begin(module, self.config.initializer_range)


def _stem(channels: int, width: int) -> nn.Module:
    half, parts = width // 2, {"kernel_size": 3, "stride": 2, "padding": 1}
    return nn.Sequential(
        nn.Conv2d(channels, half, **parts), nn.BatchNorm2d(half), nn.Hardswish(),
        nn.Conv2d(half, width, **parts), nn.BatchNorm2d(width), nn.Hardswish(),
    )  # fmt: skip


for _config, _model in ((STViTConfig, STViT), (STSwinConfig, STSwin)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)
