"""DiffRate against its card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from jeton.engine import apply
from jeton.learned import Shape, save
from jeton.method import get
from jeton.reduce.diffrate import DiffRate, Rates, multiply_adds
from jeton.tokens import Tokens

SHAPE = Shape(384, 6, 12, 196, 1)


def test_the_published_flops():
    head = 197 * 384 * 3 * 16**2 + 384 * 1000
    lists = DiffRate.presets["deit-s-2.9"]
    assert lists["prune"] == (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3)
    assert lists["merge"] == (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3)
    assert float(multiply_adds(lists["prune"], lists["merge"], 384, 197, 12)) + head == 2.905256448e9
    assert float(multiply_adds([], [], 384, 197, 12)) + head == 4.599177216e9
    assert DiffRate.presets["deit-b-8.7"]["merge"] == (197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3)


@pytest.mark.parametrize("name", DiffRate.presets)
def test_every_published_list_arrives_where_it_says(name: str):
    method = get("diffrate", calibration=name)
    depth = len(method.prune)
    n = method.prune[0] - 1
    assert method.promise(n, depth).count == min(*method.prune, *method.merge) - 1
    left = [step.keep for step in method.steps(n, depth) if step is not None]
    assert left == sorted(set(left), reverse=True) and get(method.spec) == method


def test_expected_count_and_survival_by_hand():
    rates = Rates(2, 4, 2, {0})
    assert rates.candidates.tolist() == [4, 2]
    k, _ = rates.kept(1)
    assert k + 1 == 4 and rates.kept(0)[0] == 4
    alive = torch.cat([torch.ones(1), rates.survival(rates.prune[1], 4)])
    assert alive.tolist() == [1, 1, 1, 0.5, 0.5]
    assert rates.lists() == ((5, 4), (5, 4))


@pytest.mark.parametrize(("target", "sign"), [(0.3, 1), (1.0, -1)])
def test_the_gradient_of_the_rate_lowers_counts_above_the_target_and_raises_those_below(target: float, sign: int):
    method, shape = get("diffrate", target=target), replace(SHAPE, depth=3, width=8, patches=12)
    rates = method.build(shape)
    method.losses([], rates, shape)["rate"].backward()
    for logits in (rates.prune, rates.merge):
        assert (logits.grad[0] == 0).all()
        assert (sign * logits.grad[1:, 0] > 0).all() and (sign * logits.grad[1:, -1] < 0).all()
        before = (logits.softmax(1) * rates.candidates).sum(1)
        after = ((logits - logits.grad / logits.grad.abs().max()).softmax(1) * rates.candidates).sum(1)
        assert (sign * (before - after)[1:] > 0).all()


def test_one_block_by_hand():
    """Of five patches the least attended goes, the next merges into the most similar of the first three."""
    x = torch.tensor([[[9.0, 9.0], [1, 0], [0, 2], [4, 3], [0, 6], [5, 5]]])
    attention = torch.tensor([[[0.3, 0.2, 0.15, 0.3, 0.1, 0.05]]])
    size = torch.tensor([[1.0, 2, 3, 1, 2, 1]])
    step = get("diffrate", prune=(5,), merge=(4,)).reduce(Tokens(x, size=size, prefix=1), {"attention": attention})
    after = step.apply(Tokens(x, size=size, prefix=1))
    assert step.index.tolist() == [[0, 1, 2, 3]] and step.assign.tolist() == [[0, 1, 2, 3, 2, -1]]
    torch.testing.assert_close(after.features, torch.tensor([[[9.0, 9.0], [1, 0], [0, 4], [4, 3]]]))
    torch.testing.assert_close(after.size, torch.tensor([[1.0, 2, 5, 1]]))


def test_a_merged_size_is_discounted_by_similarity_and_the_class_token_receives_nothing():
    x = torch.tensor([[[4.0, 3.0], [1, 0], [4, 3], [-1, 0]]])
    attention = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]])
    step = get("diffrate", keep=1, pruned=0.0).reduce(Tokens(x, prefix=1), {"attention": attention})
    after = step.apply(Tokens(x, prefix=1))
    assert step.assign.tolist() == [[0, 1, 1, 1]]  # the class token is the most similar one of patch 2
    torch.testing.assert_close(after.features[0, 1], torch.tensor([4 / 3, 1.0]))
    torch.testing.assert_close(after.size, torch.tensor([[1.0, 1 + 0.8 + 0.0]]))
    assert torch.equal(after.features[:, 0], x[:, 0])


def test_pruned_patches_are_marked_as_gone():
    step = get("diffrate", keep=2, pruned=1.0).reduce(Tokens(torch.randn(1, 6, 3), prefix=1), {"attention": torch.rand(1, 2, 6)})
    assert (step.assign == -1).sum() == 3


@torch.no_grad()
@pytest.mark.parametrize("merging", [False, True])
def test_masking_in_training_equals_removing(merging: bool):
    net = tiny.model("ViTModel")
    inputs = tiny.inputs_for(net)
    prune, merge = (50, 40, 40, 20, 9), (50, 30, 35, 15, 9) if merging else (50,) * 5
    with apply(net, "diffrate", prune=prune, merge=merge) as run:
        hard = net(**inputs).last_hidden_state[:, 0]
        assert run.reduction.k == 9
    soft = []
    for wanted in (prune, (50, 40, 40, 21, 9)):
        with apply(net, "diffrate", granularity=1, train=True) as run:
            rates = run.learned["diffrate"]
            for logits, kept in ((rates.prune, wanted), (rates.merge, merge)):
                for block in range(5):
                    logits[block, 49 - (kept[block] - 1)] = 100.0
            assert rates.lists() == (wanted, merge)
            soft.append(net(**inputs).last_hidden_state[:, 0])
    assert (hard - soft[0]).abs().max() < 1e-4 * hard.abs().max()
    if not merging:
        assert (hard - soft[1]).abs().max() > 1e-3 * hard.abs().max()


def test_what_pruning_masks_still_tells_pruning_how_it_would_be_with_more():
    """Merging follows, and has no say about patches that are gone: it must not keep their gradient from the rate of pruning."""
    method, shape = get("diffrate", granularity=1), replace(SHAPE, depth=2, width=4, patches=8)
    rates = method.build(shape)
    with torch.no_grad():
        rates.prune[1, 2], rates.merge[1, 4] = 4.0, 4.0
    tokens = Tokens(torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0)), prefix=1)
    attention = torch.linspace(1, 0, 9).expand(1, 1, 9)
    after = method.lessons(8, 2)[1].soften(tokens, {"attention": attention, "learned": rates})
    p, m = (int(kept) for kept in rates.kept(1))
    assert m < p < 8 and after.policy.tolist() == [[1] * (1 + m) + [0] * (8 - m)]
    after.policy[0, 1 + p :].sum().backward()
    assert rates.prune.grad[1].abs().sum() > 0 and (rates.merge.grad is None or (rates.merge.grad == 0).all())


def test_only_rates_learn_and_are_replayed_as_lists(tmp_path):
    net = tiny.tiny_vit().requires_grad_(False)
    inputs = tiny.inputs_for(net)
    with apply(net, "diffrate", granularity=1, train=True) as run:
        (run.student()(**inputs).last_hidden_state[:, 0].square().mean() + run.losses()["rate"]).backward()
        rates = run.learned["diffrate"]
        assert all((part.grad[1:].abs().sum(1) > 0).all() for part in (rates.prune, rates.merge))
        assert all(weight.grad is None for weight in net.parameters())
        with torch.no_grad():
            rates.prune[1:, 10] = 9
        lists = rates.lists()
        run.save(tmp_path)
    outputs = []
    for fields in ({"weights": tmp_path}, {"prune": lists[0], "merge": lists[1]}):
        with apply(net, "diffrate", **fields) as run:
            outputs.append(tiny.run(net, inputs))
            assert run.reduction.k == min(*lists[0], *lists[1])
    assert torch.equal(*outputs)


def test_the_last_block_can_be_spared():
    rates = get("diffrate", spare_last=True).build(replace(SHAPE, depth=4))
    assert rates.lists()[0][0] == rates.lists()[0][3] == 197 > rates.lists()[0][1]


def test_bad_lists_are_refused(tmp_path):
    for fields, words in (
        ({"prune": (5, 4)}, "come together"),
        ({"prune": (5, 1), "merge": (5, 4)}, "at least one patch"),
        ({"prune": (5,), "merge": (5, 4)}, "as many blocks"),
        ({"prune": (5, 4), "merge": (5, 4), "keep": 3}, "one of them"),
        ({"target": 0.0}, "target"),
        ({"granularity": 0}, "granularity"),
        ({"pruned": 2.0}, "pruned"),
    ):
        with pytest.raises(ValueError, match=words):
            get("diffrate", **fields)
    net = tiny.model("ViTModel")
    with apply(net, "diffrate", calibration="deit-s-2.9"), pytest.raises(ValueError, match="lists for 12 blocks"):
        tiny.run(net, tiny.inputs_for(net))
    save(torch.nn.Linear(1, 1), get("dynamicvit"), SHAPE, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not of diffrate"):
        get("diffrate", weights=tmp_path / "x.safetensors").promise(9, 12)
