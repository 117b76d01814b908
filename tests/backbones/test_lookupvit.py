"""LookupViT: the published cost, one attention matrix a block, a plain ViT where nothing is looked up, any number of tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

import tiny
from jeton.backbones.lookupvit import LookupBlock, LookupViT, LookupViTConfig, block_macs, multi_resolution, resize
from jeton.measure.counts import count
from jeton.recipes import lookupvit as recipe

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128, "num_labels": 6}
SHAPE = {"image_size": 16, "patch_size": 2, "compressed": 3, **SMALL}


def made(**more):
    torch.manual_seed(0)
    return tiny.ready(LookupViT(LookupViTConfig(**{**SHAPE, **more})))


def pixels(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_a_block_costs_what_the_formula_says():
    config = LookupViTConfig.preset("small")
    with torch.device("meta"):
        found = count(LookupBlock(config), torch.zeros(1, 196, 384), torch.zeros(1, 25, 384)).macs
    assert found == block_macs(196, 25, 384) and round(found / 1e6, 1) == 177.0
    vit = 12 * 196 * 384**2 + 2 * 196**2 * 384
    assert round(vit / 1e6, 1) == 376.3 and round(vit / found, 2) == 2.13


@pytest.mark.parametrize(("n", "m", "light"), [(64, 9, 2), (64, 49, 4), (10, 1, 1)])
def test_so_do_others(n, m, light):
    config = LookupViTConfig(**{**SHAPE, "light": light})
    with torch.device("meta"):
        found = count(LookupBlock(config), torch.zeros(1, n, 32), torch.zeros(1, m, 32)).macs
    assert found == block_macs(n, m, 32, light)


def test_without_output_projections_it_is_a_plain_vit_on_the_resized_tokens():
    model = made()
    x = pixels(2, 3, 16, 16)
    looked = model(x).logits
    for block in model.blocks:
        for linear in (block.output, block.output_back):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    with torch.no_grad():
        few = model.streams(x)[1]
        for block in model.blocks:
            few = block.refine(few)
        plain = model.head(model.norm(few.mean(1)))
        assert torch.equal(model(x).logits, plain)
    assert not torch.allclose(looked, plain, atol=1e-2)


def test_the_compressed_tokens_begin_as_the_resized_map():
    model = made()
    lookup, few = model.streams(pixels(2, 3, 16, 16))
    assert few.shape == (2, 9, 32)
    torch.testing.assert_close(few - model.compressed_positions, resize(lookup, 8, (3, 3)))
    even = resize(torch.ones(1, 64, 2) * torch.tensor([1.0, -3.0]), 8, (5, 5))
    torch.testing.assert_close(even, torch.tensor([1.0, -3.0]).expand(1, 25, 2))
    halves = torch.arange(16.0).view(1, 16, 1)  # weights 1/8, 3/8, 3/8, 1/8 of four neighbours, cut off at the edge
    by_hand = (3 * halves[0, :2].sum() + halves[0, 2]) / 7
    torch.testing.assert_close(resize(halves, 1, (1, 8))[0, 0], by_hand)


def test_the_order_of_lookup_tokens_does_not_matter():
    model = made(pool="both")
    lookup, few = model.streams(pixels(2, 3, 16, 16))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    plain, mixed = (model.classify(*model.encode(tokens, few)) for tokens in (lookup, lookup[:, order]))
    torch.testing.assert_close(plain, mixed, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, model.classify(*model.encode(lookup, few.flip(2))), atol=1e-2)


def test_attention_is_computed_once_in_a_block_and_used_both_ways(monkeypatch):
    model, seen, softmax = made(), [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, *a, **k: seen.append(x.shape) or softmax(x, *a, **k))
    model(pixels(2, 3, 16, 16))
    assert seen == [(2, 4, 9, 64)] * 3  # the refining block attends with SDPA
    block = model.blocks[0]
    lookup, few = model.streams(pixels(2, 3, 16, 16))
    q, k = block.query(block.norm_compressed(few)), block.key(block.norm_lookup(lookup))
    a = (q.view(2, 9, 4, 8).transpose(1, 2) @ k.view(2, 64, 4, 8).permute(0, 2, 3, 1) / 8**0.5).softmax(-1)
    after = block(lookup, few)[1]
    back = block.value_back(block.norm_refined(after)).view(2, 9, 4, 8).transpose(1, 2)
    given = lookup + block.output_back((a.transpose(2, 3) @ back).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(lookup, few)[0], given + block.light(block.norm_light(given)))


def test_one_set_of_weights_runs_with_any_number_and_any_size(tmp_path):
    model = made()
    for m in (1, 3, 5, 7, 10):
        out = model(pixels(2, 3, 16, 16), compressed=m)
        assert out.compressed.shape == (2, m * m, 32) and out.lookup.shape == (2, 64, 32) and out.logits.shape == (2, 6)
    assert model(pixels(1, 3, 20, 12)).lookup.shape == (1, 60, 32)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(pixels(2, 3, 16, 16)).logits, model(pixels(2, 3, 16, 16)).logits)


def test_a_batch_equals_its_pictures_one_by_one():
    model, x = made(), pixels(3, 3, 16, 16)
    torch.testing.assert_close(model(x).logits, torch.cat([model(one[None]).logits for one in x]), atol=1e-5, rtol=1e-5)


def test_videos_are_tubelets_in_the_same_blocks():
    model = made(frames=4, tubelet=2)
    x = pixels(2, 4, 3, 16, 16)
    out = model(x, compressed=5)
    assert out.lookup.shape == (2, 2 * 64, 32) and out.compressed.shape == (2, 2 * 25, 32)
    token = model.embed(x[:, 2:4, :, 2:4, 4:6].transpose(1, 2).flatten(1)) + model.positions[:, 8 + 2] + model.times[:, 1, 0]
    torch.testing.assert_close(model.streams(x)[0][:, 64 + 8 + 2], token)


def test_the_loss_draws_sizes_from_the_list_and_every_weight_learns():
    model, seen = made(), []
    batch = pixels(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    loss = multi_resolution((3, 7))
    inner = model.streams
    model.streams = lambda x, m: seen.append(m) or inner(x, m)
    torch.manual_seed(0)
    for _ in range(12):
        found = loss(model, batch)
    assert set(seen) == {3, 7}
    torch.testing.assert_close(found, cross_entropy(model(batch[0], compressed=seen[-1]).logits, batch[1]))
    found.backward()
    last = ("blocks.2.output_back", "blocks.2.value_back", "blocks.2.norm_refined", "blocks.2.light", "blocks.2.norm_light")
    for name, value in model.named_parameters():
        assert (value.grad is None) == name.startswith(last), name  # what the last block tells the lookup tokens, none reads


def test_bad_input_is_refused():
    model = made()
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="positive whole number"):
            model(pixels(1, 3, 16, 16), compressed=wrong)
    with pytest.raises(ValueError, match="1 frame"):
        model(pixels(1, 2, 3, 16, 16))
    with pytest.raises(ValueError, match="whole patches"):
        model(pixels(1, 3, 16, 15))
    with pytest.raises(ValueError, match="pool"):
        LookupViTConfig(pool="all")
    with pytest.raises(ValueError, match="there are small"):
        LookupViTConfig.preset("huge")
    with pytest.raises(ValueError, match="at least one"):
        multi_resolution(())


@pytest.mark.slow
def test_accuracy_on_digits_rises_with_the_number_of_compressed_tokens(tmp_path):
    """One set of weights, three seeds."""
    pytest.importorskip("sklearn")
    told = recipe.run(tmp_path, progress=False)["accuracy"]
    assert 0.9 < told["3 x 3"] < told["5 x 5"] < told["7 x 7"], told
