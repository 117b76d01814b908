"""MCTF against its card: scores, counts, fused attention; and a whole ViT against the published steps written out plainly."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import jeton
import tiny
from jeton.engine.clock import Clock
from jeton.engine.fused import MapAhead
from jeton.method import get
from jeton.ops import attention
from jeton.tokens import Reduction, Tokens


def tokens(n=24, prefix=1, seed=0, size=None):
    return Tokens(torch.randn(2, n, 8, generator=torch.Generator().manual_seed(seed)), prefix=prefix, size=size)


def received(n=24, seed=1):
    return {"attention": torch.rand(2, n, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_by_similarity_alone_it_is_tomes_matching(prefix):
    x = tokens(prefix=prefix)
    alone = {"tau_info": 0, "tau_size": 0, "bidirectional": False, "pooling": "size"}
    ours, tome = get("mctf", r=7, **alone).reduce(x), get("tome", r=7).reduce(x)
    assert torch.equal(ours.assign, tome.assign) and torch.equal(ours.order, tome.order)
    torch.testing.assert_close(ours.weight, tome.weight)
    other = get("mctf", r=7, **{**alone, "tau_info": 1}).reduce(x, received())
    assert not torch.equal(other.assign, tome.assign)


def test_a_score_by_hand():
    x = torch.tensor([[[1.0, 0], [0.6, 0.8], [0, 1]]])
    size, paid = torch.tensor([[2.0, 1, 1]]), torch.tensor([[2.0, 2, 1]])
    score = get("mctf")._pairs(Tokens(x, size=size), paid).score
    assert score[0, 0, 0].item() == pytest.approx(0.8 * 0.25**0.05 * 0.5**0.025) == pytest.approx(0.7336, abs=5e-5)


@pytest.mark.parametrize("r", [1, 4, 5, 11])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_exactly_r_tokens_go(r, prefix, bidirectional):
    x = tokens(prefix + 22, prefix)
    step = get("mctf", r=r, bidirectional=bidirectional, least=1).reduce(x, received(prefix + 22))
    assert step.k == prefix + 22 - r and step.mask is None
    assert torch.equal(step.mix(x.features)[:, :prefix], x.features[:, :prefix])


def test_both_directions_by_hand():
    """Even places send first: of 0, 2, 4 the best pair is (2, 3), one goes. Then 1 goes to 0, which is left."""
    angles = torch.tensor([0.0, 0.3, 2.0, 2.05, 4.0, 5.0])
    x = Tokens(torch.stack([angles.cos(), angles.sin()], -1)[None])
    step = get("mctf", r=2, tau_info=0, pooling="mean", least=1).reduce(x)
    assert step.index.tolist() == [[0, 3, 4, 5]] and step.assign.tolist() == [[0, 0, 1, 1, 2, 3]]
    # the published listing: alphas by falling score of the first direction, betas by falling score of the second
    assert step.order.tolist() == [[0, 3, 1, 2]]


def test_a_beta_takes_along_what_it_took_in():
    """2 goes to 1, and 1 with it to 0, in the second direction of the same fusion."""
    x = Tokens(torch.tensor([[[1.0, 0.0], [1, 0.05], [1, 0.1], [-1, 0.3], [0, -1], [0.2, -1.4]]]))
    step = get("mctf", r=2, tau_info=0, pooling="mean", least=1).reduce(x)
    assert step.assign[0, :3].tolist() == [0, 0, 0] and step.index[0, 0] == 0
    torch.testing.assert_close(step.mix(x.features)[0, 0], x.features[0, :3].mean(0))


def test_tokens_that_hear_much_attention_are_kept():
    """Four equal pairs; of those one is looked at: it stays, by information, where all are alike."""
    pairs = torch.eye(4).repeat_interleave(2, 0)[None]
    paid = torch.ones(1, 8)
    paid[0, 4:6] = 50.0
    step = get("mctf", r=3, bidirectional=False, least=1).reduce(Tokens(pairs), {"attention": paid})
    assert {4, 5} <= set(step.index[0].tolist())


def test_weights_are_attention_times_size():
    x = tokens(6, 0, size=torch.tensor([[1.0, 2, 3, 1, 1, 2]]).expand(2, -1))
    paid = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.2, 0.1]]).expand(2, -1)
    step = get("mctf", r=2, least=1).reduce(x, {"attention": paid})
    w = (paid * x.size)[0]
    for slot in range(step.k):
        members = (step.assign[0] == slot).nonzero().flatten()
        expected = (w[members, None] * x.features[0, members]).sum(0) / w[members].sum()
        torch.testing.assert_close(step.mix(x.features)[0, slot], expected)
    assert step.apply(x).size.sum(1).tolist() == [10, 10]


def test_counts_and_limits():
    assert get("mctf").promise(196, 12).count == 196 - 11 * 16
    assert get("mctf", r=0.35, blocks=(3, 6, 9)).promise(196, 12).count == 55  # 196, 128, 84, 55
    assert get("mctf", r=30).promise(36, 4).count == 9 and get("mctf", keep=10).promise(196, 12).count == 10
    assert [step is not None for step in get("mctf", keep=0.5).steps(64, 4)] == [False, True, True, True]
    for fields, words in (({"r": -1}, "whole number"), ({"pooling": "max"}, "pooling must"), ({"tau_sim": -1}, "tau_")):
        with pytest.raises(ValueError, match=words):
            get("mctf", **fields)
    with pytest.raises(ValueError, match="needs block 9"):
        get("mctf", blocks=(9,)).steps(64, 6)


# -- one-step-ahead attention ------------------------------------------------------------------------------------------------


def ahead(x, step, value, size=None, drawn=False):
    """The attention of fused tokens with the map of the others, as the engine computes it."""
    held = MapAhead()
    heads = x[:, None].expand(-1, 2, -1, -1)
    held.hear(heads, heads, None if size is None else attention.bias(size), x.shape[2] ** -0.5)
    held.reduction = step
    if drawn:
        held.draw()
        assert held.map is not None

    def original(q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2), None

    return held.attend(original, value)


def test_rows_of_the_fused_map_add_up_to_one():
    x = tokens()
    step = get("mctf", r=9, least=1).reduce(x, received())
    eye = torch.eye(step.k).expand(2, 2, -1, -1)
    rows = ahead(x.features, step, eye)
    assert rows.shape == (2, step.k, 2, step.k)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, step.k, 2), atol=1e-5, rtol=0)


def test_the_fused_map_by_hand():
    """Columns of a group are added, then rows averaged with the group's weights."""
    x, size = tokens(), torch.rand(2, 24) + 0.5
    step = get("mctf", r=9, least=1).reduce(x, received())
    whole = attention.rows(x.features[:, None], x.features[:, None], mask=attention.bias(size))[:, 0]
    group = (step.assign[:, None] == torch.arange(step.k)[:, None]).float()
    expected = step.dense @ whole @ group.mT
    eye = torch.eye(step.k).expand(2, 2, -1, -1)
    for drawn in (False, True):
        torch.testing.assert_close(ahead(x.features, step, eye, size, drawn)[:, :, 0], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ahead(x.features, step, eye)[:, :, 0], expected, atol=1e-2)


