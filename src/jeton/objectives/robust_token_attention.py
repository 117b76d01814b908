"""TAP and ADL: tokens averaged over their neighbourhood before they attend, and attention rows that shall not all look alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..method import Unsupported
from ..models import Encoder, adapt
from ..ops.diversity import likeness
from ..registry import register


class TokenAwarePooling(nn.Module):
    """TAP on a map (B, C, H, W): every position mixes K averages of its neighbourhood by weights of its own.

    Branch 0 is the position itself, branch k the mean of 3 x 3 positions k apart, zeros outside and always divided by 9. Weights
    (B, K, H, W) = softmax over k of conv3x3(BN(conv3x3(x))), C to K to K channels, no biases.
    """

    def __init__(self, width: int, branches: int = 4) -> None:
        super().__init__()
        if branches < 1:
            raise ValueError(f"branches={branches}: one branch, the position itself, is the least.")
        self.branches = branches
        self.first = nn.Conv2d(width, branches, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(branches)
        self.second = nn.Conv2d(branches, branches, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.second(self.norm(self.first(x))).softmax(1)
        out = x * weights[:, :1]
        for k in range(1, self.branches):
            out = out + average(x, k) * weights[:, k : k + 1]
        return out


def average(x: Tensor, dilation: int) -> Tensor:
    """The mean of 3 x 3 positions `dilation` apart of x (B, C, H, W), zeros outside counted."""
    ninth = x.new_full((x.shape[1], 1, 3, 3), 1 / 9)
    return F.conv2d(x, ninth, padding=dilation, dilation=dilation, groups=x.shape[1])


class PooledNorm(nn.Module):
    """TAP in front of a block's first norm, on the patches; special tokens pass by. What the residual adds to is not pooled."""

    def __init__(self, norm: nn.Module, pooling: TokenAwarePooling, prefix: int, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.norm, self.pooling, self.prefix, self.grid = norm, pooling, prefix, grid

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, self.prefix :]
        height, width = self.grid or (math.isqrt(patches.shape[1]),) * 2
        if height * width != patches.shape[1]:
            raise ValueError(f"{patches.shape[1]} patches are no {height} x {width} grid; say which with attach(grid=(h, w)).")
        pooled = self.pooling(patches.mT.unflatten(-1, (height, width))).flatten(2).mT
        return self.norm(torch.cat([x[:, : self.prefix], pooled], 1))


def attach(
    model: nn.Module, branches: int = 4, blocks: Sequence[int] | None = None, grid: tuple[int, int] | None = None
) -> nn.Module:
    """Put token-aware pooling in front of the attention of an encoder's blocks (all, or those numbered), in place; returns the
    model. `grid` (rows, columns of patches) where pictures are not square. Raises `Unsupported` where blocks take no lists of
    tokens with a batch axis."""
    view = adapt(model)
    if not isinstance(view, Encoder) or view.packed or view.maps:
        raise Unsupported(f"token-aware pooling needs an encoder with a grid of patches, which {type(model).__name__} is not.")
    for number in range(len(view.blocks)) if blocks is None else blocks:
        block = view.blocks[number]
        norm = view.parts(block).norm1
        name = next(name for name, part in block.named_children() if part is norm)
        pooling = TokenAwarePooling(view.dims[0], branches).to(next(block.parameters()))
        setattr(block, name, PooledNorm(norm, pooling, view.prefix, grid))  # type: ignore[arg-type]
    return model


def diversity(attentions: Sequence[Tensor]) -> Tensor:
    """ADL: the mean over layers of how alike the rows of each attention map (B, H, N, N) are, 0 to 1.

    The paper speaks of the similarity of pairs of rows; the released code, and this, of each row and the mean row, which costs
    O(N^2) in place of O(N^3). It is 0 and flat where nothing exceeds 2 / N."""
    return torch.stack([likeness(attention) for attention in attentions]).mean()


@register(
    title="Robustifying Token Attention for Vision Transformers",
    year=2023,
    source="arXiv:2303.11126",
    family="vit",
    stage="training",
    headline="FAN-B-hybrid: mCE 2.4 points lower on ImageNet-C and accuracy 0.4 higher on ImageNet",
    training_free=False,
)
class RobustTokenAttention:
    """Trains a classifier whose attention neither hangs on single tokens nor looks alike everywhere.

    Two halves. `attach` puts token-aware pooling (TAP) in front of every block's attention: each position mixes itself and the
    means of its 3 x 3 neighbourhoods at distances 1 to 3. This object is the loss: L = CE + weight * ADL (see `diversity`). Both
    are trained with the model.

        model = attach(model)
        train(model, data, RobustTokenAttention(), recipe)

    A batch is (pixel_values, labels) or a mapping with these names. Attention maps exist only under eager attention: load the
    model with attn_implementation="eager", otherwise a ValueError says so.
    """

    def __init__(self, weight: float = 1.0, entropy: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.weight, self.entropy = weight, entropy or F.cross_entropy

    def __call__(self, model: Any, batch: Any) -> dict[str, Tensor]:
        pixels, labels = (batch["pixel_values"], batch["labels"]) if isinstance(batch, dict) else batch
        out = model(pixel_values=pixels, output_attentions=True)
        if not out.attentions:
            raise ValueError(
                'the model returned no attention maps; load it with attn_implementation="eager", or call '
                'model.set_attn_implementation("eager").'
            )
        return {"entropy": self.entropy(out.logits, labels), "diversity": self.weight * diversity(out.attentions)}
