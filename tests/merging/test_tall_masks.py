"""TALL-masks and Consensus Merging: hand-worked masks, limits, packing, and real fine-tuned networks."""

from __future__ import annotations

import pytest
import torch

from jeton.merging._common import Folder
from jeton.merging.tall_masks import Localized, TallMasks, mask, pack, unpack

BASE = {"w": torch.ones(3)}
A, B = {"w": torch.tensor([3.0, 2.0, 1.1])}, {"w": torch.tensor([1.0, 2.0, 4.0])}
HAND = TallMasks(scale=0.5)


def test_hand_worked_masks_and_models():
    found = HAND.localize(BASE, {"a": A, "b": B})
    torch.testing.assert_close(found.merged["w"], torch.tensor([2.0, 2.0, 3.1]))
    assert found.mask("a", "w").tolist() == [True, True, False]
    assert found.mask("b", "w").tolist() == [False, True, True]
    torch.testing.assert_close(found.restore("a")["w"], torch.tensor([3.0, 3.0, 1.0]))
    torch.testing.assert_close(found.consensus(k=2, alpha=1.0)["w"], torch.tensor([1.0, 3.0, 1.0]))
    torch.testing.assert_close(TallMasks(scale=0.5, alpha=1.0).merge(BASE, [A, B])["w"], torch.tensor([1.0, 3.0, 1.0]))
    with pytest.raises(ValueError, match="there are a, b"):
        found.restore("c")


def test_one_task_is_restored_exactly():
    found = HAND.localize(BASE, {"a": A})
    assert found.mask("a", "w").all() and torch.equal(found.restore("a")["w"], A["w"])


def test_limits_of_consensus():
    found = HAND.localize(BASE, {"a": A, "b": B})
    torch.testing.assert_close(found.consensus(k=0, alpha=0.5)["w"], 1 + 0.5 * torch.tensor([2.0, 2.0, 3.1]))
    assert torch.equal(found.consensus(k=3, alpha=1.0)["w"], BASE["w"])


@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0, 100.0])
def test_tasks_that_share_no_weight_are_restored_exactly(scale):
    one, two = {"w": torch.tensor([3.0, 1.0, 1.0])}, {"w": torch.tensor([1.0, 1.0, -5.0])}
    found = TallMasks(scale=scale).localize(BASE, {"one": one, "two": two})
    assert torch.equal(found.restore("one")["w"], one["w"]) and torch.equal(found.restore("two")["w"], two["w"])


def test_a_larger_lambda_only_takes_weights_away():
    own, merged = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    masks = [mask(own, merged, scale) for scale in (0.1, 0.3, 0.9, 2.0)]
    for less, more in zip(masks[1:], masks, strict=False):
        assert not (less & ~more).any() and less.sum() < more.sum()


@pytest.mark.parametrize("shape", [(13,), (3, 5), (8,), ()])
def test_packing_is_undone_and_takes_a_bit_a_weight(shape):
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    assert pack(bits).numel() == -(-bits.numel() // 8)
    assert torch.equal(unpack(pack(bits), shape), bits)


def test_ties_adds_up_only_what_is_large_and_agrees():
    one = {"w": torch.tensor([4.0, 1.1, 1.5])}
    two = {"w": torch.tensor([0.0, 1.2, 3.0])}
    found = TallMasks(combine="ties", top=2 / 3).localize(BASE, {"one": one, "two": two})
    torch.testing.assert_close(found.merged["w"], torch.tensor([3.0, 0.0, 2.5]))
    assert TallMasks(combine="ties").localize(BASE, {"one": one, "two": two}).merged["w"].tolist() == [3.0, 0.0, 2.0]
    trimmed = TallMasks(top=2 / 3).localize(BASE, {"one": one, "two": two})
    torch.testing.assert_close(trimmed.merged["w"], torch.tensor([2.0, 0.0, 2.5]))


def test_masks_bring_back_fine_tuned_networks_that_a_sum_loses(digits):
    found = TallMasks().localize(digits.base, digits.tuned, score=digits.score)
    summed = digits.added(1.0)
    for task, model in digits.tuned.items():
        alone = digits.accuracy(task, model)
        assert digits.accuracy(task, found.restore(task)) >= 0.99 * alone
        assert digits.accuracy(task, summed) < 0.97 * alone
        assert found.single[task] == digits.score(task, model)
        assert 0.1 < found.used[task] < 0.9
        per_scale = {
            s: digits.score(task, TallMasks(scale=s).localize(digits.base, digits.tuned).restore(task)) for s in (0.2, 0.6)
        }
        assert digits.score(task, found.restore(task)) >= max(per_scale.values())


def test_consensus_picks_the_alpha_that_scores_best(digits):
    found = TallMasks().localize(digits.base, digits.tuned, score=digits.score)
    best = found.consensus(k=2, score=digits.score)
    value = {
        a / 10: sum(digits.score(t, found.consensus(2, a / 10)) / found.single[t] for t in found.masks) for a in range(1, 11)
    }
    assert torch.equal(best["0.weight"], found.consensus(2, max(value, key=value.get))["0.weight"])
    assert digits.mean(best) > digits.mean(digits.added(1.0)) + 0.05
    with pytest.raises(ValueError, match="need a score"):
        found.consensus(k=2)


def test_folders_are_localized_with_a_few_tensors_in_memory(digits, tmp_path, counted):
    base, *models = ({f"layer.{n}.weight": torch.randn(32, 32) for n in range(20)} for _ in range(4))
    TallMasks().localize(
        counted(base), {str(n): counted(model) for n, model in enumerate(models)}, out=tmp_path / "many", shard=3 * 4096
    )
    assert counted.most <= 3 * 4096 and len(list((tmp_path / "many" / "merged").glob("*.safetensors"))) == 7
    shard = max(value.nbytes for value in digits.base.values())
    found = TallMasks().localize(digits.base, digits.tuned, out=tmp_path / "found", shard=shard)
    here = TallMasks().localize(digits.base, digits.tuned)
    for again in (found, Localized.load(tmp_path / "found", digits.base)):
        for task in digits.tuned:
            ours, theirs = again.restore(task), here.restore(task)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found.restore("small", tmp_path / "small", shard=shard)
    assert torch.equal(Folder(tmp_path / "small")["3.weight"], here.restore("small")["3.weight"])
    bits = sum(file.stat().st_size for file in (tmp_path / "found" / "masks" / "small").glob("*"))
    weights = sum(value.nbytes for value in digits.base.values())
    assert bits < weights / 32 + 3000
    with pytest.raises(ValueError, match="not empty"):
        TallMasks().localize(digits.base, digits.tuned, out=tmp_path / "found")
    with pytest.raises(FileNotFoundError, match=r"tall_masks\.json"):
        Localized.load(tmp_path, digits.base)


def test_bad_arguments_are_refused():
    for fields, message in (({"combine": "mean"}, "combine"), ({"top": 0.0}, "top=0.0"), ({"k": -1}, "k=-1")):
        with pytest.raises(ValueError, match=message):
            TallMasks(**fields)
    with pytest.raises(ValueError, match="nothing to merge"):
        HAND.localize(BASE, {})
