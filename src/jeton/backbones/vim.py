"""Vim: an image classifier of Mamba blocks that scan the patches in several directions, the class token in their middle.

The network that state-space systems of this room work on, in plain PyTorch. Letters: B pictures, N tokens, D width, E = expand D
inner channels, S states, K directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..ops.scan import selective_scan
from ..tokens import Reduction, gather
from ._common import of_size

SIZES = {"tiny": (192, 24), "small": (384, 24), "base": (768, 24)}  # width, depth
DIRECTIONS = ("forward", "backward", "down", "up")


class VimConfig(PreTrainedConfig):
    """`directions` in which a block scans: "forward" (row by row) and "backward" as Vim does, "down" (column by column) and "up"
    besides. `divide` averages them, as Vim's last weights do, where the first summed. `rank` of the step size's projection; None
    means D / 16."""

    model_type = "jeton_vim"

    image_size: int = 224
    patch_size: int = 16
    stride: int | None = None
    num_channels: int = 3
    hidden_size: int = 192
    num_hidden_layers: int = 24
    expand: int = 2
    state_size: int = 16
    conv_kernel: int = 4
    rank: int | None = None
    directions: list[str] | tuple[str, ...] = ("forward", "backward")
    divide: bool = True
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    @classmethod
    def preset(cls, size: str, **more: Any) -> VimConfig:
        """Vim "tiny", "small" or "base"."""
        width, depth = of_size("Vim", SIZES, size)
        return cls(hidden_size=width, num_hidden_layers=depth, **more)

    def __post_init__(self, **more: Any) -> None:
        wrong = [name for name in self.directions if name not in DIRECTIONS]
        if wrong or not self.directions:
            raise ValueError(f"directions are {', '.join(DIRECTIONS)}, got {tuple(self.directions)!r}.")
        super().__post_init__(**more)

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return (self.image_size - self.patch_size) // (self.stride or self.patch_size) + 1

    @property
    def middle(self) -> int:
        """Where the class token stands among the patches."""
        return self.grid**2 // 2


@dataclass(frozen=True)
class Walk:
    """How one direction goes over the tokens that are left.

    order: (B, N) the tokens in the order of the scan, back: (B, N) the way back from it; None where they stand so. at: (B, N)
    their places in the scan of all tokens, ascending; None where the scan takes no account of the tokens that are gone. total:
    tokens of the whole picture. zeros: the convolution in front of the scan sees zeros at missing places, else the tokens that
    are left as neighbours.
    """

    order: Tensor | None = None
    back: Tensor | None = None
    at: Tensor | None = None
    total: int = 0
    zeros: bool = False

    @classmethod
    def along(cls, order: Tensor) -> Walk:
        return cls(order, order.argsort(1))

    @cached_property
    def missing(self) -> Tensor | None:
        """(B, N) how many tokens are gone between each token and the one in front of it (the first finds no states to decay)."""
        return None if self.at is None else F.pad(self.at.diff(dim=1) - 1, (1, 0))


class Direction(nn.Module):
    """The convolution and the selective scan of one direction."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        inner, self.states = config.expand * config.hidden_size, config.state_size
        self.rank = config.rank or math.ceil(config.hidden_size / 16)
        self.conv1d = nn.Conv1d(inner, inner, config.conv_kernel, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * self.states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, self.states))
        self.D = nn.Parameter(torch.empty(inner))

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        """(B, N, E) to what the scan says of each token, both as tokens stand."""
        x = F.silu(self._convolved(x if walk.order is None else gather(x, walk.order), walk))
        rank, b, c = self.x_proj(x).split([self.rank, self.states, self.states], -1)
        idle, missing = None, walk.missing
        if missing is not None:  # a token that is gone takes the time that a token of zeros would
            idle = missing[..., None] * F.softplus(self.dt_proj.bias.float())
        y = selective_scan(x, F.softplus(self.dt_proj(rank)), -self.A_log.float().exp(), b, c, self.D, idle)
        return y if walk.back is None else gather(y, walk.back)

    def _convolved(self, x: Tensor, walk: Walk) -> Tensor:
        full = walk.at if walk.zeros else None
        if full is not None:
            spread = full[..., None].expand_as(x)
            x = x.new_zeros(x.shape[0], walk.total, x.shape[2]).scatter(1, spread, x)
        x = self.conv1d(F.pad(x.transpose(1, 2), (self.conv1d.kernel_size[0] - 1, 0))).transpose(1, 2)
        return x if full is None else gather(x, full)


class Mixer(nn.Module):
    """One gate for all directions: out((y_1 + ... + y_K) silu(z) [/ K])."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        inner = config.expand * config.hidden_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.directions = nn.ModuleList(Direction(config) for _ in config.directions)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.divisor = len(self.directions) if config.divide else 1

    def forward(self, x: Tensor, walks: list[Walk]) -> tuple[Tensor, list[Tensor]]:
        x, z = self.in_proj(x).chunk(2, -1)
        scanned = [direction(x, walk) for direction, walk in zip(self.directions, walks, strict=True)]
        return self.out_proj(sum(scanned[1:], scanned[0]) * F.silu(z) / self.divisor), scanned


class Block(nn.Module):
    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = Mixer(config)

    def forward(self, x: Tensor, walks: list[Walk]) -> tuple[Tensor, list[Tensor]]:
        mixed, scanned = self.mixer(self.norm(x), walks)
        return x + mixed, scanned


@dataclass
class VimOutput(ModelOutput):
    """`reduction` says which of all tokens, the class token at its place among them, `last_hidden_state` (B, N, D) holds; None:
    all. `counts`: tokens each block ran on."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    reduction: Any = None
    counts: Any = None


