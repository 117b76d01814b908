"""SAM's vision encoder: blocks on maps, most of which attend in windows, with tables of relative positions; and Swin, Hiera and
SAM 2, in which nothing can leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..place import Lattice
from .base import Encoder, Parts
from .registry import Registry, adapter


@adapter("SamVisionEncoder")
class SamVision(Encoder):
    """Windows are laid over whatever map there is, with the side its lattice says; the model's own attention stretches its tables
    of relative positions to it. What windows lack at the borders is zeros to attention, and dropped behind it."""

    home = "transformers.models.sam.modeling_sam"
    maps = True
    resizable = False
    fixed = ("takes pictures of one size", "elvit, which makes the map inside smaller")
    pixel_mean = tuple(IMAGENET_DEFAULT_MEAN)
    pixel_std = tuple(IMAGENET_DEFAULT_STD)

    @property
    def window(self) -> int:  # type: ignore[override]
        return int(self.model.config.window_size)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.layers)

    def parts(self, block: nn.Module) -> Parts:
        return Parts(block.layer_norm1, block.attn, block.layer_norm2, block.mlp, residual_first=True)

    def attend(
        self, block: nn.Module, call: Callable[..., Any], x: Tensor, lattice: Lattice | None, given: tuple, handed: dict[str, Any]
    ) -> Any:
        assert lattice is not None
        picture = x.unflatten(1, lattice[:2])
        if not block.window_size:
            return call(picture)[0].flatten(1, 2)
        windows, padded = block.window_partition(picture, lattice.window)
        return block.window_unpartition(call(windows)[0], lattice.window, padded, lattice[:2]).flatten(1, 2)

    def listed(self, output: Tensor) -> Tensor:
        """(B, N, D) of the map (B, D, H, W) behind the neck."""
        return output.flatten(2).transpose(1, 2)

    def keys(self, block: int, n: int) -> int:
        return min(n, self.window**2) if self.blocks[block].window_size else n

    @property
    def mlp_width(self) -> int:
        return self.model.config.mlp_dim


Registry.refused |= dict.fromkeys(
    (
        *("SwinModel", "SwinBackbone", "SwinForImageClassification", "Swinv2Model", "Swinv2ForImageClassification"),
        *("HieraModel", "HieraForImageClassification", "Sam2Model", "Sam2VisionModel", "Sam2HieraDetModel"),
    ),
    "halves its map from stage to stage and attends in windows that must be full, so tokens cannot leave inside it. Fewer tokens "
    "in a Swin are learned: jeton.backbones.stvit.STSwin is one with semantic tokens. Use a model whose blocks see all patches "
    "(ViT, DINOv2, CLIP, SigLIP), or SAM's first encoder with elvit.",
)
