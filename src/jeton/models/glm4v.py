"""GLM-4.1V: a packed tower whose patches are merged by a convolution, sandwich norms and a fused gated MLP in its language model.

Videos stand in the prompt as image tokens, one run for each frame; a batch has either images or videos.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Gated, Inputs, Parts
from .qwen2_vl import Qwen2VL, QwenTower
from .registry import adapter


@adapter("Glm4vVisionModel")
class Glm4vTower(QwenTower):
    gated_mlp = True

    def shortened(self, inputs: Inputs, kept: Tensor) -> dict:
        """Position embeddings are sampled sequence by sequence, by the grid of each: those that lose all patches lose it too."""
        grid = inputs["grid_thw"]
        ends = torch.searchsorted(kept, grid.prod(1).cumsum(0))
        return {**super().shortened(inputs, kept), "grid_thw": grid[ends.diff(prepend=ends.new_zeros(1)) > 0]}

    @property
    def mlp_width(self) -> int:
        return self.model.config.out_hidden_size


@adapter("Glm4vForConditionalGeneration", "Glm4vModel")
class Glm4v(Qwen2VL):
    tower = Glm4vTower

    def visual(self, input_ids: Tensor, stream: str) -> Tensor:
        return input_ids == self.model.config.image_token_id

    def parts(self, layer: nn.Module) -> Parts:
        return Parts(
            layer.input_layernorm,
            layer.self_attn,
            layer.post_attention_layernorm,
            layer.mlp,
            scale1=layer.post_self_attn_layernorm,
            scale2=layer.post_mlp_layernorm,
        )

    def gated(self, layer: nn.Module) -> Gated:
        both = layer.mlp.gate_up_proj
        gate, up = (both, both) if type(both) is not nn.Linear else (_half(both, 0), _half(both, 1))
        return Gated(gate, up, layer.mlp.down_proj, layer.mlp.activation_fn)


def _half(both: nn.Linear, number: int) -> nn.Linear:
    """One half of a projection's outputs as a projection on the same memory."""
    half = nn.Linear(both.in_features, both.out_features // 2, bias=False, device="meta")
    half.weight = nn.Parameter(both.weight.detach().chunk(2)[number], requires_grad=False)
    return half
