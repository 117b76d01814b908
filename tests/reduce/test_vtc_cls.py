"""VTC-CLS against its card."""

from __future__ import annotations

import pytest
import torch

import tiny
from jeton.engine import apply
from jeton.method import Unsupported, get
from jeton.needs import ClassAttention
from jeton.tokens import Reduction, Tokens

ROWS = {"attention": torch.tensor([[0.1, 0.3, 0.6]]), "attention-2": torch.tensor([[0.5, 0.3, 0.2]])}
THREE = Tokens(torch.zeros(1, 3, 2))


def test_one_block_is_fastervlm():
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens(torch.randn(2, 50, 4, generator=generator))
    last, earlier = (torch.rand(2, 4, 50, generator=generator) for _ in range(2))
    both = {"attention": last, "attention-2": earlier}
    fastervlm = get("fastervlm", keep=9).reduce(tokens, both)
    one, two = get("vtc-cls", keep=9, layers=1), get("vtc-cls", keep=9, layers=2)
    assert one.needs() == get("fastervlm").needs()
    assert torch.equal(one.reduce(tokens, both).index, fastervlm.index)
    assert not torch.equal(two.reduce(tokens, both).index, fastervlm.index)  # the twin: two blocks are not one


@pytest.mark.parametrize(("combine", "keep", "kept"), [("sum", 1, [2]), ("sum", 2, [0, 2]), ("max", 2, [0, 2]), ("min", 1, [1])])
def test_hand_case_with_ties_to_the_lowest_index(combine, keep, kept):
    step = get("vtc-cls", keep=keep, layers=2, combine=combine).reduce(THREE, ROWS)
    assert step.index.tolist() == [kept]


def test_blocks_count_back_from_the_one_whose_output_is_used():
    needs = get("vtc-cls", layers=3).needs()
    assert {need.layer for need in needs.values()} == {-1, -2, -3}
    assert all(isinstance(need, ClassAttention) and not need.logits for need in needs.values())


def test_a_missing_block_is_named():
    with pytest.raises(ValueError, match="attention-3"):
        get("vtc-cls", keep=1, layers=3).reduce(THREE, ROWS)


def heard_in(net, inputs, **fields):
    """What the method is given on its way through a model."""
    method, heard = get("vtc-cls", **fields), {}

    def listen(self, tokens, signals=None):
        heard.update(signals)
        return Reduction.identity(*tokens.features.shape[:2], tokens.device)

    spy = type("Spy", (type(method),), {"reduce": listen, "card": method.card})(**fields)
    with apply(net, spy):
        tiny.run(net, inputs)
    return heard


def test_rows_rebuilt_under_sdpa_equal_the_eager_maps_at_every_block():
    net = tiny.tiny_llava()
    inputs = tiny.prompts(net)
    heard = heard_in(net, inputs, keep=9, layers=4)
    tower = net.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions
    assert len(heard) == 4
    for back in range(1, 5):
        rows = heard["attention" if back == 1 else f"attention-{back}"]
        torch.testing.assert_close(rows, maps[-1 - back][:, :, 0, 1:], atol=1e-6, rtol=0)  # the last block is left out
        assert (rows - maps[-back][:, :, 0, 1:]).abs().max() > 1e-3  # the twin: one block too late
        assert (rows.sum(2) < 0.9999).all()  # the class token's attention to itself is not shared out again


def test_an_encoder_without_a_class_token_is_refused():
    with pytest.raises(Unsupported, match=r"vtc-cls reads the class token's attention, but .* without a class token"):
        apply(tiny.model("LlavaForConditionalGeneration-siglip"), "vtc-cls", keep=9)


@pytest.mark.parametrize("fields", [{"layers": 0}, {"layers": 1.5}, {"layers": True}, {"combine": "mean"}, {"keep": 0}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError):
        get("vtc-cls", **fields)
