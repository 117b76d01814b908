"""MLlama: no visual tokens in the sequence, so methods are refused, before anything runs and with what would do."""

from __future__ import annotations

import pytest
import transformers
from torch import nn

import jeton
import tiny
from jeton.engine import apply, watch

SIDE = 4 * tiny.PATCH


def mllama() -> nn.Module:
    text = {**tiny._text(), "cross_attention_layers": [1, 3], "pad_token_id": tiny.PAD, "max_position_embeddings": 256}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    seen = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": SIDE,
        "patch_size": tiny.PATCH,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
    }
    config = transformers.MllamaConfig(vision_config=seen, text_config=text, image_token_index=tiny.IMAGE)
    return tiny.ready(transformers.MllamaForConditionalGeneration(config))


@pytest.mark.parametrize("part", ["whole", "model", "vision_model"])
@pytest.mark.parametrize("method", ["divprune", "fastv", "tome", "fastervlm"])
def test_methods_are_refused_with_the_reason_and_what_would_do(part: str, method: str) -> None:
    net = mllama()
    asked = {"whole": net, "model": net.model, "vision_model": net.model.vision_model}[part]
    with pytest.raises(jeton.Unsupported, match=r"Mllama\w+ keeps.*cross-attention.*Gemma 3.*max_image_tiles"):
        apply(asked, method).remove()
    with pytest.raises(jeton.Unsupported, match="cross-attention"):
        watch(asked).remove()
