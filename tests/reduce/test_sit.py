"""SiT: slots are mixtures of all patches, counts are the paper's, and the way back belongs to the training alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import tiny
import trained
from jeton.demo.digits import load_digits
from jeton.engine import apply
from jeton.learned import Shape
from jeton.method import get
from jeton.recipes import sit as recipe
from jeton.reduce.sit import Expanding, Recalibration, SiT, Slimming
from jeton.tokens import Tokens

SHAPE = Shape(width=16, heads=4, depth=12, patches=36, prefix=1)


def rows(batch=3, n=37, seed=0):
    return torch.randn(batch, n, 16, generator=torch.Generator().manual_seed(seed))


def slotted(x, **fields):
    method = SiT(**fields)
    return method.reduce(Tokens(x, prefix=1), {"learned": trained.modules("sit", SHAPE)})


def test_rows_of_the_matrix_sum_to_one_over_tokens_and_special_tokens_stand_aside():
    x = rows()
    step = slotted(x, keep=9)
    assert step.matrix.shape == (3, 10, 37) and step.prefix == 1
    torch.testing.assert_close(step.matrix.sum(2), torch.ones(3, 10))
    assert (step.matrix[:, 1:, 0] == 0).all() and torch.equal(step.matrix[:, 0], torch.eye(37)[:1].expand(3, -1))
    module = trained.modules("sit", SHAPE)[0]
    by_hand = module(x[:, 1:])[..., :9].softmax(1).transpose(1, 2)
    torch.testing.assert_close(step.mix(x)[:, 1:], by_hand @ x[:, 1:])
    assert not torch.allclose(step.mix(x)[:, 1:], module(x[:, 1:])[..., :9].softmax(2).transpose(1, 2) @ x[:, 1:], atol=1e-2)


def test_constant_tokens_give_constant_slots():
    x = rows(n=1).expand(-1, 37, -1)
    after = slotted(x, keep=9).mix(x)
    torch.testing.assert_close(after, x[:, :10])


def test_scores_of_zero_give_the_mean():
    module = Slimming(16, 5)
    torch.nn.init.zeros_(module.slots.weight)
    torch.nn.init.zeros_(module.slots.bias)
    assert module.scale == 1
    x = rows()
    step = SiT(keep=5).reduce(Tokens(x, prefix=1), {"learned": torch.nn.ModuleList([module])})
    torch.testing.assert_close(step.mix(x)[:, 1:], x[:, 1:].mean(1, keepdim=True).expand(-1, 5, -1))


def test_counts_are_the_papers():
    method = SiT()
    assert method.counts(196, 12) == [196] * 2 + [98] * 3 + [49] * 3 + [24] * 4
    small = get("sit", calibration="lv-vit-s")
    assert small.counts(196, 16) == [196] * 8 + [98] * 3 + [49] * 2 + [24] * 3
    assert get("sit", calibration="lv-vit-t").counts(196, 14)[:3] == [98, 49, 24]
    assert [module.slots.out_features for module in method.build(replace(SHAPE, patches=196))] == [98, 49, 24]
    assert method.promise(196, 12).count == 24 and SiT(keep=20).promise(196, 12).count == 20


def test_without_slimming_the_model_is_as_it_was():
    net = tiny.model("ViTModel")
    inputs = tiny.inputs_for(net)
    before = tiny.run(net, inputs)
    with apply(net, "sit", keep=1.0, weights=trained.weights("sit")):
        assert torch.equal(tiny.run(net, inputs), before)
    with apply(net, "sit", keep=12, weights=trained.weights("sit")):
        assert not torch.allclose(tiny.run(net, inputs)[:, :1], before[:, :1], atol=1e-3)


def test_inside_a_model_slots_stand_behind_the_chosen_blocks():
    net = tiny.model("ViTModel")
    with apply(net, "sit", weights=trained.weights("sit"), locations=(1, 2, 3)) as run:
        out = net(**tiny.inputs_for(net), output_hidden_states=True)
        assert run.report().encoder_tokens == (50, 50, 25, 13, 7)
    assert [state.shape[1] for state in out.hidden_states] == [50, 50, 25, 13, 7, 7]


def test_fewer_slots_are_the_first_ones_and_more_are_refused():
    x = rows()
    torch.testing.assert_close(
        SiT(keep=7).reduce(Tokens(x, prefix=1), {"learned": trained.modules("sit", SHAPE)}).matrix[:, 1:],
        slotted(x, keep=9).matrix[:, 1:8],
    )
    few = SiT().build(SHAPE)
    assert [module.slots.out_features for module in few] == [18, 9, 4]
    with pytest.raises(ValueError, match="18 slots here"):
        SiT(keep=20).reduce(Tokens(x, prefix=1), {"learned": few})
    big = trained.modules("sit", SHAPE).state_dict()
    assert SiT().taken(big, SHAPE)["1.slots.weight"].shape == (9, 8)
    assert SiT().fits(SHAPE, replace(SHAPE, patches=9, depth=4)) and not SiT().fits(SHAPE, replace(SHAPE, depth=3))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="ratio"):
        SiT(ratio=1.5)
    with pytest.raises(ValueError, match="block numbers"):
        SiT(locations=())
    with pytest.raises(ValueError, match="only 5 blocks"):
        SiT(locations=(7,)).steps(49, 5)


def test_the_way_back_mixes_tokens_then_channels_and_gives_the_original_grid():
    back = Expanding(9, 36, 16)
    x = rows(n=9)
    y = back.tokens(back.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(back(x), y + back.channels(back.norm_channels(y)))
    assert back.tokens[0].out_features == 4 * 36
    rec = Recalibration([36, 18, 9], 36, 16)
    assert sorted(rec.back) == ["1", "2"] and rec.recover(2, x).shape == (3, 36, 16)
    assert torch.equal(rec.recover(0, rows(n=36)), rows(n=36))


def test_the_loss_is_the_mean_over_blocks_of_squared_differences():
    rec = Recalibration([36, 9], 36, 16)
    student, teacher = [rows(), rows(n=10, seed=1)], [rows(seed=2).requires_grad_(), rows(seed=3)]
    found = rec(student, teacher)
    parts = [
        (student[0] - teacher[0])[:, 1:].square().mean(),
        (rec.recover(1, student[1][:, 1:]) - teacher[1][:, 1:]).square().mean(),
    ]
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2)
    found.backward()
    assert teacher[0].grad is None


@pytest.fixture
def pupil():
    pytest.importorskip("sklearn")
    digits = load_digits()
    teacher = copy.deepcopy(digits.model)
    with torch.random.fork_rng(), apply(digits.model, "sit", train=True) as run:
        torch.manual_seed(0)
        shape = run.learned.shape
        rec = Recalibration(run.methods[0].counts(shape.patches, shape.depth), shape.patches, shape.width)
        yield recipe.Pupil(run.student().train(), rec, teacher), digits.train, run


def test_gradients_reach_every_slot_and_every_way_back(pupil):
    model, data, _ = pupil
    sum(model(data.pixels[:8], data.labels[:8]).values()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    assert len(model.recalibration.back) == 6 and not any("asked" in name for name, _ in model.named_parameters())


def test_what_is_saved_knows_no_way_back_and_decides_the_same(pupil, tmp_path):
    model, data, run = pupil
    (file,) = run.save(tmp_path)
    with safe_open(file, "pt") as weights:
        names = list(weights.keys())
    assert sorted({name.split(".")[0] for name in names}) == ["0", "1", "2"]
    assert {name.split(".")[1] for name in names} == {"inward", "slots", "scale"}
    net = model.student.model.eval()
    with torch.no_grad():
        trained_logits = net(pixel_values=data.pixels[:8]).logits
        run.remove()
        with apply(net, "sit", weights=tmp_path):
            assert torch.equal(net(pixel_values=data.pixels[:8]).logits, trained_logits)


@pytest.mark.slow
def test_one_batch_is_matched_within_500_steps(pupil):
    """The token term falls below a tenth of where it began."""
    model, data, _ = pupil
    batch = data.pixels[:32], data.labels[:32]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = last = None
    for _ in range(500):
        losses = model(*batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        last = losses["tokens"].item()
        first = last if first is None else first
        if last < 0.1 * first:
            break
    assert last < 0.1 * first, (first, last)


@pytest.mark.slow
def test_slimming_is_learned_on_digits(tmp_path):
    told = recipe.run(tmp_path, progress=False)["accuracy"]
    assert told["slimmed, not trained"] < 0.7 and told["slimmed, trained"] > told["teacher"] - 0.03, told
