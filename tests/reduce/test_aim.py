"""AIM against its card."""

from __future__ import annotations

import pytest
import torch
from references import causal, difference, generated, kept_at, numbered, recomputed, staged, visual
from torch import Tensor
from witness import spied, watching

import tiny
from in_layers import Looking, images
from jeton.engine import apply
from jeton.method import get
from jeton.models import adapt
from jeton.needs import PageRank
from jeton.place import Place
from jeton.tokens import Tokens

LLAVA = "LlavaForConditionalGeneration"
CLOSE = 1e-5
FALLING = {"rounds": 0, "start": 0, "ratios": (0.5, 0.25, 0.0)}


def merging(**fields):
    return get("aim", **fields).parts()[0]


# -- merging ---------------------------------------------------------------------------------------------------------------


def naive(x: Tensor, rounds: int) -> Tensor:
    """The published steps on x (N, D), in the published order."""
    n = len(x)
    for done in range(1, rounds + 1):
        r, even, odd = n // 2**done, x[::2], x[1::2]
        near = torch.nn.functional.normalize(even, dim=-1) @ torch.nn.functional.normalize(odd, dim=-1).T
        edge, target = near.max(1)
        order = edge.argsort(descending=True).tolist()
        groups = [[odd[j]] for j in range(len(odd))]
        for i in order[:r]:
            groups[target[i]].append(even[i])
        x = torch.stack([even[i] for i in order[r:]] + [torch.stack(group).mean(0) for group in groups])
    return x


@pytest.mark.parametrize(("n", "rounds", "left"), [(196, 2, 49), (576, 3, 72), (22, 3, 4), (49, 2, 13), (23, 2, 7)])
def test_rounds_are_the_published_ones_in_the_published_order(n, rounds, left):
    x = torch.randn(2, n, 6, generator=torch.Generator().manual_seed(n))
    step = merging(rounds=rounds, restore_order=False).reduce(Tokens(x))
    after = step.apply(Tokens(x))
    assert len(after) == left == merging(rounds=rounds).promise(n).count
    for row in range(2):
        order = torch.arange(left) if after.order is None else after.order[row].argsort()
        torch.testing.assert_close(after.features[row][order], naive(x[row], rounds))
    assert not torch.allclose(after.features[0][:4], naive(x[0].flip(0), rounds)[:4])


def test_restored_order_stands_by_the_first_of_each_group_and_takes_turns_by_it():
    x = torch.tensor([[[1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.0]]])  # 0 joins 3, 2 joins 1
    one = merging(rounds=1).reduce(Tokens(x))
    assert one.index.tolist() == [[0, 1]] and one.assign.tolist() == [[0, 1, 1, 0]]
    torch.testing.assert_close(one.apply(Tokens(x)).features, torch.tensor([[[1.0, 0.05], [0.05, 1.0]]]))
    shuffled = merging(rounds=1, restore_order=False).reduce(Tokens(x))
    assert shuffled.index.tolist() == [[1, 3]] and shuffled.assign.tolist() == [[1, 0, 0, 1]]
    x = torch.randn(1, 23, 5, generator=torch.Generator().manual_seed(0))
    a, b = (merging(rounds=3, restore_order=order).reduce(Tokens(x)).mix(x) for order in (True, False))
    assert a.shape == b.shape and not torch.allclose(a.sum(1), b.sum(1), atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"rounds": 3}, {"keep": 0.2}, {"keep": 5}])
def test_identical_tokens_merge_into_identical_tokens(fields):
    x = torch.full((2, 24, 3), 0.7)
    after = merging(**fields).reduce(Tokens(x)).apply(Tokens(x))
    assert len(after) < 24
    torch.testing.assert_close(after.features, x[:, : len(after)])


def frames(sizes: list[int]) -> Place:
    unit = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])[None]
    zero = torch.zeros_like(unit)
    return Place(unit, zero, zero, zero, zero, len(sizes))


