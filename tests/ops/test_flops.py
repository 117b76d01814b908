"""FLOPs by formula equal FLOPs counted by torch, and the figures of the papers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jeton.ops.flops import block_flops, decode_flops, patch_flops


def test_a_block_hand_case():
    # n=2, d=3, mlp=5: projections 4*2*9*2=144, attention 4*4*3=48, MLP 4*2*3*5=120
    assert block_flops(2, 3, 5) == 312
    assert block_flops(2, 3, 5, gated=True) == 372
    assert block_flops(2, 3, 5, n_mlp=1) == 252


def test_a_block_equals_what_torch_counts():
    n, d, m, heads, kv = 10, 16, 40, 4, 8
    x, q, k = torch.randn(1, n, d), torch.nn.Linear(d, d), torch.nn.Linear(d, kv)
    up, down = torch.nn.Linear(d, m), torch.nn.Linear(m, d)
    with FlopCounterMode(display=False) as counter:
        query = q(x).reshape(1, n, heads, d // heads).transpose(1, 2)
        key, value = (k(x).reshape(1, n, 2, -1).transpose(1, 2).repeat_interleave(2, 1) for _ in range(2))
        y = ((query @ key.mT).softmax(-1) @ value).transpose(1, 2).reshape(1, n, d)
        down(up(q(y)[:, :6]))
    assert counter.get_total_flops() == block_flops(n, d, m, kv_dim=kv, n_mlp=6)


def test_one_decoded_token_pays_for_one_row():
    full, longer = (block_flops(n, 8, 16) for n in (5, 6))
    assert decode_flops(6, 8, 16) < longer - full  # the rest is the earlier queries looking at the new key
    assert decode_flops(6, 8, 16) == 8 * 64 + 4 * 6 * 8 + 4 * 8 * 16


@pytest.mark.parametrize(("kept", "share"), [(56, 0.178)])
def test_divprunes_published_share(kept, share):
    text, image = 60, 576
    ratio = block_flops(text + kept, 4096, 11008) / block_flops(text + image, 4096, 11008)
    assert ratio == pytest.approx(share, abs=1e-3)


def test_deit_small_costs_what_evit_says():
    blocks = sum(block_flops(197, 384, 1536) for _ in range(12)) + patch_flops(196, 384, 16)
    assert blocks / 2 / 1e9 == pytest.approx(4.6, abs=0.05)
    lengths, after = [197] * 4 + [140] * 3 + [100] * 3 + [72] * 2, {3: 140, 6: 100, 9: 72}
    shortened = sum(block_flops(n, 384, 1536, n_mlp=after.get(block)) for block, n in enumerate(lengths))
    assert (shortened + patch_flops(196, 384, 16)) / 2 / 1e9 == pytest.approx(3.0, abs=0.05)
