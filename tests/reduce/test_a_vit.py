"""A-ViT against its card."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import jeton
import tiny
from jeton.engine import apply
from jeton.learned import Shape
from jeton.method import get
from jeton.tokens import Tokens

SHAPE = Shape(32, 4, 5, 49, 1)


def channel(h: float, gamma: float = 10.0, beta: float = 30.0) -> float:
    """What the first channel says so that a token halts with probability h."""
    return (math.log(h / (1 - h)) + beta) / gamma


def through(rows: list[list[float]], soft: bool = False) -> Tokens:
    """One picture of as many tokens as `rows`, each halting with these probabilities behind the blocks; the second channel holds
    the number of the block, from 1."""
    tokens = Tokens(torch.zeros(1, len(rows), 2))
    for block, step in enumerate(get("a-vit").steps(len(rows), len(rows[0]))):
        x = torch.tensor([[[channel(row[block]), block + 1.0] for row in rows]])
        tokens = replace(tokens, features=x.gather(1, tokens.origin[..., None].expand(-1, -1, 2)))
        tokens = step.soften(tokens, {}) if soft else step.reduce(tokens).apply(tokens)
    return tokens


@pytest.mark.parametrize("soft", [False, True])
def test_the_output_is_a_mixture_over_depths(soft: bool):
    rows = [[0.2, 0.3, 0.4, 0.5], [0.995, 0.5, 0.5, 0.5], [0.5, 0.6, 0.1, 0.1]]
    tokens = through(rows, soft)
    mixed = get("a-vit").finish(tokens).features[0, :, 1]
    expected = [0.2 * 1 + 0.3 * 2 + 0.4 * 3 + 0.1 * 4, 1.0, 0.5 * 1 + 0.5 * 2]
    torch.testing.assert_close(mixed, torch.tensor(expected), atol=1e-4, rtol=0)
    assert len(tokens) == (3 if soft else 1)  # two have left by the third block


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViTModel", "Siglip2VisionModel", "DeiTModel"])
def test_weights_over_layers_sum_to_one(name: str):
    """Where every block gives ones, the mixture is one."""
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    ones = []

    class Spy(type(get("a-vit"))):
        def reduce(self, tokens, signals=None):
            step = super().reduce(tokens, signals)
            share = super().reduce(replace(tokens, memory=None, index=None), signals).memory
            ones.append((tokens.origin, share, tokens.features))
            return step

    Spy.card = get("a-vit").card
    with apply(net, Spy(beta=2.0)):
        net(**inputs)
    total = torch.zeros(3, int(ones[0][0].max()) + 1)
    for origin, share, x in ones:
        weight = share[..., 1] / x[..., 1]
        total = total.scatter_add(1, origin, weight)
    real = inputs["pixel_attention_mask"].bool() if "pixel_attention_mask" in inputs else torch.ones_like(total).bool()
    torch.testing.assert_close(total[real], torch.ones_like(total[real]), atol=1e-4, rtol=0)
    assert ones[0][0].shape[1] > ones[-1][0].shape[1]


@torch.no_grad()
def test_never_halting_gives_the_plain_output_and_halting_at_once_the_first_block():
    net = tiny.model("ViTModel")
    inputs = tiny.inputs_for(net)
    plain = net(**inputs, output_hidden_states=True)
    with apply(net, "a-vit", beta=1e4):
        assert torch.equal(net(**inputs).last_hidden_state, plain.last_hidden_state)
    with apply(net, "a-vit", beta=-1e4) as run:
        early = net(**inputs).last_hidden_state
        assert run.report().encoder_tokens == (50.0, 1.0, 1.0, 1.0, 1.0)
    torch.testing.assert_close(early, net.layernorm(plain.hidden_states[1]))


@torch.no_grad()
@pytest.mark.parametrize("train", [False, True])
def test_halted_tokens_do_not_influence_others(train: bool):
    net = tiny.model("ViTModel")
    inputs = tiny.inputs_for(net)
    outputs = []
    for wrong in (None, "halted", "running"):
        with apply(net, "a-vit", beta=3.0, train=train) as run:

            def disturb(module, args, run=run, wrong=wrong):
                x, site = args[0].clone(), run.site
                hidden = site.policy == 0 if run.train else ~site.mask
                some = hidden if wrong == "halted" else ~hidden
                x[some] += torch.randn_like(x[some])
                return (x, *args[1:])

            handle = net.layers[2].register_forward_pre_hook(disturb) if wrong else None
            outputs.append(net(**inputs).last_hidden_state)
            if handle is not None:
                handle.remove()
    assert (outputs[0] - outputs[1]).abs().max() < 1e-3 and (outputs[0] - outputs[2]).abs().max() > 1e-2


@torch.no_grad()
def test_masking_in_training_equals_leaving_at_inference():
    net = tiny.model("Dinov2Model")
    inputs = tiny.inputs_for(net)
    with apply(net, "a-vit", beta=3.0) as run:
        hard = net(**inputs).last_hidden_state
        assert run.report().encoder_tokens[-1] < 45 and run.report().flops_share < 1
    with apply(net, "a-vit", beta=3.0, train=True):
        soft = net(**inputs).last_hidden_state
    with apply(net, "a-vit", beta=2.0, train=True):
        twin = net(**inputs).last_hidden_state
    assert (hard - soft).abs().max() < 1e-3 < 10 * 1e-3 < (hard - twin).abs().max()


def test_losses_by_hand():
    """Three tokens of the first test: blocks used 4, 1, 2 and remainders 0.1, 1, 0.5."""
    rows = [[0.2, 0.3, 0.4, 0.5], [0.995, 0.5, 0.5, 0.5], [0.5, 0.6, 0.1, 0.1]]
    tokens, softened = Tokens(torch.zeros(1, 3, 2)), []
    for block, step in enumerate(get("a-vit").steps(3, 4)):
        x = torch.tensor([[[channel(row[block]), 0.0] for row in rows]])
        tokens = step.soften(replace(tokens, features=x), {})
        softened.append(tokens)
    found = get("a-vit", ponder=1.0, prior=1.0, center=1.0).losses(softened, None, SHAPE)
    assert found["ponder"].item() == pytest.approx((4 + 0.1 + 1 + 1 + 2 + 0.5) / 3, abs=1e-4)
    halting = torch.tensor([0.2 + 0.995 + 0.5, 0.3 + 0.6, 0.4, 1.0]) / 3
    halting = halting / halting.sum()
    target = torch.tensor([-0.5, 0.0, -0.5, -2.0]).softmax(0)
    assert found["prior"].item() == pytest.approx(float((target * (target / halting).log()).sum()), abs=1e-4)


@torch.no_grad()
def test_a_language_model_gets_as_many_tokens_as_there_were():
    net = tiny.model("LlavaForConditionalGeneration")
    inputs = tiny.inputs_for(net)
    outputs = []
    for beta in (1e4, 2.0):
        with apply(net, "a-vit", beta=beta) as run:
            outputs.append(tiny.run(net, inputs))
            report = run.report()
        assert all(image.before == image.after for image in report.images)
    assert report.encoder_tokens[3] < 50 and not torch.allclose(*outputs, atol=1e-2)


def test_gradients_of_the_ponder_loss_make_tokens_halt_sooner():
    net = tiny.tiny_vit()
    with apply(net, "a-vit", beta=3.0, ponder=1.0, train=True) as run:
        run.student()(**tiny.inputs_for(net))
        ponder = run.losses()["ponder"]
        ponder.backward()
    bias = net.layers[0].mlp.fc2.bias
    assert bias.grad[0] < 0  # a larger first channel lowers it


def test_no_other_method_acts_inside_the_same_encoder_and_bad_fields_are_refused():
    with pytest.raises(jeton.Unsupported, match="use it without tome"):
        apply(tiny.model("ViTModel"), "tome | a-vit")
    for fields in ({"eps": 0.0}, {"gamma": math.nan}, {"spread": 0.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            get("a-vit", **fields)
    assert get("a-vit", calibration="deit-s") == get("a-vit", beta=75.0)
