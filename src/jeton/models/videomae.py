"""VideoMAE encoders: tokens are tubelets, a patch of a few frames each, and there is no special token."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..layout import Geometry
from ..method import Unsupported
from ..ops.pixels import cut
from .base import Inputs, Parts
from .registry import adapter
from .vit import ViT


@adapter("VideoMAEModel")
class VideoMae(ViT):
    """A video (T, C, H, W) is one picture of T/2 x H/16 x W/16 tokens: to methods, frames of one grid, one for each step in time.
    Attention is joint over space and time."""

    example: ClassVar = {"num_frames": 2, "image_size": 64}  # its table of positions is slow to make
    prefix = 0
    has_class = False
    resizable = False
    fixed = ("takes videos of the one size it was made for", "pool, or a method of the site block, e.g. tome")
    pixel_mean = tuple(IMAGENET_DEFAULT_MEAN)
    pixel_std = tuple(IMAGENET_DEFAULT_STD)

    def check(self, top: nn.Module) -> None:
        if hasattr(top, "decoder"):
            raise Unsupported(
                f"{type(top).__name__} hides most of a video and paints it again, which needs every tubelet in its place; use "
                f"its encoder, model.videomae."
            )

    def parts(self, block: nn.Module) -> Parts:
        return Parts(block.layernorm_before, block.attention, block.layernorm_after, _Mlp(block))

    @property
    def tubelet(self) -> int:
        """Frames of a tubelet."""
        return self.model.config.tubelet_size

    @property
    def usual_patches(self) -> int:
        return super().usual_patches * (self.model.config.num_frames // self.tubelet)

    def geometry(self, inputs: Inputs) -> list[Geometry]:
        pixels = inputs["pixel_values"]
        return [Geometry.picture(*self.grid(pixels), frames=pixels.shape[1] // self.tubelet)] * pixels.shape[0]

    def patches(self, pixels: Tensor) -> Tensor:
        """(B, N, C, V) with V values in a tubelet."""
        videos, frames = pixels.shape[:2]
        patches = cut(pixels.flatten(0, 1), self.patch_size)  # (B T, N, C, V)
        steps = patches.unflatten(0, (videos, frames // self.tubelet, self.tubelet))  # (B, S, t, N, C, V)
        return steps.permute(0, 1, 3, 4, 2, 5).flatten(4).flatten(1, 2)

    def arranged(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if inputs.get("bool_masked_pos") is not None:
            raise ValueError(f"{self.name} leaves out the tubelets in bool_masked_pos, which jeton cannot follow; leave it out.")
        return inputs

    def averaged(self, top: nn.Module) -> nn.Module | None:
        return getattr(top, "fc_norm", None)


class _Mlp:
    """The second half of a block, which the model writes as two modules, the last of them with the residual in it."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, x: Tensor) -> Tensor:
        out: Any = self.block.output
        mixed: Tensor = out.dropout(out.dense(self.block.intermediate(x)))  # type: ignore[operator]
        return mixed
