"""ToMe against its card, and against the published steps written out plainly."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from jeton.method import get
from jeton.ops import attention
from jeton.tokens import Tokens


def published(metric, x, size, r, class_token=False, distill_token=False):
    """The card's steps 1 to 7, one image at a time, in the order the tokens leave."""
    n = metric.shape[0]
    r = min(r, (n - class_token - distill_token) // 2)
    if r <= 0:
        return x, size, list(range(n))
    m = metric / metric.norm(dim=-1, keepdim=True)
    even, odd = list(range(0, n, 2)), list(range(1, n, 2))
    scores = m[even] @ m[odd].T
    if class_token:
        scores[0] = -torch.inf
    if distill_token:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(1)
    ranked = sorted(range(len(even)), key=lambda i: (-best[i].item(), i))
    src, unmerged = ranked[:r], ranked[r:]
    if class_token:
        unmerged = sorted(unmerged)
    weighted, weight = (x * size[:, None])[odd], size[odd].clone()
    for i in src:
        weighted[partner[i]] += x[even[i]] * size[even[i]]
        weight[partner[i]] += size[even[i]]
    kept, merged = [even[i] for i in unmerged], list(range(len(odd)))
    parts = (
        [(x[i] * size[i] / size[i], size[i], i) for i in kept],
        [(weighted[j] / weight[j], weight[j], odd[j]) for j in merged],
    )
    line = [parts[0][0], parts[1][0], *parts[0][1:], *parts[1][1:]] if distill_token else [*parts[0], *parts[1]]
    return torch.stack([p[0] for p in line]), torch.stack([p[1] for p in line]), [p[2] for p in line]


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(("n", "r"), [(23, 3), (30, 8), (17, 50)])
def test_several_layers_equal_the_published_steps_including_the_order(prefix, n, r):
    """The metric of each layer is taken from the tokens, so a single wrong order or merge spreads through all later layers."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2, n, 12, generator=generator)
    heads = torch.randn(4, 12, 6, generator=generator)
    tokens = Tokens(x, prefix=prefix)
    reference = [(row, torch.ones(n)) for row in x]
    for layer in range(4):
        step = get("tome", r=r).reduce(tokens, {"keys": tokens.features @ heads[layer]})
        tokens = step.apply(tokens)
        reference = [published(row @ heads[layer], row, size, r, prefix >= 1, prefix >= 2)[:2] for row, size in reference]
        for b, (row, size) in enumerate(reference):
            slots = tokens.order[b].argsort()
            torch.testing.assert_close(tokens.features[b, slots], row, atol=1e-5, rtol=1e-5)
            assert torch.equal(tokens.size[b, slots], size)
        assert (tokens.index.diff(dim=1) > 0).all()


def test_forgetting_the_published_order_gives_another_result():
    x = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0))
    right = wrong = Tokens(x, prefix=1)
    for _ in range(2):
        right = get("tome", r=4).reduce(right).apply(right)
        wrong = get("tome", r=4).reduce(wrong).apply(wrong)
        wrong = dataclasses.replace(wrong, order=None)
    assert not torch.equal(right.index, wrong.index) or not torch.allclose(right.features, wrong.features)


def test_hand_case():
    x = torch.tensor([[[9.0, 9.0], [1, 0], [0.6, 0.8], [0, 1], [0.96, 0.28]]])
    step = get("tome", r=1).reduce(Tokens(x, prefix=1))
    after = step.apply(Tokens(x, prefix=1))
    line = after.order[0].argsort()
    expected = torch.stack([x[0, 0], x[0, 2], (x[0, 1] + x[0, 4]) / 2, x[0, 3]])
    torch.testing.assert_close(after.features[0, line], expected)
    assert after.size[0, line].tolist() == [1, 1, 2, 1]
    sources = [set(step.dense[0, k].nonzero().flatten().tolist()) for k in line]
    assert sources == [{0}, {2}, {1, 4}, {3}]


@pytest.mark.parametrize(("r", "left"), [(13, 41), (16, 11)])
def test_counts_of_the_card(r, left):
    tokens = Tokens(torch.randn(1, 197, 8), prefix=1)
    for step in get("tome", r=r).steps(196, 12):
        tokens = step.reduce(tokens).apply(tokens)
    assert len(tokens) == left == get("tome", r=r).promise(196, 12).count + 1


def test_the_falling_schedule_of_the_card():
    steps = get("tome", r=(13, -1)).steps(196, 12)
    assert [step.r if step else 0 for step in steps] == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    assert [step.r if step else 0 for step in get("tome", r=[5, 0, 2]).steps(64, 4)] == [5, 0, 2, 0]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("keep", [1, 5, 20, 40, 0.3])
def test_a_budget_is_met_exactly_after_all_blocks_and_alone(prefix, keep):
    method, n = get("tome", keep=keep), 40
    expected = method.promise(n, 6).count
    start = tokens = Tokens(torch.randn(2, prefix + n, 8), prefix=prefix)
    for step in method.steps(n, 6):
        tokens = step.reduce(tokens).apply(tokens) if step else tokens
    assert len(tokens) - prefix == expected
    assert method.reduce(start).k - prefix == expected


def test_a_budget_no_depth_can_reach_is_refused():
    with pytest.raises(ValueError, match="3 layers can halve 64 tokens to 8"):
        get("tome", keep=7).promise(64, 3)


def test_r_zero_and_keep_all_change_nothing():
    tokens = Tokens(torch.randn(2, 9, 4), prefix=1)
    assert get("tome", r=0).reduce(tokens).is_identity
    assert get("tome", keep=1.0).reduce(tokens).is_identity
    assert get("tome", keep=8).steps(8, 3) == [None] * 3


def test_the_class_token_is_bitwise_untouched():
    x = torch.randn(2, 17, 8).half()
    after = get("tome", r=7).reduce(Tokens(x, prefix=1)).apply(Tokens(x, prefix=1))
    assert torch.equal(after.features[:, 0], x[:, 0]) and (after.size[:, 0] == 1).all()


def attend(tokens: Tokens, proportional: bool) -> torch.Tensor:
    """A one-head attention readout of the class token."""
    x = tokens.features[:, None]
    bias = attention.bias(tokens.weight) if proportional else None
    return F.scaled_dot_product_attention(x[:, :, :1], x, x, attn_mask=bias)


def test_merging_equal_tokens_loses_nothing_with_the_size_bias():
    pairs = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1)
    x = torch.cat([torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1)), pairs], 1)
    # behind a class token the pairs lie at (1, 2), (3, 4), ...: odd and even places
    x = torch.cat([x, x[:, 1:3], x[:, 1:3]], 1)  # one group of six, so sizes differ
    tokens = Tokens(x, prefix=1)
    merged = get("tome", r=8).reduce(tokens).apply(tokens)
    torch.testing.assert_close(attend(merged, True), attend(tokens, True), atol=1e-5, rtol=1e-5)
    assert (attend(merged, False) - attend(tokens, True)).abs().max() > 1e-3  # the twin: without the bias it is lost


def test_restoring_a_merge_is_idempotent():
    x = torch.randn(2, 20, 4)
    step = get("tome", r=6).reduce(Tokens(x, prefix=1))
    full = step.restore(step.apply(Tokens(x, prefix=1)))
    again = step.restore(step.apply(full))
    torch.testing.assert_close(again.features, full.features)


@pytest.mark.parametrize("spec", ["tome(r=4)", "tome(keep=5)", "tome(keep=0.3)"])
def test_a_padded_row_merges_as_it_does_alone(spec):
    x = torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1, 4:9] = False
    x[1, 4:9] = torch.nan
    alone, batch = Tokens(x[1:, mask[1]], prefix=1), Tokens(x, mask=mask, prefix=1)
    for _ in range(2):
        alone, batch = (get(spec).reduce(t).apply(t) for t in (alone, batch))
        real = batch.mask[1]
        torch.testing.assert_close(batch.features[1][real], alone.features[0])
        assert torch.equal(batch.order[1][real], alone.order[0])