@pytest.mark.parametrize("fields", [{}, {"keep": 0.1}, {"keep": 4}, {"rounds": 1, "restore_order": False}])
def test_frames_merge_independently(fields):
    x = torch.randn(1, 48, 4, generator=torch.Generator().manual_seed(3))
    together = merging(**fields).reduce(Tokens(x, place=frames([16, 16, 16])))
    alone = [get("aim", **{**fields, "keep": None}).parts()[0].reduce(Tokens(x[:, at : at + 16])) for at in (0, 16, 32)]
    index = together.index[0][together.real[0]]
    assert torch.equal(index // 16, (index // 16).sort().values)
    groups = together.assign[0]
    assert all(len(set((groups == group).nonzero().flatten().div(16, rounding_mode="floor").tolist())) == 1 for group in groups)
    if fields.get("keep") is None:
        assert index.tolist() == [16 * number + i for number, step in enumerate(alone) for i in step.index[0].tolist()]
    else:
        assert len(index) == merging(**fields).promise(48).count


@pytest.mark.parametrize("keep", [1, 9, 0.05, 0.3, 0.9])
def test_uneven_crops_meet_the_budget_and_none_vanishes(keep):
    sizes = [36, 35, 5, 1, 20]
    x = torch.randn(1, sum(sizes), 4, generator=torch.Generator().manual_seed(4))
    step = merging(keep=keep).reduce(Tokens(x, place=frames(sizes)))
    assert int(step.count()) == max(merging(keep=keep).promise(sum(sizes)).count, len(sizes))
    kept = frames(sizes).unit[0][step.index[0][step.real[0]]]
    assert set(kept.tolist()) == set(range(5))


# -- the schedule ------------------------------------------------------------------------------------------------------------


def entering(method, n, depth):
    """Visual tokens that enter each layer."""
    now, lengths = n, []
    for step in method.parts()[1].steps(n, depth):
        now = now if step is None else step.keep
        lengths.append(now)
    return lengths


def test_the_published_schedules():
    qwen = entering(get("aim"), 800, 28)
    assert qwen == [800] * 15 + [700, 600, 500, 400, 300, 200, 100] + [0] * 6
    assert sum(qwen) / 28 / 800 == pytest.approx(0.661, abs=5e-4) and sum([*qwen[1:], 0]) / 28 / 800 == 0.625
    vicuna = entering(get("aim", start=13), 800, 32)
    assert vicuna == [800] * 14 + [700, 600, 500, 400, 300, 200, 100] + [0] * 11
    assert sum(vicuna) / 32 / 800 == pytest.approx(0.547, abs=5e-4)
    assert sum([*vicuna[1:], 0]) / 32 / 800 == pytest.approx(0.516, abs=5e-4)


def test_counts_are_floors_and_a_budget_ends_the_fall():
    assert entering(get("aim"), 49, 28)[15:23] == [42, 36, 30, 24, 18, 12, 6, 0]
    lengths = entering(get("aim", keep=9), 49, 28)
    assert lengths[14:23] == [49, 44, 39, 34, 29, 24, 19, 14, 9] and lengths[-1] == 9
    assert entering(get("aim"), 40, 4) == [40, 40, 40, 0] and entering(get("aim"), 30, 12) == [30] * 7 + [20, 10, 0, 0, 0]
    assert get("aim").promise(576).count == 0 and get("aim", keep=64).promise(576).count == 64


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"before": "text"}, "model"),
        ({"rounds": -1}, "rounds"),
        ({"ratios": (0.1, 0.2)}, "never grow"),
        ({"ratios": ()}, "never grow"),
        ({"ratios": (0.5,), "keep": 3}, "give one"),
        ({"tau": 0.0}, "tau"),
        ({"query_block": 0}, "query_block"),
        ({"start": -1}, "start"),
    ],
)
def test_bad_fields_are_refused_with_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        get("aim", **fields)


def test_a_schedule_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match="only 0 to 2 have one behind"):
        apply(tiny.model(LLAVA), "aim", start=2, ratios=(0.5, 0.25))


# -- the score ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def maps_of(net, inputs) -> list[Tensor]:
    """(B, H, L, L) the model's own attention in every layer. `net` must run eagerly."""
    found: list[Tensor] = []
    view = adapt(net)
    handles = [
        view.attention(layer).register_forward_hook(lambda module, args, output: found.append(output[1].double()))
        for layer in view.layers
    ]
    tiny.run(net, inputs)
    for handle in handles:
        handle.remove()
    return found


def by_hand(attention: Tensor, real: Tensor, temperature: float, rounds: int) -> Tensor:
    """(L,) importance from one prompt's attention (H, L, L) over its real columns."""
    m = (attention[:, real][:, :, real].log() / temperature).softmax(-1)
    p = torch.full((m.shape[0], 1, m.shape[1]), 1 / m.shape[1], dtype=m.dtype)
    for _ in range(rounds):
        p = p @ m
    out = torch.zeros(len(real), dtype=m.dtype)
    out[real] = p[:, 0].square().mean(0).sqrt()
    return out


