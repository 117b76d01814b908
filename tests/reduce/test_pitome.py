"""PiToMe against its card."""

from __future__ import annotations

import pytest
import torch

from jeton.method import get
from jeton.ops import matching
from jeton.tokens import Tokens


def groups(reduction, relabel=None) -> set[frozenset[int]]:
    sets = [reduction.dense[0, k].nonzero().flatten().tolist() for k in range(reduction.k)]
    return {frozenset(i if relabel is None else int(relabel[i]) for i in one) for one in sets}


def test_hand_case():
    x = torch.tensor([[[1.0, 0], [0.8, 0.6], [0.6, 0.8], [-1, 0]]])
    after = get("pitome", ratio=0.75, margin=0.5).reduce(Tokens(x)).apply(Tokens(x))
    torch.testing.assert_close(after.features[0], torch.stack([x[0, 0], (x[0, 1] + x[0, 2]) / 2, x[0, 3]]))
    assert after.size.tolist() == [[1, 2, 1]]


@pytest.mark.parametrize("seed", range(10))
def test_planted_objects_are_protected(seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    x = torch.cat([basis[:1].expand(8, -1), basis[1:5]])  # eight equal background tokens, four objects
    shuffle = torch.randperm(12, generator=generator)
    step = get("pitome", ratio=8 / 12, form="pitome").reduce(Tokens(x[shuffle][None]))
    alone = {next(iter(group)) for group in groups(step, shuffle) if len(group) == 1}
    assert step.k == 8 and {8, 9, 10, 11} <= alone
    tokens = x[shuffle][None]
    turned = matching.by_energy(tokens, -matching.energy(tokens, 0.75), 4)  # the twin: lowest energy first merges objects
    assert {8, 9, 10, 11} & set(shuffle[turned.sender[0]].tolist())


@pytest.mark.parametrize("form", ["pitome", "bsm"])
def test_permuting_patches_permutes_the_groups(form):
    x = torch.randn(1, 20, 6, generator=torch.Generator().manual_seed(0))
    shuffle = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    method = get("pitome", ratio=0.7, form=form)
    assert groups(method.reduce(Tokens(x))) == groups(method.reduce(Tokens(x[:, shuffle])), shuffle)
    tome = get("tome", r=6)  # the twin: a split by index parity does not have this property
    assert groups(tome.reduce(Tokens(x))) != groups(tome.reduce(Tokens(x[:, shuffle])), shuffle)


def laplacian_spectrum(adjacency: torch.Tensor) -> torch.Tensor:
    degree = adjacency.sum(1).rsqrt()
    return torch.linalg.eigvalsh(torch.eye(len(adjacency)) - degree[:, None] * adjacency * degree[None])


def test_merging_inside_blocks_keeps_the_spectrum():
    block = torch.arange(4).repeat_interleave(3)
    strength = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) * 0.3
    strength = (strength + strength.T) / 2 + torch.eye(4)
    graph = strength[block][:, block]
    within = torch.eye(4)[block][None].repeat(1, 1, 1)
    step = get("pitome", ratio=0.75, form="pitome").reduce(Tokens(within))
    assert all(len({int(block[i]) for i in group}) == 1 for group in groups(step))
    share, member = step.dense[0], (step.dense[0] > 0).float()
    coarse = member @ graph @ member.T
    lifted = share.T @ coarse @ share
    torch.testing.assert_close(laplacian_spectrum(lifted), laplacian_spectrum(graph), atol=1e-5, rtol=0)
    across = member[:, torch.arange(12).roll(1)]  # the twin: groups that cross the blocks change it
    spread = across / across.sum(1, keepdim=True)
    crossed = spread.T @ (across @ graph @ across.T) @ spread
    assert (laplacian_spectrum(crossed) - laplacian_spectrum(graph)).abs().max() > 1e-3


def test_ratio_one_changes_nothing():
    assert get("pitome", ratio=1.0).reduce(Tokens(torch.randn(1, 8, 3))).is_identity
    assert get("pitome", ratio=1).steps(8, 2) == [None, None]


def test_counts_follow_the_ratio_in_whole_numbers():
    assert get("pitome", ratio=0.9).promise(196, 1).count == 177  # floor(19.6) go
    assert get("pitome", ratio=0.9).promise(100, 1).count == 90
    tokens = Tokens(torch.randn(1, 197, 8), prefix=1)
    for step in get("pitome").steps(196, 12):
        tokens = step.reduce(tokens).apply(tokens)
    assert len(tokens) - 1 == get("pitome").promise(196, 12).count


def test_steps_change_form_in_the_middle_and_lower_the_margin():
    steps = get("pitome").steps(196, 5)
    assert [step.form for step in steps] == ["bsm"] * 3 + ["pitome"] * 2
    assert [round(step.margin, 6) for step in steps] == [0.75, 0.6, 0.45, 0.3, 0.15]


@pytest.mark.parametrize("keep", [3, 20, 40, 0.3])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_a_budget_is_met_exactly_after_all_blocks_and_alone(keep, prefix):
    method = get("pitome", keep=keep)
    expected = method.promise(40, 6).count
    start = tokens = Tokens(torch.randn(2, prefix + 40, 8), prefix=prefix)
    for step in method.steps(40, 6):
        tokens = step.reduce(tokens).apply(tokens) if step else tokens
    assert len(tokens) - prefix == expected == method.reduce(start).k - prefix
    assert torch.equal(tokens.features[:, :prefix], start.features[:, :prefix])


@pytest.mark.parametrize("spec", ["pitome(ratio=0.7)", "pitome(ratio=0.6, form='bsm')", "pitome(keep=5)", "pitome(keep=0.3)"])
def test_a_padded_row_merges_as_it_does_alone(spec):
    x = torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1, 4:9] = False
    batch = get(spec).reduce(Tokens(x, mask=mask, prefix=1)).apply(Tokens(x, mask=mask, prefix=1))
    alone = Tokens(x[1:, mask[1]], prefix=1)
    alone = get(spec).reduce(alone).apply(alone)
    torch.testing.assert_close(batch.features[1][batch.mask[1]], alone.features[0])
