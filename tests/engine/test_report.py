"""What the report says, on the embedded model."""

import pytest
import torch

import jeton
from jeton.demo import prompt
from jeton.engine import watch


@pytest.fixture(scope="module")
def demo():
    return jeton.load_demo()


def asked(demo, examples):
    texts = [prompt(example.question) for example in examples]
    return demo.processor(images=[e.image for e in examples], text=texts, return_tensors="pt", padding=True)


@torch.no_grad()
def test_counts_flops_and_stages_of_a_reduced_prefill(demo):
    inputs = asked(demo, demo.examples[:2])
    with watch(demo.model) as run:
        demo.model(**inputs)
        full = run.report()
    with jeton.apply(demo.model, "tome(keep=72) | fastv(keep=20)") as run:
        demo.model(**inputs)
        report = run.report()
    assert full.flops == full.flops_full and not full.applied
    assert [(image.before, image.after) for image in report.images] == [(144, 20)] * 2
    assert report.encoder_tokens[0] == 145 and report.encoder_tokens[-1] == 73
    assert report.layer_tokens[1] - report.layer_tokens[2] == 72 - 20
    assert 0 < report.flops < full.flops == pytest.approx(report.flops_full)
    assert {"encoder", "selection", "prefill", "first_token"} <= set(report.seconds)
    assert "tome(keep=72) | fastv(keep=20)" in str(report)


@torch.no_grad()
def test_an_image_with_no_more_tokens_than_asked_for_is_kept_whole_and_named():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config={**text, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**vision, "fullatt_block_indexes": [1]},
        image_token_id=97,
        video_token_id=96,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    ids = torch.tensor([[1] + [97] * 4 + [2] + [97] * 12 + [3]])
    grids = torch.tensor([[1, 4, 4], [1, 6, 8]])
    pixels = torch.randn(int(grids.prod(1).sum()), 1176)
    with jeton.apply(model, "divprune", keep=6) as run:
        model(input_ids=ids, pixel_values=pixels, image_grid_thw=grids, mm_token_type_ids=(ids == 97).int())
        report = run.report()
    assert [(image.before, image.after) for image in report.images] == [(4, 4), (12, 6)]
    assert "images [0]" in report.note
