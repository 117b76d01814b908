"""Masks that count columns: windows that slide and blocks that see each other, where columns have left."""

from __future__ import annotations

from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from cases import AYA, GEMMA3, LLAVA, PALIGEMMA, PALIGEMMA2
from references import CLOSE, TIGHT, difference, generated, masked_from, sights, view_of, visual
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer
from witness import Listening, Seen, watching

import jeton
import tiny
import tiny_aya
import tiny_gemmas
from jeton.engine import apply, watch
from jeton.engine.masks import Whole, held, hidden, looking_back, made, taken
from jeton.method import get
from jeton.needs import LastAttention

WINDOWED = [PALIGEMMA2, GEMMA3, AYA]


@lru_cache
def narrow(name: str, attention: str = "sdpa") -> torch.nn.Module:
    """The tiny model with windows of 24 columns, shorter than an image."""
    builders = {
        PALIGEMMA: tiny_gemmas.tiny_paligemma,
        PALIGEMMA2: partial(tiny_gemmas.tiny_paligemma, second=True, window=24),
        GEMMA3: partial(tiny_gemmas.tiny_gemma3, window=24),
        AYA: partial(tiny_aya.tiny_aya_vision, window=24),
    }
    net = builders[name]()
    if attention == "eager":
        net.set_attn_implementation("eager")
    return net


def window(length: int, size: int) -> Tensor:
    at = torch.arange(length)
    return ((at <= at[:, None]) & (at > at[:, None] - size))[None, None]


def test_rows_and_columns_are_taken_and_padding_is_hidden():
    """Columns 0, 3, 4 and 1, 2, 5 are left of six, under a window of three; in the second row 1 is padding."""
    columns = torch.tensor([[0, 3, 4], [1, 2, 5]])
    real = torch.tensor([[True, True, True], [False, True, True]])
    first, second = taken(window(6, 3), columns, columns, real, 6)[:, 0].long().tolist()
    assert first == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]  # 3 no longer sees 0, and 4 does not see it either
    assert second == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    both = taken({"a": window(6, 3), "b": None}, columns, columns, None, 6)
    assert both["a"].shape == (2, 1, 3, 3) and both["b"] is None
    # where a kernel would look back by itself, padding needs a mask
    assert taken(None, columns, columns, real, 6)[1, 0].long().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_the_last_rows_look_back_at_all_columns():
    assert looking_back(2, torch.zeros(1, 5))[0, 0].long().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_a_layer_hands_out_its_window_though_it_may_hold_more_for_a_while():
    layer = DynamicSlidingWindowLayer(sliding_window=4)
    assert held(SimpleNamespace(layers=[layer]), 0) == 0
    layer.keys = torch.zeros(1, 1, 10, 2)  # as when it records for assisted decoding
    assert held(SimpleNamespace(layers=[layer]), 0) == 3


def test_a_row_of_padding_sees_itself_only():
    real = torch.tensor([[False, True]])
    additive = torch.zeros(1, 1, 2, 2).masked_fill(~window(2, 2), -torch.inf)
    assert hidden(window(2, 2), real)[0, 0].tolist() == [[True, False], [False, True]]
    assert (hidden(additive, real)[0, 0] == 0).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("name", [GEMMA3, AYA])
def test_masks_are_made_for_the_whole_conversation(name: str):
    """Behind 30 columns, whatever the caches hold of them: a window of 24 still begins 23 columns ahead."""
    view = view_of(narrow(name))
    masks: Any = made(view.decoder, torch.zeros(1, 3, 64), torch.ones(1, 33), past=30)
    assert torch.equal(masks["sliding_attention"], window(33, 24)[:, :, 30:])
    assert torch.equal(masks["full_attention"], window(33, 99)[:, :, 30:])
    cache = DynamicCache(config=view.decoder.config)
    whole = Whole(cache, 30)
    assert whole.get_mask_sizes(3, 0) == (33, 0) and whole.get_query_offset(1) == whole.get_seq_length() == 30
    assert whole.is_initialized == cache.is_initialized


@torch.no_grad()
@pytest.mark.parametrize("name", [GEMMA3, AYA])
@pytest.mark.parametrize("spec", ["uniform(keep=0.3)", "fastv(keep=0.3, layer=1)"])
def test_a_window_reaches_as_far_as_it_did(name: str, spec: str):
    """Masking what left is the same; a window that counts the columns that are left is not."""
    net = narrow(name)
    inputs = tiny.prompts(net, tiny.samples(net)[1:2])
    inputs["position_ids"] = ids = tiny.positions(net, inputs)
    with apply(net, spec), watching(net) as seen:
        logits = tiny.run(net, inputs)[:, -1]
    short = seen.layers[-1]["hidden"].shape[1]
    assert 24 < short < ids.shape[1]
    start = next(number for number, layer in enumerate(seen.layers) if layer["hidden"].shape[1] == short)
    at = torch.isin(ids, seen.layers[start]["ids"])
    left = [mask[:, :, at[0]][..., at[0]] for mask in sights(net, inputs, ~at)]
    counted = [window(short, 24 if kind == "sliding_attention" else short) for kind in _kinds(net)]
    assert difference(_behind(net, seen, start, left), logits) < TIGHT
    assert difference(_behind(net, seen, start, counted), logits) > 100 * TIGHT