def test_a_drawn_map_is_gone_before_rows_are_mixed(monkeypatch):
    """It is the largest thing there is in the block."""
    x, held, alive = tokens(), MapAhead(), []
    heads = x.features[:, None].expand(-1, 2, -1, -1)
    held.hear(heads, heads, None, 8**-0.5)
    held.draw()
    held.reduction, map = get("mctf", r=9, least=1).reduce(x, received()), weakref.ref(held.map)
    own = Reduction.mix
    monkeypatch.setattr(Reduction, "mix", lambda step, y: alive.append(map() is not None) or own(step, y))
    held.attend(None, torch.randn(2, 2, held.reduction.k, 8))
    assert alive == [False] and not hasattr(held, "query")


def test_where_groups_are_equal_it_is_attention_with_sizes():
    pairs = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3)).repeat_interleave(2, 1)
    x = Tokens(pairs)
    step = get("mctf", r=6, bidirectional=False, least=1, tau_info=0, pooling="mean").reduce(x)
    after = step.apply(x)
    assert torch.equal(after.size, torch.full((2, 6), 2.0))
    value = torch.randn(2, 2, 6, 4)
    heads = after.features[:, None].expand(-1, 2, -1, -1)
    expected = scaled_dot_product_attention(heads, heads, value, attention.bias(after.size)).transpose(1, 2)
    torch.testing.assert_close(ahead(x.features, step, value), expected, atol=1e-5, rtol=1e-5)


