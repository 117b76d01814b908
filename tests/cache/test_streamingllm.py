"""StreamingLLM: what the cache keeps, at which positions, and what the logits are."""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

import jeton
import tiny
from jeton.cache.streamingllm import StreamingLLM
from jeton.train import Recipe, train

V = 30


def llama(layers=2, **more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=64, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def neox():
    torch.manual_seed(0)
    shape = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.3}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, num_hidden_layers=1, max_position_embeddings=64)).eval()


def mpt():
    torch.manual_seed(0)
    return MptForCausalLM(
        MptConfig(vocab_size=V, d_model=32, n_heads=4, n_layers=1, max_seq_len=64, initializer_range=0.3)
    ).eval()


def stepwise(model, ids, how):
    """Logits (B, L, V) of tokens fed one by one, and the cache."""
    with torch.no_grad(), how.on(model) as stream:
        cache = stream.cache()
        return torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])], 1), cache


@pytest.mark.parametrize("make", [llama, neox, mpt])
def test_until_the_cache_is_full_logits_are_those_of_an_ordinary_one(make):
    model, ids = make(), torch.randint(0, V, (2, 12))
    found, _ = stepwise(model, ids, StreamingLLM(start=4, recent=8))
    with torch.no_grad():
        assert torch.allclose(found, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: llama(1), lambda: llama(1, attn_implementation="eager"), neox, mpt])
def test_one_layer_sees_the_kept_tokens_as_if_there_had_been_no_others(make):
    model, ids = make(), torch.randint(0, V, (2, 30))
    found, _ = stepwise(model, ids, StreamingLLM(start=4, recent=4))
    with torch.no_grad():
        for t in (9, 17, 29):
            kept = torch.cat([ids[:, :4], ids[:, t - 3 : t + 1]], 1)
            assert torch.allclose(found[:, t], model(kept).logits[:, -1], atol=1e-5)
            assert not torch.allclose(found[:, t], model(ids[:, : t + 1]).logits[:, -1], atol=1e-3)


def test_the_tenth_token_stands_at_position_seven():
    model, ids = llama(1), torch.randint(0, V, (1, 10))
    seen = []
    handle = model.model.register_forward_hook(lambda m, a, k, o: seen.append(k["position_ids"]), with_kwargs=True)
    stepwise(model, ids, StreamingLLM(start=4, recent=4))
    handle.remove()
    assert [int(position) for position in seen] == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]


