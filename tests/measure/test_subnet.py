"""Wanda masks, how they compare and combine, and the model without the pruned weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from witness import snapshot

import tiny
from jeton.measure.subnet import combine, iou, pruned, wanda_masks
from jeton.method import Unsupported
from jeton.ops.wanda import prune

LLAVA = "LlavaForConditionalGeneration"


def test_the_lowest_products_of_weight_and_activation_go_row_by_row():
    weight = torch.tensor([[1.0, -5.0, 2.0, 0.5], [4.0, 0.1, 0.2, -3.0]])
    norm = torch.tensor([1.0, 0.1, 1.0, 10.0])
    assert prune(weight, norm, 0.5).long().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert prune(weight, norm, 0.3).long().tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]  # floor(1.2)
    assert prune(torch.ones(1, 4), torch.ones(4), 0.5).long().tolist() == [[1, 1, 0, 0]]


def test_half_of_every_row_goes_and_masks_compare_as_sets():
    net = tiny.model(LLAVA)
    masks = wanda_masks(net, [tiny.inputs_for(net)], 0.5)
    assert len(masks) == 4 * 7 and all(name.startswith("model.language_model.layers.") for name in masks)
    weights = dict(net.named_parameters())
    for name, mask in masks.items():
        assert mask.shape == weights[name].shape and (mask.sum(1) == mask.shape[1] // 2).all()
    complement = {name: ~mask for name, mask in masks.items()}
    assert iou(masks, masks) == 1 and iou(masks, complement) == 0


@pytest.mark.parametrize("name", [LLAVA, "Gemma3ForConditionalGeneration"])
def test_masks_follow_the_activations_of_the_chosen_tokens_without_padding(name):
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    heard = []
    part = net.model.language_model.layers[1].mlp.down_proj
    handle = part.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    tiny.run(net, inputs)
    handle.remove()
    visual = inputs["input_ids"] == tiny.IMAGE
    kinds = {"visual": visual, "text": inputs["attention_mask"].bool() & ~visual, "all": inputs["attention_mask"].bool()}
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    found = {}
    for tokens, chosen in kinds.items():
        found[tokens] = wanda_masks(net, [inputs], 0.5, tokens=tokens)
        assert torch.equal(found[tokens][name], prune(part.weight, heard[0][chosen].double().norm(dim=0), 0.5))
    assert 0 < iou(found["visual"], found["text"]) < 1


def test_masks_combine():
    a, b = ({"w": torch.tensor([x]).bool()} for x in ([1, 1, 0, 0], [1, 0, 1, 0]))
    assert iou(a, b) == pytest.approx(1 / 3)
    got = {how: combine([a, b], how)["w"][0].long().tolist() for how in ("or", "and", "difference")}
    assert got == {"or": [1, 1, 1, 0], "and": [1, 0, 0, 0], "difference": [0, 1, 0, 0]}
    with pytest.raises(ValueError, match="different models"):
        combine([a, {"v": a["w"]}])
    with pytest.raises(ValueError, match='"or"'):
        combine([a, b], "xor")


def test_one_subnetwork_for_every_task_and_no_trace():
    net = tiny.model(LLAVA)
    before, inputs = snapshot(net), tiny.inputs_for(net)
    whole = tiny.run(net, inputs)
    weights = {name: weight.clone() for name, weight in net.named_parameters()}
    masks = combine([wanda_masks(net, [tiny.prompts(net, [sample])], 0.3) for sample in tiny.samples(net)])
    with pruned(net, masks):
        assert all(not net.get_parameter(name)[mask].any() for name, mask in masks.items())
        assert not torch.equal(tiny.run(net, inputs), whole)
    with pytest.raises(RuntimeError, match="stop"), pruned(net, masks):
        raise RuntimeError("stop")
    assert snapshot(net) == before and all(torch.equal(weights[name], weight) for name, weight in net.named_parameters())
    assert torch.equal(tiny.run(net, inputs), whole)


def test_pruning_by_activation_harms_less_than_pruning_by_weight_alone():
    """On inputs that use some directions only; the reason for the rule."""
    torch.manual_seed(0)
    x = torch.randn(200, 32) * torch.logspace(-2, 1, 32)
    weight = torch.randn(16, 32)
    by_both = weight.masked_fill(prune(weight, x.norm(dim=0), 0.5), 0)
    by_weight = weight.masked_fill(prune(weight, torch.ones(32), 0.5), 0)
    assert (x @ (weight - by_both).T).norm() < 0.2 * (x @ (weight - by_weight).T).norm()


def test_a_plain_language_model_is_taken_as_a_whole():
    config = transformers.OPTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, vocab_size=50, word_embed_proj_dim=16
    )
    net = tiny.ready(transformers.OPTForCausalLM(config))
    inputs = {"input_ids": torch.randint(5, 50, (2, 6))}
    masks = wanda_masks(net, [inputs], 0.5)
    assert len(masks) == 2 * 6 and all((mask.sum(1) == mask.shape[1] // 2).all() for mask in masks.values())
    with pytest.raises(Unsupported, match='tokens="all"'):
        wanda_masks(net, [inputs], 0.5, tokens="visual")


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_bad_arguments_are_refused(ratio):
    net = tiny.model(LLAVA)
    with pytest.raises(ValueError, match="ratio"):
        wanda_masks(net, [], ratio)
    with pytest.raises(ValueError, match="empty"):
        wanda_masks(net, [], 0.5)
    with pytest.raises(ValueError, match="tokens must be"):
        wanda_masks(net, [], 0.5, tokens="audio")
    with pytest.raises(ValueError, match="no weight"), pruned(net, {"x.weight": torch.ones(1, 1).bool()}):
        pass
