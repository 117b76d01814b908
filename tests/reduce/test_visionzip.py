"""VisionZip against its card."""

from __future__ import annotations

import pytest
import torch

from jeton.method import get
from jeton.ops.anchors import gathered
from jeton.tokens import Tokens


def test_contextual_hand_case():
    """Four tokens (1,0) (2,0) (0,1) (0,3) and two anchors: 0 and 2; each adds the mean of what it is given."""
    x = torch.tensor([[[1.0, 0], [2, 0], [0, 1], [0, 3]]])
    rest = torch.ones(1, 4, dtype=torch.bool)
    into = gathered(x, torch.zeros(1, 4, dtype=torch.long), rest, torch.tensor([[2]]), 2)
    assert into.tolist() == [[0, 0, 2, 2]]
    step = get("visionzip", dominant=0, contextual=2)
    after = step.reduce(Tokens(x), {"attention": torch.rand(1, 1, 4), "keys": x}).apply(Tokens(x))
    assert after.features.tolist() == [[[3, 0], [0, 4]]]


def test_anchors_stand_at_a_fixed_stride():
    rest = torch.ones(1, 385, dtype=torch.bool)
    into = gathered(torch.randn(1, 385, 4), torch.zeros(1, 385, dtype=torch.long), rest, torch.tensor([[30]]), 30)
    assert into.unique().tolist() == list(range(0, 360, 12))


def naive(x, score, keys, dominant, contextual):
    """The released steps for one picture: class token at 0, then patches."""
    top = sorted(range(1, len(x)), key=lambda i: (-score[i].item(), i))[: dominant - 1]
    rest = [i for i in range(1, len(x)) if i not in top]
    stride = max(1, len(rest) // contextual)
    anchors = rest[::stride][:contextual]
    k = keys / keys.norm(dim=-1, keepdim=True)
    out = {i: x[i].clone() for i in [0, *top]}
    given = {i: [] for i in anchors}
    for i in rest:
        if i not in anchors:
            given[max(anchors, key=lambda a, i=i: k[i] @ k[a])].append(x[i])
    for i in anchors:
        out[i] = x[i] + (torch.stack(given[i]).mean(0) if given[i] else 0)
    return torch.stack([out[i] for i in sorted(out)])


@pytest.mark.parametrize("keep", [6, 13, 20])
def test_it_equals_the_released_steps(keep):
    generator = torch.Generator().manual_seed(keep)
    x, keys = torch.randn(2, 37, 5, generator=generator), torch.randn(2, 37, 4, generator=generator)
    attention = torch.rand(2, 3, 37, generator=generator)
    step = get("visionzip", keep=keep).reduce(Tokens(x, prefix=1), {"attention": attention, "keys": keys})
    after = step.apply(Tokens(x, prefix=1))
    contextual = round(keep * 10 / 64)
    for b in range(2):
        expected = naive(x[b], attention[b].mean(0), keys[b], keep - contextual, contextual)
        torch.testing.assert_close(after.features[b], expected)
    assert (step.index[:, 0] == 0).all() and step.prefix == 1


@pytest.mark.parametrize(("keep", "contextual"), [(192, 30), (128, 20), (64, 10), (2, 1), (1, 0)])
def test_the_papers_shares(keep, contextual):
    total = torch.tensor([[keep]])
    assert get("visionzip", keep=keep)._contextual(total, total).tolist() == [[contextual]]


@pytest.mark.parametrize("fields", [{"keep": 9}, {"keep": 0.5}, {"dominant": 5, "contextual": 3}, {"keep": 8, "contextual": 0}])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_counts_are_exact(fields, prefix):
    x = torch.randn(2, prefix + 30, 4)
    signals = {"attention": torch.rand(2, 2, prefix + 30), "keys": x}
    method = get("visionzip", **fields)
    step = method.reduce(Tokens(x, prefix=prefix), signals)
    assert step.k == method.promise(30).count and step.mask is None
    assert (step.index.diff(dim=1) > 0).all()
    assert (step.index < prefix).sum() == 2 * min(prefix, 1)  # of several special tokens only the class token


def test_a_budget_for_all_patches_keeps_them_and_no_class_token():
    x = torch.randn(1, 10, 4)
    step = get("visionzip", keep=9).reduce(Tokens(x, prefix=1))
    assert step.is_drop and step.index.tolist() == [list(range(1, 10))] and step.prefix == 0


def test_each_unit_keeps_its_class_token_and_merges_only_within_itself(anyres):
    place = anyres(1, 2, 4, 4).gather(torch.cat([torch.zeros(3).long(), torch.arange(48)])[None])
    x = torch.randn(1, 51, 4)
    tokens = Tokens(x, prefix=3, place=place)
    step = get("visionzip", keep=18).reduce(tokens, {"attention": torch.rand(1, 2, 51), "keys": x})
    assert step.k == 18 and step.index[0, :3].tolist() == [0, 1, 2] and step.prefix == 3
    unit = place.unit[0].clone()
    unit[:3] = torch.arange(3)
    assert torch.bincount(unit[step.index[0]]).tolist() == [6, 6, 6]
    into = step.index[0][step.assign[0].clamp(min=0)]
    assert torch.equal(unit[into][step.assign[0] >= 0], unit[step.assign[0] >= 0])


def test_encoders_without_a_class_token_use_received_attention():
    x = torch.randn(1, 20, 4)
    step = get("visionzip", keep=7, score="received").reduce(Tokens(x), {"attention": torch.rand(1, 20), "keys": x})
    assert step.k == 7 and step.prefix == 0


@pytest.mark.parametrize("fields", [{"keep": 0.4, "contextual": 4}, {"keep": 0.4, "dominant": 5}, {"keep": 0.4}, {"keep": 9}])
def test_a_padded_row_is_reduced_as_it_is_alone(fields):
    generator = torch.Generator().manual_seed(0)
    x, attention = torch.randn(2, 41, 5, generator=generator), torch.rand(2, 2, 41, generator=generator)
    mask = torch.ones(2, 41, dtype=torch.bool)
    mask[1, 28:] = False
    method = get("visionzip", **fields)
    batch = Tokens(x, mask=mask, prefix=1)
    batch = method.reduce(batch, {"attention": attention, "keys": x}).apply(batch)
    alone = Tokens(x[1:, :28], prefix=1)
    alone = method.reduce(alone, {"attention": attention[1:, :, :28], "keys": x[1:, :28]}).apply(alone)
    torch.testing.assert_close(batch.features[1][batch.mask[1]], alone.features[0])