class VimForImageClassification(PreTrainedModel):
    """`pixel_values` (B, C, H, W) -> logits of the class token. The sizes "tiny", "small" and "base" are `VimConfig.preset`'s;
    `read_released` takes the weights that Vim's authors published."""

    config_class = VimConfig
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, config: VimConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(config.num_channels, width, patch, config.stride or patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, width))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm_f = nn.RMSNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Mamba's: step sizes from 0.001 to 0.1, states that decay at rates 1 to S, smaller output projections with depth."""
        std = self.config.initializer_range
        if isinstance(module, VimForImageClassification):
            for value in (module.cls_token, module.pos_embed):
                init.trunc_normal_(value, std=std)
        elif isinstance(module, Direction):
            rates = torch.arange(1, module.states + 1, dtype=torch.float32, device=module.A_log.device)
            init.copy_(module.A_log, rates.log().expand_as(module.A_log))
            init.ones_(module.D)
            init.uniform_(module.dt_proj.weight, -(module.rank**-0.5), module.rank**-0.5)
            low, high = math.log(1e-3), math.log(0.1)
            steps = (torch.rand_like(module.D) * (high - low) + low).exp().clamp(min=1e-4)
            init.copy_(module.dt_proj.bias, steps + torch.log(-torch.expm1(-steps)))  # so that softplus gives the steps
        elif isinstance(module, Mixer):
            for linear in (module.in_proj, module.out_proj, *(each.x_proj for each in module.directions)):
                init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            init.copy_(module.out_proj.weight, module.out_proj.weight / math.sqrt(self.config.num_hidden_layers))
        elif module is self.head:
            init.trunc_normal_(module.weight, std=std)
            init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> VimOutput:
        x = self.embed(pixel_values)
        batch, total, _ = x.shape
        reduction = Reduction.identity(batch, total, x.device)
        walks, counts = self.walks(reduction), []
        for number, block in enumerate(self.layers):
            counts.append(x.shape[1])
            x, scanned = block(x, walks)
            step = self.reduce(number, scanned, reduction.index)
            if step is not None:
                x, reduction = step.mix(x), reduction.then(step)
                walks = self.walks(reduction)
        x = self.norm_f(x)
        logits = self.head(gather(x, self.class_at(reduction.index)[:, None])[:, 0])
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return VimOutput(loss, logits, x, reduction, counts)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """(B, grid² + 1, D): patches in rows, the class token in the middle, positions added."""
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        if x.shape[1] + 1 != self.pos_embed.shape[1]:
            raise ValueError(
                f"this Vim was made for pictures of {self.config.image_size} x {self.config.image_size} pixels and got "
                f"{tuple(pixel_values.shape[-2:])}; resize them."
            )
        at, front = self.config.middle, self.cls_token.expand(len(x), -1, -1)
        return torch.cat([x[:, :at], front, x[:, at:]], 1) + self.pos_embed

    def class_at(self, index: Tensor) -> Tensor:
        """(B,) where the class token stands among the tokens that are left, of original places `index` (B, N)."""
        return (index == self.config.middle).to(torch.uint8).argmax(1)

    def walks(self, reduction: Reduction) -> list[Walk]:
        """How each direction goes over the tokens that are left."""
        index = reduction.index
        walks = []
        for name in self.config.directions:
            places = self.places(name, index)
            if name == "forward":  # tokens always stand so
                walks.append(self.aligned(Walk(), places, reduction))
            else:
                order = places.argsort(1)
                walks.append(self.aligned(Walk.along(order), places.gather(1, order), reduction))
        return walks

    def aligned(self, walk: Walk, at: Tensor, reduction: Reduction) -> Walk:
        """A walk over tokens that are left, of places `at` (B, N) in the scan of all; by default these do not matter."""
        return walk

    def places(self, direction: str, index: Tensor) -> Tensor:
        """Where tokens of original places `index` stand in the scan of all tokens in one direction."""
        grid, middle = self.config.grid, self.config.middle
        places = torch.arange(grid * grid, device=index.device)
        if direction in ("down", "up"):
            places = (places % grid) * grid + places // grid
        places = places + (places >= middle).long()
        places = torch.cat([places[:middle], places.new_full((1,), middle), places[middle:]])
        if direction in ("backward", "up"):
            places = grid * grid - places
        return places[index]

    def reduce(self, layer: int, scanned: list[Tensor], index: Tensor) -> Reduction | None:
        """Which tokens go on after a block, from what each direction's scan said of them (B, N, E each); None: all."""
        return None


def read_released(model: VimForImageClassification, state: Mapping[str, Tensor]) -> None:
    """Load weights by the names of Vim's published checkpoints, whose second direction has parameters that end in `_b`."""
    own = {}
    for name, value in state.items():
        name = name.replace("patch_embed.proj.", "patch_embed.")
        front, found, rest = name.partition(".mixer.")
        if found and not rest.startswith(("in_proj", "out_proj")):
            part, _, kind = rest.partition(".")
            backward = part.endswith("_b") or part == "A_b_log"
            part = "A_log" if part == "A_b_log" else part.removesuffix("_b")
            name = f"{front}.mixer.directions.{int(backward)}.{part}" + (f".{kind}" if kind else "")
        own[name] = value
    model.load_state_dict(own)


AutoConfig.register(VimConfig.model_type, VimConfig, exist_ok=True)
AutoModelForImageClassification.register(VimConfig, VimForImageClassification, exist_ok=True)
