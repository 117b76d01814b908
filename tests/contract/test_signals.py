"""Signals rebuilt on the side equal what the model itself computes, with fast attention left on."""

from __future__ import annotations

import pytest
import torch
from cases import ATTENTIONS, LANGUAGE, LLAVA, LLAVA_NEXT, QWEN, view
from torch import Tensor
from witness import Listening

import tiny
from jeton.engine import apply
from jeton.needs import ClassAttention, Keys, LastAttention, Need, ReceivedAttention

WITH_CLASS = ["CLIPVisionModel", "ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel"]
WITH_CLASS += ["DINOv3ViTModel", "ViTMAEModel", "ViTMSNModel", "BeitModel"]
WITHOUT = ["SiglipVisionModel", "Aimv2VisionModel", "IJepaModel", "VideoMAEModel"]
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def heard(name: str, attention: str, site: str, asked: dict[str, Need]) -> dict[str, Tensor]:
    net, listener = tiny.model(name, attention), Listening(site, asked)
    with apply(net, listener):
        tiny.run(net, tiny.inputs_for(net))
    return listener.heard


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("layer", [0, 3, -1])
@pytest.mark.parametrize("name", WITH_CLASS + WITHOUT)
def test_encoder_attention_equals_the_models_own_map(name: str, layer: int, attention: str) -> None:
    eager = tiny.model(name, "eager")
    inputs = tiny.inputs_for(eager)
    whole = eager(**inputs, output_attentions=True).attentions[layer]
    prefix = view(name).prefix
    asked: dict[str, Need] = {"received": ReceivedAttention(layer=layer)}
    if name in WITH_CLASS:
        asked["class"] = ClassAttention(layer=layer)
    signals = heard(name, attention, "encoder", asked)
    assert torch.allclose(signals["received"], whole.mean((1, 2))[:, prefix:], **CLOSE)
    if name in WITH_CLASS:
        assert torch.allclose(signals["class"], whole[:, :, 0, prefix:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", [LLAVA, LLAVA_NEXT])
def test_a_language_model_reads_the_block_that_makes_its_features(name: str, attention: str) -> None:
    """vision_feature_layer is -2: layer -1 of a method is the last block in use, not the last of the encoder."""
    net = tiny.model(name, "eager")
    inputs = tiny.inputs_for(net)
    pixels = inputs["pixel_values"]
    if pixels.dim() == 5:
        crops = [int((picture.abs().flatten(1).sum(1) > 0).sum()) for picture in pixels]
        pixels = torch.cat([picture[:count] for picture, count in zip(pixels, crops, strict=True)])
    maps = net.model.vision_tower(pixel_values=pixels, output_attentions=True).attentions
    signals = heard(name, attention, "encoder", {"class": ClassAttention(layer=-1)})["class"]
    own = maps[-2][:, :, 0, 1:]
    if name == LLAVA:
        assert torch.allclose(signals, own, **CLOSE)
        return
    first = signals[0, :, :36]  # the thumbnail of the first image comes first
    assert torch.allclose(first, own[0], **CLOSE)
    assert not torch.allclose(first, maps[-1][0, :, 0, 1:], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("name", LANGUAGE)
def test_attention_of_the_last_token_equals_the_models_own_row(name: str, layer: int, attention: str) -> None:
    net = tiny.model(name, "eager")
    inputs = tiny.inputs_for(net)
    whole = net(**inputs, output_attentions=True).attentions[layer - 1]
    listener = Listening("layer", {"last": LastAttention()})
    listener.steps = lambda n, depth: [listener if at == layer else None for at in range(depth)]  # type: ignore[method-assign]
    other = tiny.model(name, attention)
    with apply(other, listener) as run:
        tiny.run(other, inputs)
        layout = run.layout
    rows = listener.heard["last"]
    for image, sample in enumerate(layout.sample):
        geometry = layout.album.geometry[image]
        at = layout.position[image, : len(geometry)][geometry.unit >= 0]
        assert torch.allclose(rows[image, :, : len(at)], whole[sample, :, -1, at], atol=1e-6, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_scores_on_patches_become_scores_on_merged_tokens(attention: str) -> None:
    """Qwen2.5-VL: a token is the mean of its 2 x 2 patches, in spite of the windows the tower works in."""
    net = tiny.model(QWEN, "eager")
    inputs = tiny.prompts(net, tiny.one_image(net))
    records: list[Tensor] = []
    block = net.model.visual.blocks[-1].attn

    def watch(module, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"]
        q, k, _ = module.qkv(states).reshape(states.shape[0], 3, module.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        q, k = apply_rotary_pos_emb_vision(q, k, *kwargs["position_embeddings"])
        records.append(((q.transpose(0, 1) @ k.transpose(0, 1).mT) * module.scaling).softmax(-1).mean((0, 1)))

    handle = block.register_forward_hook(watch, with_kwargs=True)
    tiny.run(net, inputs)
    handle.remove()
    order = _window_order(net, inputs["image_grid_thw"])
    merged = records[0].unflatten(0, (-1, 4)).mean(1)[torch.argsort(order)]
    listener = Listening("encoder", {"received": ReceivedAttention(layer=-1)})
    other = tiny.model(QWEN, attention)
    with apply(other, listener):
        tiny.run(other, inputs)
    assert torch.allclose(listener.heard["received"][0], merged, **CLOSE)
    assert not torch.allclose(merged, records[0].unflatten(0, (-1, 4)).mean(1), atol=1e-4)


def _window_order(net: torch.nn.Module, grid: Tensor) -> Tensor:
    """The order in which the tower lists the merged tokens: windows of 2 x 2 tokens, row by row."""
    _, h, w = (grid[0] // torch.tensor([1, 2, 2])).tolist()
    index = torch.arange(h * w).reshape(h, w)
    return torch.cat([index[i : i + 2, j : j + 2].flatten() for i in range(0, h, 2) for j in range(0, w, 2)])


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_keys_are_averaged_over_heads(attention: str) -> None:
    net = tiny.model("ViTModel")
    inputs = tiny.inputs_for(net)
    states = net(**inputs, output_hidden_states=True).hidden_states[3]
    block = view_blocks(net)[3]
    parts = dict(block.attention.named_modules())
    key = next(module for name, module in parts.items() if name.endswith(("key", "k_proj")))
    keys = key(block.layernorm_before(states)).unflatten(-1, (4, 8)).mean(2)[:, 1:]
    assert torch.allclose(heard("ViTModel", attention, "encoder", {"keys": Keys(layer=3)})["keys"], keys, **CLOSE)


def view_blocks(net: torch.nn.Module) -> list:
    from jeton.models import adapt

    return adapt(net).blocks


@pytest.mark.parametrize("layer", [5, -6])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    net = tiny.model("ViTModel")
    with pytest.raises(ValueError, match="use 0 to 4, or -1 to -5"):
        apply(net, Listening("encoder", {"class": ClassAttention(layer=layer)})).remove()
