"""Attention under a policy, rounding that lets gradients through, and choices by Gumbel-softmax."""

from __future__ import annotations

import torch

from jeton.ops.policy import ceil, gumbel_choice, least, policy_softmax, straight_through


def test_a_policy_of_ones_is_softmax_up_to_eps():
    logits = torch.randn(2, 3, 7, 7)
    assert (policy_softmax(logits, torch.ones(2, 7)) - logits.softmax(-1)).abs().max() < 1e-5


def test_hidden_keys_take_no_part_but_every_token_sees_itself():
    attention = policy_softmax(torch.zeros(1, 1, 3, 3), torch.tensor([[1.0, 0.0, 1.0]]), eps=0.0)
    expected = torch.tensor([[1 / 2, 0, 1 / 2], [1 / 3, 1 / 3, 1 / 3], [1 / 2, 0, 1 / 2]])
    torch.testing.assert_close(attention[0, 0], expected)


def test_eps_is_shared_by_all_keys():
    attention = policy_softmax(torch.zeros(1, 1, 2, 2), torch.tensor([[1.0, 0.0]]), eps=0.5)
    torch.testing.assert_close(attention[0, 0, 0], torch.tensor([1.25, 0.25]) / 1.5)


def test_what_a_hidden_key_says_changes_nothing():
    logits, policy = torch.randn(1, 2, 5, 5), torch.tensor([[1.0, 1, 0, 1, 0]])
    other = logits.clone()
    other[..., 2] += 3
    seen = torch.tensor([0, 1, 3])
    a, b = (policy_softmax(x, policy)[:, :, seen] for x in (logits, other))
    assert (a - b).abs().max() < 1e-4
    twin = policy_softmax(other, torch.ones(1, 5))[:, :, seen]
    assert (a - twin).abs().max() > 1e-2


def test_gradients_reach_the_policy():
    policy = torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)
    policy_softmax(torch.randn(1, 1, 3, 3), policy)[..., 1].sum().backward()
    assert policy.grad is not None and policy.grad[0, 1] > 0


def test_rounding_and_choosing_let_gradients_through():
    x = torch.tensor(2.2, requires_grad=True)
    assert ceil(x) == 3
    (2 * ceil(x)).backward()
    assert x.grad == 2
    hard = straight_through(torch.tensor([1.0, 0]), torch.tensor([0.6, 0.4]))
    assert hard.tolist() == [1.0, 0.0]
    a, b = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    low = least(a, b)
    low.backward()
    assert low == 3 and a.grad == b.grad == 1


def test_choices_are_one_hot_and_the_likeliest_without_chance():
    logits = torch.tensor([[2.0, 0.0], [-1.0, 1.0]]).log_softmax(-1).requires_grad_()
    assert gumbel_choice(logits, random=False).tolist() == [[1, 0], [0, 1]]
    torch.manual_seed(0)
    drawn = torch.stack([gumbel_choice(logits) for _ in range(400)])
    assert ((drawn == 0) | (drawn == 1)).all() and (drawn.sum(-1) == 1).all()
    assert (drawn.mean(0) - logits.exp()).abs().max() < 0.08
    drawn[..., 0].sum().backward()
    assert logits.grad.abs().sum() > 0


def test_the_temperature_is_that_of_the_softmax_behind_a_choice():
    logits, again = (torch.tensor([[0.3, 0.0, -0.4]], requires_grad=True) for _ in range(2))
    torch.manual_seed(1)
    gumbel_choice(logits, 0.5)[..., 0].sum().backward()
    torch.manual_seed(1)
    gumbel = -torch.empty(1, 3).exponential_().log()
    ((again + gumbel) / 0.5).softmax(-1)[..., 0].sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)
