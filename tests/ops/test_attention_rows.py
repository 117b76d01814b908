"""Rows and column means rebuilt on the side equal those of the whole map."""

from __future__ import annotations

import pytest
import torch

from jeton.ops import attention


def qkv(hq: int = 4, hk: int = 2, n: int = 10, d: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, hq, n, d, generator=generator), torch.randn(2, hk, n, d, generator=generator)


def whole(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.mT / q.shape[-1] ** 0.5
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1)


@pytest.mark.parametrize(("hq", "hk"), [(4, 4), (4, 2), (4, 1)])
def test_rows_equal_the_whole_map_with_shared_keys_too(hq, hk):
    q, k = qkv(hq, hk)
    torch.testing.assert_close(attention.rows(q[:, :, [0, 7]], k), whole(q, k)[:, :, [0, 7]])
    wrong = whole(q, k.roll(1, 1))[:, :, [0, 7]]  # the twin: heads shared in the wrong order
    assert hk == 1 or not torch.allclose(attention.rows(q[:, :, [0, 7]], k), wrong, atol=1e-2)


def test_rows_take_boolean_and_additive_masks():
    q, k = qkv()
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    expected = whole(q, k, causal)[:, :, 4:6]
    torch.testing.assert_close(attention.rows(q[:, :, 4:6], k, mask=causal[4:6]), expected)
    added = torch.zeros(10, 10).masked_fill(~causal, -torch.inf)
    torch.testing.assert_close(attention.rows(q[:, :, 4:6], k, mask=added[None, None, 4:6]), expected)


def test_logits_are_the_rows_before_softmax():
    q, k = qkv()
    torch.testing.assert_close(attention.rows(q, k, scale=0.3, logits=True).softmax(-1), attention.rows(q, k, scale=0.3))


def test_half_precision_is_scored_in_float32():
    q, k = (x.bfloat16() for x in qkv())
    out = attention.rows(q, k)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, whole(q.float(), k.float()))


@pytest.mark.parametrize("slab", [1, 3, 128])
def test_received_attention_is_the_column_mean_whatever_the_slab(slab):
    q, k = qkv()
    torch.testing.assert_close(attention.received(q, k, slab=slab), whole(q, k).mean((1, 2)))


@pytest.mark.parametrize(("hq", "hk"), [(4, 4), (4, 2)])
def test_a_map_that_is_there_already_tells_both_what_is_received_and_what_comes_out(hq, hk):
    q, k = qkv(hq, hk)
    drawn = attention.drawn(q, k)
    torch.testing.assert_close(drawn, whole(q, k))
    torch.testing.assert_close(attention.drawn(q.requires_grad_(), k), drawn)
    q = q.detach()
    torch.testing.assert_close(attention.received_in(drawn), attention.received(q, k))
    v = k.flip(2)
    torch.testing.assert_close(attention.mixed(drawn, v), whole(q, k) @ v.repeat_interleave(hq // hk, 1))
    assert not torch.allclose(attention.mixed(drawn, v), whole(q, k) @ k.repeat_interleave(hq // hk, 1), atol=1e-2)


def test_received_attention_ignores_padding_as_query_and_as_key():
    q, k = qkv()
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    out = attention.received(q, k, mask=mask)
    torch.testing.assert_close(out[1:, :6], attention.received(q[1:, :, :6], k[1:, :, :6]))
    assert (out[1, 6:] == 0).all()
    torch.testing.assert_close(out[0], attention.received(q, k)[0])


def test_bias_makes_a_token_count_as_often_as_its_size():
    q, k = qkv(2, 2, 4)
    v = torch.randn(2, 2, 4, 8)
    size = torch.tensor([[1.0, 3.0, 1.0, 2.0]]).expand(2, -1)
    merged = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention.bias(size))
    many = torch.tensor([0, 1, 1, 1, 2, 3, 3])
    full = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, many], v[:, :, many])
    torch.testing.assert_close(merged, full)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (plain - full).abs().max() > 1e-2
    assert attention.bias(size, torch.bfloat16).dtype == torch.bfloat16


def test_a_cap_bends_logits_in_front_of_the_mask():
    q, k = qkv()
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    plain = attention.rows(q, k, logits=True)
    bent = attention.rows(q, k, logits=True, softcap=0.5)
    torch.testing.assert_close(bent, 0.5 * (plain / 0.5).tanh())
    assert bent.abs().max() <= 0.5 < plain.abs().max()
    torch.testing.assert_close(attention.rows(q, k, mask=causal, softcap=0.5), bent.masked_fill(~causal, -torch.inf).softmax(-1))