@pytest.mark.parametrize("early", [None, "fastv(layer=1, keep=30)"])
@pytest.mark.parametrize("need", [PageRank(), PageRank(block=7), PageRank(temperature=1.0, rounds=2)], ids=str)
def test_the_score_is_that_of_the_eager_layers_whole_map(need, early):
    """Several images, prompts of different lengths; also where tokens have gone before."""
    net = tiny.model(LLAVA, "eager")
    inputs = tiny.inputs_for(net)
    look = Looking(2, rank=need)
    with apply(net, look if early is None else get(early) | look) as run, watching(net) as seen:
        maps = maps_of(net, inputs)
        at, length = run.costs.flow.at, run.costs.flow.length
        heard = look.heard["rank"]
        real = seen.layers[1]["mask"][:, 0, -1] == 0
    assert heard.shape == (4, 49 if early is None else 30)
    for image, (sample, _) in enumerate(images(net, inputs)):
        columns = at[image] - sample * length
        for layer, right in ((1, True), (0, False)):
            if not right and early is not None:
                continue
            wanted = by_hand(maps[layer][sample], real[sample], need.temperature, need.rounds)[columns]
            off = (heard[image] - wanted).abs().max() / wanted.abs().max()
            assert off < 1e-4 if right else off > 1e-2


# -- in the model ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_removing_equals_masking_until_no_visual_token_is_left(attention):
    net = tiny.model(LLAVA, attention)
    inputs = numbered(net, tiny.inputs_for(net))
    text = inputs["attention_mask"].bool() & ~visual(net, inputs)
    with watching(net) as whole:
        tiny.run(net, inputs)
    with apply(net, "aim", **FALLING) as run, watching(net) as seen:
        logits = tiny.run(net, inputs)
        report = run.report()
        maps = run.assignment(0)
    lengths = [(seen.lengths(layer) - text.sum(1)).tolist() for layer in range(4)]
    assert lengths == [[49, 98, 49], [24, 48, 24], [12, 24, 12], [0, 0, 0]]
    assert [image.after for image in report.images] == [0] * 4 and bool((maps[0] == -1).all())
    assert report.layer_tokens[-1] == pytest.approx(float(text.sum(1).float().mean()))
    kept = [kept_at(seen, whole, layer, inputs) for layer in range(4)]
    assert torch.equal(kept[3], text)

    def masked(kept: list[Tensor]) -> Tensor:
        with staged(net, [causal(inputs, inputs["attention_mask"].bool() & ~each) for each in kept], kept, {}):
            return tiny.run(net, inputs)

    reference, late = masked(kept), masked([kept[0], kept[0], kept[1], kept[2]])
    for sample in range(3):
        count = int(text[sample].sum())
        right = reference[sample][text[sample]]
        assert difference(logits[sample, -count:], right) < CLOSE
        assert difference(late[sample][text[sample]], right) > 100 * CLOSE


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 1, 2])
def test_layers_before_the_first_pruning_do_the_same_to_the_bit(start):
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    with watching(net) as whole:
        tiny.run(net, inputs)
    with apply(net, "aim", rounds=0, start=start, ratios=(0.5,)), watching(net) as seen:
        tiny.run(net, inputs)
    for layer in range(start + 1):
        assert torch.equal(seen.layers[layer]["hidden"], whole.layers[layer]["hidden"])
    assert seen.layers[start + 1]["hidden"].shape[1] < whole.layers[start + 1]["hidden"].shape[1]


@pytest.mark.parametrize("fields", [{"rounds": 0, "start": 0, "ratios": (1.0, 1.0, 1.0)}, {"keep": 1.0}])
def test_without_merging_and_pruning_nothing_changes(fields):
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    before = tiny.run(net, inputs)
    with apply(net, "aim", **fields):
        assert torch.equal(tiny.run(net, inputs), before)
    with apply(net, "aim", rounds=0):
        assert not torch.equal(tiny.run(net, inputs), before)


@pytest.mark.parametrize("fields", [{}, FALLING, {"before": "projector", "rounds": 3}])
def test_generation_without_visual_tokens_in_the_last_layers_equals_a_recomputation(fields):
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    spy, decided = spied(get("aim", **fields))
    with apply(net, spy):
        output = generated(net, inputs)
    new = output.sequences[:, -16:]
    whole = recomputed(net, inputs, get("aim", **fields), decided, new)
    assert difference(torch.stack(output.logits, 1), whole) < 1e-4
    assert torch.equal(whole.argmax(-1), new)


def test_merging_acts_before_the_projector_or_before_the_model():
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    outputs = []
    for before, site in (("model", "entry"), ("projector", "encoder")):
        with apply(net, "aim", before=before, keep=6) as run:
            outputs.append(tiny.run(net, inputs)[:, -1])
            assert [(s.site, s.before, s.after) for s in run.report().sites] == [(site, 49, 17), ("layer", 17, 6)]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("spec", ["aim(ratios=(0.5, 0.0), start=0) | fastv(layer=3, keep=0.5)", "aim | pyramiddrop(keep=5)"])
def test_methods_behind_it_find_nothing_left_and_do_nothing(spec):
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    with apply(net, spec) as run:
        tiny.run(net, inputs)
        assert [image.after for image in run.report().images] == [0] * 4
