"""PH-Reg: register tokens for an encoder that was trained without, by distilling it from itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, PreTrainedModel

from ..method import Unsupported
from ..models import Encoder, adapt
from ..models.clip import RegisteredEmbeddings
from ..ops.selection import farthest
from ..registry import register

WHITE = (2.249, 2.429, 2.64)  # what lies outside the picture, under ImageNet's normalisation


@dataclass(frozen=True)
class Views:
    """Shifted and mirrored views of B pictures: offset (B, V, 2) rows and columns in patches, flip (B, V). View 0 is the picture
    itself."""

    offset: Tensor
    flip: Tensor

    @classmethod
    def draw(
        cls, batch: int, side: tuple[int, int], views: int = 10, reach: float = 0.15, generator: torch.Generator | None = None
    ) -> Views:
        """Per picture: of 10 V offsets within `reach` times the side (rows, columns of patches), the V that farthest-point
        sampling spreads most, the first replaced by none; half of the others mirrored."""
        most = torch.tensor([round(reach * length) for length in side])
        drawn = torch.rand(batch, 10 * views, 2, generator=generator)
        candidates = (drawn * (2 * most + 1)).floor().long() - most
        chosen = farthest(candidates.float(), views)
        offset = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        flip = torch.rand(batch, views, generator=generator) < 0.5
        offset[:, 0], flip[:, 0] = 0, False
        return cls(offset, flip)

    def __len__(self) -> int:
        return self.offset.shape[1]

    def shift(self, x: Tensor, view: int, scale: int, fill: Tensor | float) -> Tensor:
        """View number `view` of x (B, C, H, W): out[y, x] = in[y + dy, x + dx] by the offset times `scale`, then mirrored;
        `fill`, a number or one for each channel (C,), where that lies outside."""
        height, width = x.shape[-2:]
        step = (self.offset[:, view] * scale).to(x.device)
        rows = torch.arange(height, device=x.device) + step[:, :1]
        columns = torch.arange(width, device=x.device).expand(len(x), -1)
        columns = torch.where(self.flip[:, view, None].to(x.device), width - 1 - columns, columns) + step[:, 1:]
        inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
        at = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
        moved = x.flatten(2).gather(2, at.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)
        outside = torch.as_tensor(fill, dtype=x.dtype, device=x.device).reshape(1, -1, 1, 1)
        return torch.where(inside, moved, outside)


@torch.no_grad()
def denoised(
    encode: Callable[[Tensor], Tensor], pixel_values: Tensor, views: Views, patch: int, fill: Tensor | float = 0.0
) -> Tensor:
    """(B, N, D) features of each patch, averaged over the views in which it is seen; at least the picture itself shows it.

    `encode` gives the features (B, N, D) of the patches of pictures (B, C, H, W)."""
    batch, _, height, width = pixel_values.shape
    rows, columns = height // patch, width // patch
    grid = torch.arange(rows * columns, device=pixel_values.device).view(1, 1, rows, columns).expand(batch, -1, -1, -1)
    total: Tensor | None = None
    count = torch.zeros(batch, rows * columns + 1, device=pixel_values.device)
    for view in range(len(views)):
        features = encode(views.shift(pixel_values, view, patch, fill)).float()
        where = views.shift(grid, view, 1, -1).flatten(1)
        where = torch.where(where < 0, rows * columns, where)  # what shows no patch of the picture goes to a spare row
        total = features.new_zeros(batch, rows * columns + 1, features.shape[-1]) if total is None else total
        total.scatter_add_(1, where[..., None].expand_as(features), features)
        count.scatter_add_(1, where, torch.ones_like(where, dtype=count.dtype))
    assert total is not None
    return total[:, :-1] / count[:, :-1, None]


def student(teacher: PreTrainedModel, registers: int = 16, generator: torch.Generator | None = None) -> PreTrainedModel:
    """The teacher's weights in a model with register tokens drawn from N(0, 1 / D), of which only these, the position table, the
    patch embedding and the last block are trained.

    A `ViTModel` or `Dinov2Model` becomes a `Dinov2WithRegistersModel`, which transformers loads and jeton knows; a
    `CLIPVisionModel` stays one, with registers put behind its class token. The paper puts registers in front of it, which is the
    same function: positions are added before. Raises `Unsupported` for other encoders.
    """
    view = adapt(teacher)
    kind = type(view.model).__name__
    if not isinstance(view, Encoder) or kind not in ("ViTModel", "Dinov2Model", "CLIPVisionModel"):
        raise Unsupported(f"ph-reg takes a ViTModel, a Dinov2Model or a CLIPVisionModel, not {type(teacher).__name__}.")
    drawn = torch.randn(1, registers, view.dims[0], generator=generator) / view.dims[0] ** 0.5
    made = _clip(view, drawn) if kind == "CLIPVisionModel" else _dinov2(view, drawn)
    made = made.to(device=teacher.device, dtype=teacher.dtype)
    made.requires_grad_(False)
    seen = adapt(made)
    assert isinstance(seen, Encoder)
    for name, value in made.named_parameters():
        value.requires_grad_("patch_embedding" in name or "position_embedding" in name or "register_tokens" in name)
    seen.blocks[-1].requires_grad_(True)
    return made.train(teacher.training)


def _dinov2(view: Encoder, drawn: Tensor) -> PreTrainedModel:
    teacher, config = view.model, view.model.config
    if view.dims[1] % view.dims[0]:
        raise Unsupported(
            f"ph-reg puts the weights of a {type(teacher).__name__} into a Dinov2WithRegistersModel, whose MLP is a whole "
            f"multiple of the width; {view.dims[1]} is none of {view.dims[0]}."
        )
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    fields |= {"num_register_tokens": drawn.shape[1], "mlp_ratio": view.dims[1] // view.dims[0]}
    made = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**fields))
    made.set_attn_implementation(config._attn_implementation)
    for new, old in zip(made.encoder.layer, view.blocks, strict=True):
        parts, own = adapt(made).parts(new), view.parts(old)  # type: ignore[union-attr]
        for name in ("norm1", "attention", "norm2", "mlp"):
            getattr(parts, name).load_state_dict(getattr(own, name).state_dict())
        for name in ("scale1", "scale2"):
            scale = getattr(own, name)
            if isinstance(scale, nn.Module):
                getattr(parts, name).load_state_dict(scale.state_dict())
            else:
                getattr(parts, name).lambda1.data.fill_(1.0)
    made.layernorm.load_state_dict(teacher.layernorm.state_dict())  # type: ignore[operator, union-attr]
    made.embeddings.load_state_dict(teacher.embeddings.state_dict(), strict=False)  # type: ignore[operator, union-attr]
    made.embeddings.register_tokens.data.copy_(drawn)
    return made


def _clip(view: Encoder, drawn: Tensor) -> PreTrainedModel:
    teacher: Any = view.model
    made = type(teacher)(teacher.config.__class__(**teacher.config.to_dict()))
    made.load_state_dict(teacher.state_dict())
    made.set_attn_implementation(teacher.config._attn_implementation)
    inner = getattr(made, "vision_model", made)
    inner.embeddings = RegisteredEmbeddings(inner.embeddings, drawn)
    for part in (made, inner):
        part.config.num_register_tokens = drawn.shape[1]
    return made


@register(
    title="Vision Transformers with Self-Distilled Registers",
    year=2025,
    source="arXiv:2505.21501",
    family="vit",
    stage="training",
    headline="fewer artifact tokens, and better zero-shot open-vocabulary segmentation, without labels",
    training_free=False,
)
class PHReg:
    """Gives a trained encoder register tokens, so that artifacts have somewhere else to go: a loss for `jeton.train`.

    The teacher is the encoder as it was, frozen. Its patch features are averaged over V views, shifted by whole patches and
    mirrored at random (`denoised`): what belongs to a place in the picture stays, what belongs to a place in the input averages
    out. The `student` learns to give these features in one pass: L = 1 - mean cos(target, student) + weight * MSE over patches.

        model = student(teacher)
        train(model, pictures, PHReg(teacher), recipe)

    A batch is pixel values (B, C, H, W), or a mapping or a pair that begins with them. `fill` is what lies outside a picture, one
    value for each channel; the default is white under ImageNet's normalisation. The paper: 16 registers, 10 views, AdamW at 1e-4
    decaying to 5e-6, weight decay 0.01, batch 8, 100 epochs.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        views: int = 10,
        reach: float = 0.15,
        weight: float = 1.0,
        fill: tuple[float, ...] = WHITE,
        seed: int = 0,
    ) -> None:
        view = adapt(teacher)
        assert isinstance(view, Encoder)
        self.teacher = teacher.eval().requires_grad_(False)
        self.prefix, self.patch, self.grid = view.prefix, view.patch_size, view.grid
        self.views, self.reach, self.weight, self.fill = views, reach, weight, fill
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: Any, batch: Any) -> dict[str, Tensor]:
        pixels = batch["pixel_values"] if isinstance(batch, dict) else batch if isinstance(batch, Tensor) else batch[0]
        target = self.target(pixels)
        found = model(pixel_values=pixels)[0][:, -target.shape[1] :].float()
        cosine = F.cosine_similarity(target, found, dim=-1).mean()
        return {"cosine": 1 - cosine, "mse": self.weight * F.mse_loss(found, target)}

    def target(self, pixels: Tensor) -> Tensor:
        """(B, N, D) the teacher's features, denoised over freshly drawn views."""
        views = Views.draw(len(pixels), self.grid(pixels), self.views, self.reach, self.generator)
        fill = pixels.new_tensor(self.fill[: pixels.shape[1]])
        return denoised(lambda seen: self.teacher(pixel_values=seen)[0][:, self.prefix :], pixels, views, self.patch, fill)
