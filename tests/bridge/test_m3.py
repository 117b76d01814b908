"""M3: all tokens are the model itself; one training serves every length; the oracle is never worse than a fixed scale."""

import pytest
import torch

import tiny
import toy
from jeton import bridge
from jeton.bridge import m3, shorten
from jeton.ops.squares import pool

SCALES = (16, 4, 1)


def test_all_tokens_are_the_model_as_it_was_bit_for_bit():
    plain = tiny.tiny_llava(side=8)
    inputs = tiny.prompts(plain)
    before = tiny.run(plain, inputs)
    model = bridge.attach(plain, "m3")
    assert torch.equal(tiny.run(model, inputs), before)
    model.bridge.scale(16)
    assert not torch.equal(tiny.run(model, tiny.prompts(model))[:, -1], before[:, -1])


def test_pooling_comes_after_the_projector():
    model = bridge.attach(tiny.tiny_llava(side=8), "m3", tokens=4)
    x = torch.randn(2, 64, 32)
    torch.testing.assert_close(model.bridge(x), pool(model.bridge.projector(x), 4))
    assert not torch.allclose(model.bridge(x), model.bridge.projector(pool(x, 4)), atol=1e-3)


def test_the_loss_is_the_mean_of_the_losses_at_every_scale():
    model = bridge.attach(toy.llava(), "m3").eval()
    batch = toy.scenes(5, 6, 16)
    found = m3.loss(model, batch, SCALES)
    for tokens in SCALES:
        model.bridge.scale(tokens)
        own = model(**shorten(batch, toy.IMAGE, 16, tokens)).loss
        torch.testing.assert_close(found[f"{tokens} tokens"], own / 3)


def test_the_scale_is_saved(tmp_path):
    model = bridge.attach(tiny.tiny_llava(side=8), "m3")
    model.bridge.scale(4)
    model.save_pretrained(tmp_path)
    assert bridge.BridgedLlava.from_pretrained(tmp_path).bridge.tokens == 4


def test_the_oracle_takes_the_smallest_scale_that_is_right():
    right = {16: [True, True, False, True], 4: [True, False, False, True], 1: [False, False, False, True]}
    assert m3.oracle(right) == (0.75, [4, 16, None, 1])


@pytest.mark.parametrize("seed", range(5))
def test_the_oracle_is_never_worse_than_any_scale(seed):
    marks = torch.rand(3, 40, generator=torch.Generator().manual_seed(seed)) < 0.5
    right = dict(zip(SCALES, marks.tolist(), strict=True))
    best, chosen = m3.oracle(right)
    assert best >= max(sum(one) / len(one) for one in right.values())
    assert all(scale is None or right[scale][i] for i, scale in enumerate(chosen))


@pytest.mark.slow
def test_training_several_scales_serves_few_tokens_and_keeps_the_many():
    """Which of four cells has the colour is lost in a mean, unless the projector has learned to keep it apart."""
    single, nested = (bridge.attach(toy.llava(), "m3") for _ in range(2))
    toy.learn(single, 500, rate=4e-3, size=48)
    toy.learn(nested, 500, rate=4e-3, size=48, loss=lambda model, batch: m3.loss(model, batch, (16, 4)))
    many = toy.accuracy(single), toy.accuracy(nested)
    for model in (single, nested):
        model.bridge.scale(4)
    few = toy.accuracy(single), toy.accuracy(nested)
    assert many[0] > 0.9 and many[1] >= many[0] - 0.02, (many, few)
    assert few[1] > few[0] + 0.1, (many, few)
