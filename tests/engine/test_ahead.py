"""Signals computed ahead of a language-model layer."""

from __future__ import annotations

import torch
from cases import LLAVA
from references import CLOSE, difference
from witness import Listening

import tiny
from jeton.engine import apply
from jeton.engine.ahead import row_mask
from jeton.needs import LastAttention, LayerKeys, VisualAttention


@torch.no_grad()
def test_a_picture_of_a_later_turn_is_attended_to_as_if_it_had_come_at_once() -> None:
    net = tiny.model(LLAVA)
    both = tiny.prompts(net, [tiny.samples(net)[1]])
    ids, pixels, cut = both["input_ids"], both["pixel_values"], 2 + tiny.SIDE**2 + 1  # the first picture and a word behind it
    first = {"input_ids": ids[:, :cut], "attention_mask": both["attention_mask"][:, :cut], "pixel_values": pixels[:1]}
    second = {"input_ids": ids[:, cut:], "attention_mask": both["attention_mask"], "pixel_values": pixels[1:]}
    listener = Listening("layer", {"last": LastAttention(ahead=True), "visual": VisualAttention(), "keys": LayerKeys()})
    with apply(net, listener):
        net(**both)
        whole = dict(listener.heard)
        cache = net(**first, use_cache=True).past_key_values
        net(**second, past_key_values=cache, use_cache=True)
    for name, heard in listener.heard.items():
        assert difference(heard, whole[name][1:]) < CLOSE < difference(heard, whole[name][:1]) / 10


def test_rows_see_what_was_cached_where_the_kernel_looks_back_by_itself() -> None:
    keys, sample, column = torch.zeros(1, 1, 5, 2), torch.tensor([0]), torch.tensor([[0, 2]])
    assert row_mask(None, keys, 2, sample, column)[0, 0].long().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    padded = row_mask(torch.tensor([[0, 1, 1, 1, 1]]), keys, 2, sample, column)
    assert padded[0, 0].long().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]]
