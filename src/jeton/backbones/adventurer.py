"""Adventurer: an image classifier of causal Mamba-2 blocks, each of which sees the mean of all tokens first.

The network of the study in `measure/patch_scaling.py`: its cost grows linearly with the number of patches. The mixer is
transformers' own Mamba-2. Letters: B pictures, N patches, D width; the class token is the last of N + 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, Mamba2Config, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from ..ops.patchify import resize_positions
from ._common import of_size

SIZES = {"tiny": (256, 12), "small": (512, 12), "base": (768, 12), "large": (1024, 24)}  # width, depth


class AdventurerConfig(PreTrainedConfig):
    """`flip`: which blocks see the patches in reverse order: "pairs" every other pair of blocks, as the paper says; "released"
    blocks 2 and 3 alone, as the released code does; "never". `mlp_ratio` of the SwiGLU MLP's inner width to D."""

    model_type = "jeton_adventurer"

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    state_size: int = 64
    expand: int = 2
    head_dim: int = 64
    chunk_size: int = 256
    conv_kernel: int = 4
    mlp_ratio: float = 2.5
    drop_path: float = 0.0
    flip: str = "pairs"
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    @classmethod
    def preset(cls, size: str, **more: Any) -> AdventurerConfig:
        """Adventurer "tiny", "small", "base" or "large"."""
        width, depth = of_size("Adventurer", SIZES, size)
        return cls(hidden_size=width, num_hidden_layers=depth, **more)

    def __post_init__(self, **more: Any) -> None:
        if self.flip not in ("pairs", "released", "never"):
            raise ValueError(f'flip must be "pairs", "released" or "never", got {self.flip!r}.')
        if self.image_size % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} pixels do not fill pictures of {self.image_size}.")
        super().__post_init__(**more)

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return self.image_size // self.patch_size

    def flips(self, block: int) -> bool:
        pair = block // 2
        return {"pairs": pair % 2 == 1, "released": pair == 1, "never": False}[self.flip]


class Gated(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + unflip(mixer([mean, flip(norm(x))]) without its first output), then x + mlp(norm(x)).

    The mean of all tokens goes ahead ("heading average"), so that a causal mixer's first token has seen the picture. A flip
    turns the patches round; the class token stays last. `drop`: how often a half is left out in training, per picture."""

    def __init__(self, width: int, mixer: nn.Module, mlp: nn.Module, flip: bool = False, drop: float = 0.0, eps: float = 1e-5):
        super().__init__()
        self.norm1, self.mixer = nn.RMSNorm(width, eps=eps), mixer
        self.norm2, self.mlp = nn.RMSNorm(width, eps=eps), mlp
        self.flip, self.drop = flip, drop

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._kept(self.mix(self.norm1(x)))
        return x + self._kept(self.mlp(self.norm2(x)))

    def mix(self, x: Tensor) -> Tensor:
        x = turned(x) if self.flip else x
        x = self.mixer(torch.cat([x.mean(1, keepdim=True), x], 1))[:, 1:]
        return turned(x) if self.flip else x

    def _kept(self, x: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return x
        stays = torch.rand(len(x), 1, 1, device=x.device) >= self.drop
        return x * stays / (1 - self.drop)


def turned(x: Tensor) -> Tensor:
    """The patches in reverse, the class token last as before."""
    return torch.cat([x[:, :-1].flip(1), x[:, -1:]], 1)


class AdventurerForImageClassification(PreTrainedModel):
    """`pixel_values` (B, C, H, W) -> logits of the class token, the last of the sequence; sizes: `AdventurerConfig.preset`."""

    config_class = AdventurerConfig
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, config: AdventurerConfig) -> None:
        super().__init__(config)
        width, depth = config.hidden_size, config.num_hidden_layers
        self.patch_embed = nn.Conv2d(config.num_channels, width, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, width))
        self.layers = nn.ModuleList(
            Block(
                width,
                Mamba2Mixer(_mamba(config), number),
                Gated(width, int(config.mlp_ratio * width)),
                config.flips(number),
                config.drop_path * number / max(1, depth - 1),
                config.norm_eps,
            )
            for number in range(depth)
        )
        self.norm_f = nn.RMSNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, AdventurerForImageClassification):
            for value in (module.cls_token, module.pos_embed):
                init.trunc_normal_(value, std=std)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        x = self.patch_embed(pixel_values).flatten(2).mT
        positions = self.pos_embed
        if x.shape[1] + 1 != positions.shape[1]:
            side = pixel_values.shape[-1] // self.config.patch_size
            positions = resize_positions(positions, (x.shape[1] // side, side), front=0, back=1)
        x = torch.cat([x, self.cls_token.expand(len(x), -1, -1)], 1) + positions
        for block in self.layers:
            x = block(x)
        logits = self.head(self.norm_f(x[:, -1]))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def _mamba(config: AdventurerConfig) -> Mamba2Config:
    return Mamba2Config(
        hidden_size=config.hidden_size,
        num_heads=config.hidden_size * config.expand // config.head_dim,
        head_dim=config.head_dim,
        state_size=config.state_size,
        expand=config.expand,
        conv_kernel=config.conv_kernel,
        n_groups=1,
        chunk_size=config.chunk_size,
        num_hidden_layers=config.num_hidden_layers,
    )


AutoConfig.register(AdventurerConfig.model_type, AdventurerConfig)
AutoModelForImageClassification.register(AdventurerConfig, AdventurerForImageClassification)