# -- a whole encoder -----------------------------------------------------------------------------------------------------------


def published(model, pixels, r, one_step_ahead):
    """One picture at a time, tokens in the published order: slow and plain on purpose."""
    outputs = []
    for picture in pixels:
        x = model.embeddings(picture[None])[0]
        size = torch.ones(len(x))
        for number, block in enumerate(model.layers):
            a, heads = block.attention, model.config.num_attention_heads

            def split(part, y, heads=heads):
                return part(y).view(len(y), heads, -1).transpose(0, 1)

            def softmaxed(y, size, a=a, split=split):
                q, k = split(a.q_proj, y), split(a.k_proj, y)
                return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + size.log()).softmax(-1)

            map = softmaxed(block.layernorm_before(x), size)
            if number:
                x, size, fused = fuse(x, size, map, r)
                map = fused if one_step_ahead else softmaxed(block.layernorm_before(x), size)
            value = split(a.v_proj, block.layernorm_before(x))
            x = x + a.o_proj((map @ value).transpose(0, 1).flatten(1))
            x = x + block.mlp(block.layernorm_after(x))
        outputs.append(model.layernorm(x)[0])
    return torch.stack(outputs)


def fuse(x, size, map, r):
    n, paid = len(x), map.mean((0, 1))
    unit = x / x.norm(dim=1, keepdim=True)
    u, v = (1 / paid) / (1 / paid).max(), (1 / size) / (1 / size).max()
    alpha, beta = list(range(0, n, 2)), list(range(1, n, 2))
    score = torch.tensor(
        [[((unit[i] @ unit[j] + 1) / 2) * (u[i] * u[j]) ** (1 / 20) * (v[i] * v[j]) ** (1 / 40) for j in beta] for i in alpha]
    )
    score[0] = -torch.inf
    r = min(r, n - 10, (n - 1) // 2)
    best = score.max(1)
    ranked = best.values.argsort(descending=True, stable=True).tolist()
    gone, stay = ranked[: r // 2], sorted(ranked[r // 2 :])
    groups = {i: [alpha[i]] for i in stay}
    load = {j: [beta[j]] for j in range(len(beta))}
    for i in gone:
        load[int(best.indices[i])].append(alpha[i])
    back = score[stay].max(0)
    order = back.values.argsort(descending=True, stable=True).tolist()
    for j in order[: r - r // 2]:
        groups[stay[int(back.indices[j])]] += load[j]
    members = [groups[i] for i in stay] + [load[j] for j in order[r - r // 2 :]]
    w = paid * size
    features = torch.stack([(w[m, None] * x[m]).sum(0) / w[m].sum() for m in members])
    columns = torch.stack([map[:, :, m].sum(2) for m in members], 2)
    rows = torch.stack([(w[m, None] * columns[:, m]).sum(1) / w[m].sum() for m in members], 1)
    return features, torch.stack([size[m].sum() for m in members]), rows


@torch.no_grad()
@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("r", [5, 8])
def test_a_vit_equals_the_published_steps(ahead, r):
    model = tiny.model("ViTModel")
    pixels = tiny.inputs_for(model)["pixel_values"][:2]
    expected = published(model, pixels, r, ahead)
    with jeton.apply(model, "mctf", r=r, ahead=ahead) as run:
        got = model(pixel_values=pixels).last_hidden_state[:, 0]
        report = run.report()
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    assert (expected - published(model, pixels, r, not ahead)).abs().max() > 1e-2  # the twin
    assert report.encoder_tokens == (50.0, *(50.0 - r * block for block in range(1, 5)))


@torch.no_grad()
def test_projections_nobody_reads_do_not_run():
    """Values of the unfused tokens, and queries and keys of the fused ones, are not computed, and the report knows."""
    model = tiny.model("ViTModel")
    seen = {name: [] for name in ("q_proj", "v_proj", "o_proj")}
    for name, lengths in seen.items():
        part = getattr(model.layers[2].attention, name)
        own = part.forward
        part.forward = lambda x, own=own, lengths=lengths: lengths.append(x.shape[1]) or own(x)
    try:
        with jeton.apply(model, "mctf", r=8) as run:
            model(**tiny.inputs_for(model))
            report = run.report()
        with jeton.apply(model, "mctf", r=8, ahead=False) as run:
            model(**tiny.inputs_for(model))
            again = run.report()
    finally:
        for name in seen:
            del getattr(model.layers[2].attention, name).forward
    assert seen == {"q_proj": [42, 42, 34], "v_proj": [34, 34], "o_proj": [34, 34]}
    assert report.flops < again.flops < report.flops_full


@torch.no_grad()
@pytest.mark.parametrize(("side", "read"), [(5, 0), (7, 4)])
def test_a_map_that_is_looked_at_is_not_computed_again(side, read, monkeypatch):
    """Maps of up to four times a head's width are drawn once, for what they tell and for attention; larger ones read in slabs."""
    model = tiny.tiny_vit(image_size=side * tiny.PATCH)
    assert model.config.hidden_size // model.config.num_attention_heads == 8
    slabs, own = [], attention.received
    monkeypatch.setattr(attention, "received", lambda *given, **more: slabs.append(1) or own(*given, **more))
    pixels = torch.randn(1, 3, *2 * [side * tiny.PATCH], generator=torch.Generator().manual_seed(0))
    expected = published(model, pixels, 2, True)
    with jeton.apply(model, "mctf", r=2):
        got = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert len(slabs) == read
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_what_later_methods_hear_does_not_depend_on_where_attention_came_from():
    """A block whose map was taken ahead still tells its own queries and keys to whoever asks."""
    model = tiny.model("ViTModel")
    inputs, heard = tiny.inputs_for(model), []
    for ahead in (True, False):
        with jeton.apply(model, f"mctf(r=6, blocks=(4,), ahead={ahead}) | fastervlm(keep=9)") as run:
            out = model(**inputs).last_hidden_state
            heard += [run.site.flat(need) for need in run.site.records]
        assert out.shape[1] == 10 and out.isfinite().all()
    assert torch.equal(*heard) and len(heard[0].unique()) > 9


@torch.no_grad()
def test_what_looking_costs_beyond_the_blocks_own_attention_is_selection():
    """Queries and keys of a look ahead are the block's own where it attends with them, and extra where it does not."""
    clock, inside = Clock(torch.device("cpu")), []
    with clock.measure("selection"), clock.measure("selection"):
        pass
    assert len(clock.marks["selection"]) == len(clock.marks["selection"][0]) == 1  # what is within a part is not counted twice
    model = tiny.model("ViTModel")
    part = model.layers[2].attention.q_proj
    for ahead in (True, False):
        with jeton.apply(model, "mctf", r=8, ahead=ahead) as run:
            part.forward = lambda x, own=part.forward, run=run: inside.append("selection" in run.clock.running) or own(x)
            model(**tiny.inputs_for(model))
            del part.forward
    assert inside == [False, True, False]
