"""EViT against its card."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import jeton
from jeton.demo.digits import accuracy
from jeton.method import get
from jeton.reduce.evit import EViT
from jeton.tokens import Tokens


def through(method, n: int = 196, depth: int = 12) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    tokens, counts = Tokens(torch.randn(2, 1 + n, 4, generator=generator), prefix=1), []
    for step in method.steps(n, depth):
        if step is not None:
            attention = torch.rand(2, 3, len(tokens), generator=generator).softmax(-1)
            tokens = step.reduce(tokens, {"attention": attention}).apply(tokens)
            counts.append(len(tokens) - 1)
    return counts


@pytest.mark.parametrize(
    ("ratio", "fused", "dropped"),
    [(0.7, [139, 99, 71], [138, 97, 68]), (0.5, [99, 51, 27], [98, 49, 25]), (0.9, [178, 162, 147], None)],
)
def test_counts_of_the_card(ratio, fused, dropped):
    assert through(get("evit", ratio=ratio)) == fused
    assert get("evit", ratio=ratio).promise(196, 12).count == fused[-1]
    if dropped:
        assert through(get("evit", ratio=ratio, fuse=False)) == dropped


def test_it_acts_at_blocks_three_six_nine_of_twelve_and_in_proportion_elsewhere():
    def acts(depth: int, **fields: object) -> list[int]:
        return [block for block, step in enumerate(get("evit", **fields).steps(64, depth)) if step]

    assert acts(12) == [3, 6, 9] and acts(24) == [6, 12, 18] and acts(4) == [1, 2, 3] and acts(2) == [1] and acts(1) == [0]
    assert acts(12, locations=(2, 5)) == [2, 5]
    with pytest.raises(ValueError, match="there are only 6 blocks"):
        acts(6, locations=(3, 6))


def test_hand_case():
    x = torch.tensor([[[5.0, 5.0], [1, 0], [0, 1], [2, 3]]])
    attention = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]])
    step = get("evit", ratio=0.34).reduce(Tokens(x, prefix=1), {"attention": attention})
    after = step.apply(Tokens(x, prefix=1))
    assert torch.equal(after.features[0, :3], x[0, :3])
    torch.testing.assert_close(after.features[0, 3], 0.1 * x[0, 3])
    assert after.order.tolist() == [[0, 1, 2, 3]] and after.prefix == 1


def test_the_fused_token_is_the_attention_weighted_sum_of_the_others():
    x = torch.randn(1, 7, 3)
    attention = torch.tensor([[[0.3, 0.05, 0.2, 0.1, 0.15, 0.08, 0.12]]])
    fields = {"keep": 4}
    step = get("evit", **fields).reduce(Tokens(x, prefix=1), {"attention": attention})
    assert step.index.tolist() == [[0, 2, 3, 4, 6]]  # 2, 4, 6 stay; 3 is the most attended of the rest and stands for them
    fused = 0.05 * x[0, 1] + 0.1 * x[0, 3] + 0.08 * x[0, 5]
    torch.testing.assert_close(step.apply(Tokens(x, prefix=1)).features[0, 2], fused)
    assert step.order.tolist() == [[0, 1, 4, 2, 3]]
    normal = get("evit", normalise=True, **fields).reduce(Tokens(x, prefix=1), {"attention": attention})
    torch.testing.assert_close(normal.apply(Tokens(x, prefix=1)).features[0, 2], fused / 0.23)


def test_ratio_one_changes_nothing():
    assert get("evit", ratio=1.0).reduce(Tokens(torch.randn(1, 9, 2), prefix=1)).is_identity


def test_without_fusion_kept_tokens_trace_to_distinct_patches():
    tokens = Tokens(torch.randn(2, 50, 4), prefix=1)
    for _ in range(3):
        step = get("evit", fuse=False).reduce(tokens, {"attention": torch.rand(2, 3, len(tokens))})
        tokens = step.apply(tokens)
    assert all(row.unique().numel() == len(row) for row in tokens.index)


def test_permuting_patches_permutes_the_result():
    x, score = torch.randn(1, 12, 4), torch.rand(1, 12)
    shuffle = torch.randperm(12)
    one = get("evit", ratio=0.5).reduce(Tokens(x), {"attention": score})
    two = get("evit", ratio=0.5).reduce(Tokens(x[:, shuffle]), {"attention": score[:, shuffle]})
    assert set(one.index[0].tolist()) == set(shuffle[two.index[0]].tolist())


@pytest.mark.parametrize("keep", [1, 9, 40, 0.3])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_budget_is_met_exactly_after_all_blocks_and_alone(keep, fuse):
    method = get("evit", keep=keep, fuse=fuse)
    tokens = Tokens(torch.randn(2, 41, 4), prefix=1)
    expected = method.promise(40).count
    assert method.reduce(tokens, {"attention": torch.rand(2, 3, 41)}).k - 1 == expected
    assert through(method, 40, 12)[-1] == expected


@pytest.mark.parametrize("spec", ["evit(ratio=0.6)", "evit(keep=6)", "evit(keep=0.4, fuse=False)", "evit(normalise=True)"])
def test_a_padded_row_is_reduced_as_it_is_alone(spec):
    x, attention = torch.randn(2, 21, 6), torch.rand(2, 3, 21)
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1, 4:15] = False
    batch = get(spec).reduce(Tokens(x, mask=mask, prefix=1), {"attention": attention}).apply(Tokens(x, mask=mask, prefix=1))
    alone = Tokens(x[1:, mask[1]], prefix=1)
    alone = get(spec).reduce(alone, {"attention": attention[1:, :, mask[1]]}).apply(alone)
    torch.testing.assert_close(batch.features[1][batch.mask[1]], alone.features[0])


def test_the_signal_is_that_of_its_own_block():
    assert get("evit").needs()["attention"].layer is None
    with pytest.raises(ValueError, match="evit reads attention"):
        get("evit").reduce(Tokens(torch.randn(1, 9, 2), prefix=1))


@dataclass(frozen=True)
class Least(EViT):
    """The same with the patches that are attended to least."""

    def reduce(self, tokens, signals=None):
        return super().reduce(tokens, {**(signals or {}), "attention": 1 - signals["attention"]})


@torch.no_grad()
def test_on_digits_what_is_attended_to_matters():
    digits = pytest.importorskip("jeton.demo.digits").load_digits()
    right = {}
    for method in (EViT(keep=16, fuse=False), Least(keep=16, fuse=False)):
        with jeton.apply(digits.model, method):
            right[type(method)] = accuracy(digits.model, digits.test)
    assert right[EViT] > right[Least] + 0.1, right