def masked_forward(model, ids, start, recent):
    """A whole forward in which the query of every token sees {first start} and {last recent}, at places counted among these."""
    length = ids.shape[1]
    hidden = model.model.embed_tokens(ids)
    scale = model.model.layers[0].self_attn.scaling
    for layer in model.model.layers:
        attn, x = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (proj(x).view(1, length, -1, attn.head_dim).transpose(1, 2) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        rows = []
        for t in range(length):
            kept = sorted({*range(min(start, t + 1)), *range(max(0, t + 1 - recent), t + 1)})
            cos, sin = model.model.rotary_emb(x, torch.arange(len(kept))[None])
            turned = k[:, :, kept] * cos + half(k[:, :, kept]) * sin
            query = q[:, :, t : t + 1] * cos[:, -1:] + half(q[:, :, t : t + 1]) * sin[:, -1:]
            rows.append((query @ turned.transpose(2, 3) * scale).softmax(-1) @ v[:, :, kept])
        mixed = torch.cat(rows, 2).transpose(1, 2).flatten(2)
        hidden = hidden + attn.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


def half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def test_deeper_models_equal_a_mask_of_first_and_last_tokens_and_differ_from_a_fresh_forward():
    model, ids = llama(3), torch.randint(0, V, (1, 24))
    found, _ = stepwise(model, ids, StreamingLLM(start=3, recent=5))
    with torch.no_grad():
        assert torch.allclose(found, masked_forward(model, ids, 3, 5), atol=1e-4)
        kept = torch.cat([ids[:, :3], ids[:, -5:]], 1)
        assert not torch.allclose(found[:, -1], model(kept).logits[:, -1], atol=1e-3)


def test_memory_is_constant_over_ten_thousand_tokens():
    model, ids = llama(1), torch.randint(0, V, (1, 10_000))
    with torch.no_grad(), StreamingLLM(start=4, recent=28).on(model) as stream:
        cache, held = stream.cache(), set()
        for at in range(0, 10_000, 10):
            model(ids[:, at : at + 10], past_key_values=cache)
            held.add(cache.layers[0].keys.shape[2])
    assert max(held) == 32 and cache.get_seq_length() == 10_000


def test_a_new_prompt_makes_room_for_itself_and_a_long_one_is_cut_afterwards():
    model, ids = llama(1), torch.randint(0, V, (1, 60))
    with torch.no_grad(), StreamingLLM(start=4, recent=8).on(model) as stream:
        cache = stream.cache()
        model(ids[:, :40], past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 12
        logits = model(ids[:, 40:46], past_key_values=cache).logits
        kept = torch.cat([ids[:, :4], ids[:, 38:46]], 1)
    with torch.no_grad():
        assert torch.allclose(logits, model(kept).logits[:, -6:], atol=1e-5)


def test_any_range_can_be_let_go_of():
    model, ids = llama(1), torch.randint(0, V, (1, 11))
    with torch.no_grad(), StreamingLLM(start=2, recent=30).on(model) as stream:
        cache = stream.cache()
        model(ids[:, :10], past_key_values=cache)
        cache.layers[0].evict_range(3, 7)
        found = model(ids[:, 10:], past_key_values=cache).logits[:, -1]
    with torch.no_grad():
        kept = torch.cat([ids[:, :3], ids[:, 7:]], 1)
        assert torch.allclose(found, model(kept).logits[:, -1], atol=1e-5)


def test_beams_carry_their_cache_along():
    model, ids = llama(1), torch.randint(0, V, (2, 9))
    with torch.no_grad(), StreamingLLM(start=2, recent=4).on(model) as stream:
        cache = stream.cache()
        model(ids, past_key_values=cache)
        before = [part.clone() for part in (cache.layers[0].keys, cache.layers[0].values)]
        cache.reorder_cache(torch.tensor([1, 1]))
    assert all(torch.equal(now, then[[1, 1]]) for now, then in zip((cache.layers[0].keys, cache.layers[0].values), before))


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_goes_on_for_ever(beams):
    model, ids = llama(2), torch.randint(1, V, (2, 6))
    how = {"max_new_tokens": 80, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_beams": beams}
    with StreamingLLM(start=4, recent=12).on(model):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    assert out.shape == (2, 86)
    if beams == 1:
        logits, _ = stepwise(model, out, StreamingLLM(start=4, recent=12))
        assert torch.equal(logits[:, 15:-1].argmax(-1), out[:, 16:])


def test_it_composes_with_a_reduction_in_front_of_the_language_model():
    model = tiny.model("LlavaForConditionalGeneration")
    inputs = tiny.prompts(model, tiny.one_image(model))
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with jeton.apply(model, "divprune", keep=9, positions="compact"):
        own = model.generate(**inputs, **how)
        with StreamingLLM(start=4, recent=500).on(model):
            assert torch.equal(model.generate(**inputs, **how), own)
        with StreamingLLM(start=4, recent=16).on(model):
            assert model.generate(**inputs, **how).shape == own.shape
    model.generate(**inputs, **how)


def test_half_precision_is_near():
    model, ids = llama(2).to(torch.bfloat16), torch.randint(0, V, (1, 40))
    found, _ = stepwise(model, ids, StreamingLLM(start=4, recent=12))
    right, _ = stepwise(model.float(), ids, StreamingLLM(start=4, recent=12))
    assert (found.float() - right).abs().max() < 0.1 * right.abs().max()


def test_nothing_remains_and_what_cannot_be_is_refused():
    model, ids = llama(1), torch.randint(0, V, (2, 20))
    before = model(ids).logits
    with pytest.raises(RuntimeError), StreamingLLM(start=2, recent=4).on(model):
        raise RuntimeError
    assert torch.equal(model(ids).logits, before) and not model.model._forward_pre_hooks
    with pytest.raises(ValueError, match="recent"):
        StreamingLLM(recent=0)
    with StreamingLLM().on(model) as stream:
        with pytest.raises(ValueError, match="sinks"):
            model(ids, attention_mask=torch.tensor([[0] + [1] * 19, [1] * 20]), past_key_values=stream.cache())
        full = DynamicCache()
        full.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 0)
        with pytest.raises(ValueError, match="empty one"):
            model(ids, past_key_values=full)
        with pytest.raises(ValueError, match="cropped"):
            stream.cache().layers[0].crop(-1)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(jeton.Unsupported, match="learned positions"), StreamingLLM().on(gpt):
        pass
    with (
        pytest.raises(jeton.Unsupported, match="time, height"),
        StreamingLLM().on(tiny.model("Qwen2_5_VLForConditionalGeneration")),
    ):
        pass


@pytest.mark.slow
def test_on_real_text_it_stays_as_good_as_within_the_context_it_was_trained_with():
    text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
    known = sorted(set(text))
    ids = torch.tensor([known.index(c) for c in text[:300_000]])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(known), hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    ))  # fmt: skip

    def draw(step):
        at = torch.randint(0, 290_000, (32,), generator=torch.Generator().manual_seed(step))
        return ids[at[:, None] + torch.arange(64)]

    train(model, draw, lambda m, x: m(input_ids=x, labels=x).loss, Recipe(steps=1500, rate=3e-3), progress=False)
    held = ids[295_000:299_001]

    def told(logits, right):
        return torch.nn.functional.cross_entropy(logits, right, reduction="none")

    with torch.no_grad():
        windows = held[: 62 * 64].view(62, 64)
        near = told(model(windows).logits[:, 31:-1].flatten(0, 1), windows[:, 32:].flatten()).mean()
        streamed, _ = stepwise(model, held[None, :-1], StreamingLLM(start=4, recent=60))
        cache = DynamicCache()
        full = torch.cat([model(part[None], past_key_values=cache).logits for part in held[:-1].split(64)], 1)
    stream, grown = (told(x[0, -1000:], held[-1000:]).mean() for x in (streamed, full))
    print(f"within the context {near:.3f}, streaming {stream:.3f}, an unbounded cache {grown:.3f}")
    assert stream < 1.05 * near and grown > 1.2 * near
