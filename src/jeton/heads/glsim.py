"""GLSim's classifier: look at the picture, cut it to what is most like its class token, and look again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..method import Unsupported
from ..models import Encoder, adapt
from ..ops import boxes
from ..ops.similarity import to_first


class GLSimClassifier(nn.Module):
    """Global-Local Similarity (arXiv:2407.12891): two views of one picture through one encoder, refined together.

    Of the patches (B, N, D) that the encoder hands out behind its last norm, the `top` most like the class token span a box; the
    picture is cut to it, enlarged to its old size and encoded by the same weights. The two class tokens (B, 2, D) pass `layers`
    pre-norm transformer layers of D / 64 heads and a norm; the first is classified. The box has no gradient, the crop has.

    encoder: any that `jeton` knows with a class token and a grid (ViT, DINOv2, CLIP). metric: "cosine", "l1" or "l2". The box
    ends where its last row and column of patches begin, as in the released code, unless `inclusive`. The paper leaves the number
    of aggregator layers to a configuration that is not published; 1 here. Raises `Unsupported` without a class token.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_labels: int,
        *,
        top: int = 8,
        layers: int = 1,
        metric: str = "cosine",
        inclusive: bool = False,
        smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        view = adapt(encoder)
        if not isinstance(view, Encoder) or not view.has_class or view.packed:
            raise Unsupported(
                f"glsim compares patches with a class token, which {type(encoder).__name__} does not have; use a ViT, DINOv2 or "
                f"CLIP encoder."
            )
        width = view.dims[0]
        heads = max(1, width // 64)
        self.encoder = encoder
        self.top, self.metric, self.inclusive, self.smoothing = top, metric, inclusive, smoothing
        self._prefix, self._patch, self._grid = view.prefix, view.patch_size, view.grid
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.aggregator = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, num_labels)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """logits (B, C) and, with labels (B,), the cross entropy with label smoothing."""
        tokens = self.tokens(pixel_values)
        crops = boxes.cut(pixel_values, self.boxes(pixel_values, tokens))
        views = torch.stack([tokens[:, 0], self.tokens(crops)[:, 0]], 1)
        logits = self.head(self.aggregator(views)[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """(B, prefix + N, D) what the encoder hands out, behind its last norm."""
        hidden: Tensor = self.encoder(pixel_values=pixel_values)[0]
        inner = getattr(self.encoder, "vision_model", self.encoder)
        norm = getattr(inner, "post_layernorm", None)  # CLIP's norms the class token alone
        return hidden if norm is None else norm(hidden)

    @torch.no_grad()
    def boxes(self, pixel_values: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(B, 4) where each picture is cut: x0, y0, x1, y1 in pixels."""
        tokens = self.tokens(pixel_values) if tokens is None else tokens
        likeness = to_first(tokens, self.metric)[:, self._prefix :]
        best = likeness.sort(dim=1, descending=True, stable=True).indices[:, : self.top]
        height, width = pixel_values.shape[-2:]
        return boxes.around_patches(best, self._grid(pixel_values)[1], self._patch, (height, width), self.inclusive)
