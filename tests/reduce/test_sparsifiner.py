"""Sparsifiner against its card."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import jeton
import tiny
import trained
from jeton.engine import apply
from jeton.engine.encoder import behind
from jeton.learned import Shape
from jeton.method import get, reducers
from jeton.place import Place
from jeton.reduce.sparsifiner import Predictor, Sparsifiner
from jeton.tokens import Tokens

WEIGHTS = trained.weights("sparsifiner")
SHAPE = Shape(32, 2, 1, 196, 1)


def looked(keep: float, n: int = 197, prefix: int = 1) -> torch.Tensor:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, n, 16), torch.randn(2, 2, n, 16)
    learned = trained.modules("sparsifiner", Shape(32, 2, 1, n - prefix, prefix))
    return get("sparsifiner", keep=keep).sight(query, key, Tokens(torch.zeros(2, n, 32), prefix=prefix), {"learned": learned})


def test_every_query_sees_a_quarter_and_special_tokens_everything():
    seen = looked(0.25)
    assert seen.shape == (2, 2, 197, 197)
    assert (seen[:, :, 1:].sum(-1) == 50).all() and (seen[:, :, 0].sum(-1) == 197).all()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[:, 0], seen[:, 1])
    assert (looked(0.1, n=22, prefix=2)[:, :, :2].sum(-1) == 22).all() and (
        looked(0.1, n=22, prefix=2)[:, :, 2:].sum(-1) == 3
    ).all()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_is_dense_attention(attention: str):
    net = tiny.model("ViTModel", attention)
    inputs = tiny.inputs_for(net)
    plain = tiny.run(net, inputs)
    with apply(net, "sparsifiner", keep=1.0, weights=WEIGHTS):
        assert torch.equal(tiny.run(net, inputs), plain)
    with apply(net, "sparsifiner", weights=WEIGHTS):
        assert not torch.allclose(tiny.run(net, inputs), plain, atol=1e-2)
    assert torch.equal(tiny.run(net, inputs), plain)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_equals_dense_attention_with_minus_infinity_at_what_is_hidden(attention: str):
    net = tiny.model("ViTModel", attention)
    inputs, heard = tiny.inputs_for(net), {}
    block = net.layers[2].attention
    handles = [getattr(block, f"{x}_proj").register_forward_hook(lambda m, a, out, x=x: heard.update({x: out})) for x in "qkv"]
    handles.append(block.o_proj.register_forward_pre_hook(lambda m, args: heard.update(out=args[0])))
    with apply(net, "sparsifiner", weights=WEIGHTS) as run:
        tiny.run(net, inputs)
        learned = run.learned["sparsifiner"]
    for handle in handles:
        handle.remove()
    q, k, v = (heard[x].unflatten(-1, (4, -1)).transpose(1, 2) for x in "qkv")
    step = get("sparsifiner", weights=WEIGHTS).steps(49, 5)[2]
    tokens = Tokens(torch.zeros(3, 50, 32), prefix=1, place=behind(Place.grid(3, 7, 7), 1))
    seen = step.sight(q, k, tokens, {"learned": learned})
    for mask, same in ((seen, True), (seen.flip(-1), False)):
        weights = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -torch.inf).softmax(-1)
        out = (weights @ v).transpose(1, 2).flatten(2)
        assert torch.allclose(out, heard["out"], atol=1e-5) == same


def test_a_guess_by_hand():
    """Only the largest coefficient counts, and the basis where it is large enough, by absolute value."""
    predictor = Predictor(Shape(2, 1, 1, 3, 1), 2)
    predictor.query = predictor.key = nn.Identity()
    with torch.no_grad():
        predictor.gather.copy_(torch.tensor([[0.0, 0], [1, 0], [0, 1], [0, 0]]))
        predictor.basis.copy_(torch.tensor([[0.1, 0.5], [-0.3, 0.01], [0.2, -0.4], [0.0, 0.6]]))
    key = torch.tensor([[[[9.0, 9.0], [1, 0], [0, 1], [5, 5]]]])
    query = torch.tensor([[[[9.0, 9.0], [0, 0], [math.log(3), 0], [0, math.log(3)]]]])
    tokens = Tokens(torch.zeros(1, 4, 2), prefix=1)
    signed = predictor(query, key, tokens)
    torch.testing.assert_close(signed[0, 0, 1], 0.75 * predictor.basis[:, 0] + 0.25 * predictor.basis[:, 1])
    sparse = predictor(query, key, tokens, top=1, threshold=0.02)
    torch.testing.assert_close(sparse[0, 0, 1], 0.75 * torch.tensor([0.1, 0.3, 0.2, 0.0]))
    torch.testing.assert_close(sparse[0, 0, 2], 0.75 * torch.tensor([0.5, 0.0, 0.4, 0.6]))


def test_a_planted_map_is_recovered():
    torch.manual_seed(0)
    shape = Shape(16, 2, 1, 23, 1)
    planted, learned = Predictor(shape, 6), Predictor(shape, 6)
    with torch.no_grad():
        planted.gather.normal_(std=0.6)
        planted.basis.copy_(torch.rand(24, 4) ** 3)
        planted.basis /= planted.basis.sum(0)
    tokens = Tokens(torch.zeros(64, 24, 16), prefix=1)
    query, key = torch.randn(64, 2, 24, 8), torch.randn(64, 2, 24, 8)
    target = planted(query, key, tokens).detach()
    optimizer = torch.optim.Adam(learned.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        loss = (learned(query, key, tokens) - target).square().sum((-2, -1)).mean() / (23 * 24)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert loss < 1e-4
    found = learned(query, key, tokens).detach()
    masks = [torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(6).indices, True) for x in (target, found)]
    agree = (masks[0] & masks[1]).sum() / masks[0].sum()
    assert agree > 0.95


def test_only_predictors_learn_to_imitate_and_only_the_model_adapts():
    net = tiny.tiny_vit()
    inputs = tiny.inputs_for(net)
    plain = tiny.run(net, inputs)
    net.requires_grad_(False)
    with apply(net, "sparsifiner", train=True) as run:
        out = run.student().train()(**inputs).last_hidden_state
        assert torch.equal(out, plain)  # nothing is hidden yet
        run.losses()["attention"].backward()
        assert all(weight.grad.abs().sum() > 0 for weight in run.learned.parameters())
    net.requires_grad_(True)
    with apply(net, "sparsifiner", phase="adapt", weights=WEIGHTS, train=True) as run:
        run.student().train()(**inputs).last_hidden_state.square().mean().backward()
        assert not run.losses() and all(weight.grad is None for weight in run.learned.parameters())
    assert net.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    with apply(net.eval(), "sparsifiner", weights=WEIGHTS):
        masked = tiny.run(net, inputs)
    with apply(net, "sparsifiner", phase="adapt", weights=WEIGHTS, train=True) as run:
        assert torch.equal(tiny.run(net, inputs), masked)


@torch.no_grad()
def test_with_tokens_pruned_those_that_are_left_are_looked_up():
    net = tiny.model("ViTModel")
    inputs = tiny.inputs_for(net)
    with apply(net, f"evit(keep=12, fuse=False) | sparsifiner(weights={WEIGHTS!r})") as run:
        tiny.run(net, inputs)
        assert run.report().encoder_tokens[-1] == 13 and run.tokens.features.shape[1] == 13


@torch.no_grad()
def test_pictures_of_other_sizes_and_language_models():
    net = tiny.model("ViTModel")
    big = torch.randn(2, 3, 9 * tiny.PATCH, 9 * tiny.PATCH)
    with apply(net, "sparsifiner", weights=WEIGHTS):
        assert net(big, interpolate_pos_encoding=True).last_hidden_state.shape[1] == 82
    llava = tiny.model("LlavaForConditionalGeneration")
    inputs = tiny.inputs_for(llava)
    plain = tiny.run(llava, inputs)
    with apply(llava, "sparsifiner", weights=WEIGHTS):
        assert not torch.allclose(tiny.run(llava, inputs), plain, atol=1e-3)
    assert torch.equal(tiny.run(llava, inputs), plain)


@torch.no_grad()
def test_a_picture_alone_equals_the_same_picture_in_a_batch():
    net = tiny.model("CLIPVisionModel")
    inputs = tiny.inputs_for(net)
    with apply(net, "sparsifiner", weights=WEIGHTS):
        batch = net(**inputs).last_hidden_state
        for number in range(3):
            torch.testing.assert_close(net(**tiny.row(inputs, number)).last_hidden_state[0], batch[number], atol=1e-4, rtol=1e-4)


def test_the_report_is_honest():
    net = tiny.model("ViTModel")
    with apply(net, "sparsifiner", weights=WEIGHTS) as run:
        tiny.run(net, tiny.inputs_for(net))
        assert run.report().flops_share > 1
    kept, full = get("sparsifiner").kept_flops(196, Shape(384, 6, 12, 196, 1))
    assert kept / full == pytest.approx((197 + 196 * 50) / 197**2)


def test_what_does_not_fit_is_refused():
    for fields in ({"keep": 0.0}, {"keep": 16}, {"top": 0}, {"compress": 0}, {"threshold": -1.0}, {"phase": "both"}):
        with pytest.raises((ValueError, TypeError), match=next(iter(fields))):
            get("sparsifiner", **fields)
    with pytest.raises(ValueError, match="do not fit"):
        apply(tiny.model("DeiTModel"), "sparsifiner", weights=WEIGHTS)  # two special tokens
    with pytest.raises(jeton.Unsupported, match="packs all pictures"):
        apply(tiny.model("Qwen2_5_VLForConditionalGeneration"), "sparsifiner", weights=WEIGHTS)
    net = tiny.model("Siglip2VisionModel")
    with apply(net, "sparsifiner", train=True), pytest.raises(jeton.Unsupported, match="padded pictures"):
        net.train()(**tiny.inputs_for(net))
    net.eval()
    assert "sparsifiner" not in {card.id for card in reducers()} and issubclass(Sparsifiner, jeton.method.Method)