def _behind(net: torch.nn.Module, seen: Seen, start: int, masks: list[Tensor]) -> Tensor:
    """The last logits when the layers from `start` on run on what came to them under these masks."""
    x, layers = seen.layers[start]["hidden"], view_of(net).layers
    for layer, mask, given in zip(layers[start:], masks[start:], seen.layers[start:], strict=True):
        x = layer(x, attention_mask=mask, position_embeddings=given["rotary"], past_key_values=None)
    return net.lm_head(view_of(net).decoder.norm(x))[:, -1]


def _kinds(net: torch.nn.Module) -> list[str]:
    return view_of(net).decoder.config.layer_types


def sliding_llava() -> torch.nn.Module:
    """Mistral, all of whose layers slide, and which makes one mask for all of them."""
    text = transformers.MistralConfig(**tiny._text(), max_position_embeddings=1024, sliding_window=24)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tiny.vision()),
        text_config=text,
        image_token_id=tiny.IMAGE,
        image_seq_length=tiny.SIDE**2,
    )
    return tiny.ready(transformers.LlavaForConditionalGeneration(config))


@torch.no_grad()
@pytest.mark.parametrize("spec", ["divprune(keep=0.5)", "fastv(keep=0.5, layer=2)"])
def test_a_language_model_that_slides_in_every_layer(spec: str):
    """Padded prompts, decoded on caches of windows; what is masked instead is the same."""
    net = sliding_llava()
    inputs = tiny.inputs_for(net)
    with apply(net, spec) as run:
        output = generated(net, inputs)
        assert {layer.keys.shape[2] for layer in output.past_key_values.layers} == {23}
        left = [run.assignment(image) for image in range(run.layout.images)]
    new = output.sequences[:, -16:]
    longer = tiny.extended(inputs, new[:, :-1])
    longer["position_ids"] = tiny.positions(net, longer)
    gone = torch.zeros_like(longer["input_ids"], dtype=torch.bool)
    gone[visual(net, longer)] = torch.cat([one.flatten() != torch.arange(49) for image in left for one in image])
    layer = 2 if "fastv" in spec else 0
    with masked_from(net, layer, sights(net, longer, gone)):
        right = tiny.run(net, longer, use_cache=False)[:, -16:]
    assert difference(torch.stack(output.logits, 1), right) < CLOSE and torch.equal(right.argmax(-1), new)


@torch.no_grad()
@pytest.mark.parametrize("name", WINDOWED)
def test_caches_of_layers_with_windows_hold_no_more_than_theirs(name: str):
    net = narrow(name)
    inputs = tiny.prompts(net, tiny.samples(net)[1:2])
    with apply(net, "fastv(keep=0.9, layer=2)"):
        cache = generated(net, inputs, max_new_tokens=4).past_key_values
    for kind, layer in zip(_kinds(net), cache.layers, strict=True):
        assert (layer.keys.shape[2] == 23) == (kind == "sliding_attention")


@pytest.mark.parametrize("name", [PALIGEMMA, *WINDOWED])
def test_flash_attention_is_refused_where_it_would_count_what_is_left(name: str, monkeypatch: pytest.MonkeyPatch):
    net = narrow(name)
    monkeypatch.setattr(net.model.language_model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(jeton.Unsupported, match=r'attn_implementation="(eager|sdpa)"'):
        apply(net, "random", keep=0.3).remove()
    watch(net).remove()


@pytest.mark.parametrize("name", [PALIGEMMA, *WINDOWED])
def test_virtual_unmerging_is_refused_where_layers_do_not_simply_look_back(name: str):
    method = get("fastv", keep=0.3)
    object.__setattr__(method, "virtual", True)
    with pytest.raises(jeton.Unsupported, match=r"windows or blocks.*unmerge=False"):
        apply(narrow(name), method).remove()
    apply(tiny.model(LLAVA), method).remove()


@torch.no_grad()
@pytest.mark.parametrize("name", [PALIGEMMA, *WINDOWED])
@pytest.mark.parametrize("layer", [1, 2])
def test_attention_ahead_of_a_layer_equals_its_own_row(name: str, layer: int):
    """With windows, without RoPE, with bent logits."""
    net = narrow(name, "eager")
    inputs = tiny.inputs_for(net)
    whole = net(**inputs, output_attentions=True).attentions[layer]
    listener = Listening("layer", {"last": LastAttention(ahead=True)})
    listener.steps = lambda n, depth: [listener if at == layer else None for at in range(depth)]  # type: ignore[method-assign]
    with apply(net, listener) as run:
        tiny.run(net, inputs)
        layout = run.layout
    for image, sample in enumerate(layout.sample):
        at = layout.position[image, : len(layout.album.geometry[image])]
        own = listener.heard["last"][image, :, : len(at)]
        assert torch.allclose(own, whole[sample, :, -1, at], atol=1e-6, rtol=1e-4)
