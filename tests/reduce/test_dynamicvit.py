"""DynamicViT against its card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
import trained
from jeton.engine import apply
from jeton.learned import Shape
from jeton.method import get
from jeton.reduce.dynamicvit import Predictor
from jeton.tokens import Tokens

SHAPE = Shape(8, 2, 12, 196, 1)


@pytest.mark.parametrize("prefix", [1, 2])
def test_counts_of_the_card(prefix: int):
    method, learned = get("dynamicvit"), trained.modules("dynamicvit", SHAPE)
    tokens, counts = Tokens(torch.randn(2, prefix + 196, 8), prefix=prefix), []
    steps = method.steps(196, 12)
    assert [block for block, step in enumerate(steps) if step] == [3, 6, 9]
    for step in filter(None, steps):
        tokens = step.reduce(tokens, {"learned": learned}).apply(tokens)
        counts.append(len(tokens) - prefix)
    assert counts == [137, 96, 67] and method.promise(196, 12).count == 67
    assert get("dynamicvit", ratio=0.9).promise(196, 12).count == int(0.9**3 * 196)


def test_the_likeliest_patches_stay():
    x, learned = torch.randn(3, 11, 8), trained.modules("dynamicvit", SHAPE)
    score = learned[0](x[:, 1:], torch.ones(3, 10))[..., 0]
    step = get("dynamicvit", keep=4).reduce(Tokens(x, prefix=1), {"learned": learned})
    assert torch.equal(step.index[:, 1:], score.topk(4).indices.sort(1).values + 1) and (step.index[:, 0] == 0).all()


def test_a_predictor_by_hand():
    """Local channels as they are, the others averaged over the patches that are seen."""
    predictor = Predictor(4)
    predictor.inward = torch.nn.Identity()
    predictor.outward = torch.nn.Identity()
    x = torch.tensor([[[1.0, 4.0], [2.0, 8.0], [3.0, 100.0]]])
    out = predictor(x, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(out, torch.tensor([[[1.0, 6.0], [2.0, 6.0], [3.0, 6.0]]]).log_softmax(-1))


def test_a_patch_dropped_once_stays_dropped_in_training():
    learned = trained.modules("dynamicvit", SHAPE)
    tokens = Tokens(torch.randn(4, 50, 8), prefix=1)
    policies = []
    for step in filter(None, get("dynamicvit").steps(49, 12)):
        tokens = step.soften(tokens, {"learned": learned})
        policies.append(tokens.policy)
    for policy in policies:
        assert set(policy.unique().tolist()) <= {0.0, 1.0} and (policy[:, 0] == 1).all()
    assert all((b <= a).all() for a, b in zip(policies, policies[1:], strict=False))
    assert policies[0].sum() > policies[2].sum()


def test_the_loss_of_the_shares_is_zero_at_the_target():
    tokens = Tokens(torch.zeros(2, 1 + 100, 8), prefix=1)
    policy = torch.ones(2, 101)
    softened = []
    for left in (70, 49, 34):
        policy = policy.clone()
        policy[:, 1 + left :] = 0
        softened.append(replace(tokens, policy=policy))
    method, shape = get("dynamicvit"), replace(SHAPE, patches=100)
    assert method.losses(softened, None, shape)["ratio"].item() == pytest.approx(0, abs=1e-12)
    softened[0] = replace(tokens, policy=torch.ones(2, 101))
    assert method.losses(softened, None, shape)["ratio"].item() == pytest.approx(2 * 0.3**2 / 3)


@torch.no_grad()
def test_dropped_patches_have_no_influence_on_kept_ones_in_training():
    net = tiny.model("ViTModel")
    inputs = tiny.inputs_for(net)
    noise = []

    def disturb(module, args):
        policy = run.softened[0].policy
        x = args[0].clone()
        x[policy == wrong] += 0.5 * torch.randn_like(x[policy == wrong])
        return (x, *args[1:])

    for wrong in (None, 0, 1):  # the twin disturbs patches that are kept
        with apply(net, "dynamicvit", locations=(2,), train=True) as run:
            run.learned["dynamicvit"] = trained.modules("dynamicvit")
            handle = net.layers[3].register_forward_pre_hook(disturb) if wrong is not None else None
            noise.append(net(**inputs).last_hidden_state)
            if handle is not None:
                handle.remove()
            kept = run.softened[0].policy == 1
    assert 0 < kept[:, 1:].sum() < kept[:, 1:].numel()
    assert (noise[0] - noise[1])[kept].abs().max() < 1e-3
    assert (noise[0] - noise[2])[kept].abs().max() > 1e-2
