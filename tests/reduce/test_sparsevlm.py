"""SparseVLM against its card."""

from __future__ import annotations

import pytest
import torch
from witness import spied

import tiny
from by_hand import dpc_knn as by_hand
from in_layers import Looking, eager, images
from jeton.engine import apply
from jeton.engine.raters import Raters
from jeton.method import get
from jeton.needs import TextAttention
from jeton.tokens import Tokens

CLOSE = 1e-5
LLAVA = "LlavaForConditionalGeneration"
SETTINGS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}


def entering(method, n=576, depth=32):
    """Tokens that enter each layer, from what each stage really does."""
    out, x = [], torch.randn(1, n, 2)
    for step in method.steps(n, depth):
        if step is not None:
            x = step.reduce(Tokens(x), {"attention": torch.rand(1, x.shape[1])}).apply(Tokens(x)).features
        out.append(x.shape[1])
    return out


def test_setting_192_lets_202_75_tokens_into_a_layer_on_average():
    lengths = entering(get("sparsevlm", recycle=False))
    assert lengths == [576] * 3 + [300] * 4 + [200] * 9 + [110] * 16 and sum(lengths) / 32 == 202.75
    after = lengths[1:] + lengths[-1:]  # the release's own bookkeeping, after each layer
    assert sum(after) / 32 == pytest.approx(188.2, abs=0.05)


@pytest.mark.parametrize("counts", SETTINGS.values(), ids=SETTINGS)
def test_recycled_tokens_come_on_top_of_the_published_counts(counts):
    left, n = [], 576
    for survive in counts:
        dropped = n - survive
        n = survive + ((int(dropped * 0.3) + 1) // 10 + 1)
        left.append(n)
    method = get("sparsevlm", counts=counts)
    lengths = entering(method)
    assert [lengths[3], lengths[7], lengths[16]] == left and method.promise(576, 32).count == left[-1]
    assert left[0] == 309 or counts != SETTINGS[192]


@pytest.mark.parametrize("recycle", [True, False])
@pytest.mark.parametrize("keep", [1, 2, 5, 17, 110, 500, 575, 0.1, 0.25, 0.9])
@pytest.mark.parametrize("n", [36, 144, 576])
def test_keep_counts_recycled_tokens_too_and_is_exact(n, keep, recycle):
    method = get("sparsevlm", keep=keep, recycle=recycle)
    wanted = max(1, round(keep * n)) if isinstance(keep, float) else min(n, keep)
    assert entering(method, n, 8)[-1] == wanted == method.promise(n, 8).count
    x = torch.randn(1, n, 3)
    alone = method.reduce(Tokens(x), {"attention": torch.rand(1, n)})
    merged = int((alone.size > 1).sum())
    assert alone.k == wanted and (recycle or merged == 0) and 2 * merged <= wanted


def test_counts_above_the_image_change_nothing():
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    before = tiny.run(net, inputs)
    with apply(net, "sparsevlm"):
        assert torch.equal(tiny.run(net, inputs), before)
    with apply(net, "sparsevlm", counts=(48, 47, 46)):
        assert not torch.equal(tiny.run(net, inputs), before)
    x = torch.randn(1, 110, 3)
    assert get("sparsevlm").reduce(Tokens(x), {"attention": torch.rand(1, 110)}).is_identity


def test_the_best_of_the_dropped_are_clustered_into_their_means():
    """The released steps for one stage, with a centre standing for its cluster."""
    generator = torch.Generator().manual_seed(0)
    x, score = torch.randn(150, 6, generator=generator), torch.rand(150, generator=generator)
    step = get("sparsevlm", counts=(40,), layers=(2,)).reduce(Tokens(x[None]), {"attention": score[None]})
    after = step.apply(Tokens(x[None])).features[0]
    order = sorted(range(150), key=lambda i: -score[i].item())
    survive, dropped = sorted(order[:40]), order[40:]
    recycled = sorted(dropped[: int(len(dropped) * 0.3) + 1])
    clusters = len(recycled) // 10 + 1
    centre = by_hand(x[recycled], clusters, clusters)
    groups: dict[int, list[int]] = {}
    for token, at in zip(recycled, centre, strict=True):
        groups.setdefault(recycled[at], []).append(token)
    expected = {i: x[i] for i in survive} | {i: x[members].mean(0) for i, members in groups.items()}
    assert len(groups) == clusters == 4 and len(expected) == step.k == 44
    torch.testing.assert_close(after, torch.stack([expected[i] for i in sorted(expected)]))
    assert (step.assign[0, dropped[34:]] == -1).all()
    plain = get("sparsevlm", counts=(44,), layers=(2,), recycle=False).reduce(Tokens(x[None]), {"attention": score[None]})
    assert not torch.allclose(plain.apply(Tokens(x[None])).features[0], after)


def rated(net, inputs, layer, everyone=False):
    """The score of each image's tokens, from the model's eager maps and its embeddings, one image at a time."""
    seen = {}
    handle = net.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    maps = eager(net, inputs)
    handle.remove()
    out = []
    for sample, columns in images(net, inputs):
        ids, mask = inputs["input_ids"][sample], inputs["attention_mask"][sample]
        text = [c for c in range(columns[-1] + 1, len(ids)) if ids[c] != tiny.IMAGE and mask[c]]
        embeds = seen["inputs_embeds"][sample]
        relevance = (embeds[columns] @ embeds[text].T).softmax(1).mean(0) if text else []
        raters = [c for c, r in zip(text, relevance, strict=True) if everyone or r > relevance.mean()] or text or [len(ids) - 1]
        out.append(maps[layer][sample][raters][:, columns].mean(0))
    return out


@pytest.mark.parametrize("sides", ["left", "right"])
def test_raters_score_as_by_hand_in_padded_batches_with_several_images(sides):
    net = tiny.model(LLAVA, "eager")
    inputs = tiny.inputs_for(net)
    if sides == "right":
        shift = [int((row == 0).sum()) for row in inputs["attention_mask"]]
        for name in ("input_ids", "attention_mask"):
            rows = [row.roll(-by) for row, by in zip(inputs[name], shift, strict=True)]
            inputs = {**inputs, name: torch.stack(rows)}
    look = Looking(2, attention=TextAttention())
    with apply(net, look):
        tiny.run(net, inputs)
    right, all_text = rated(net, inputs, 1), rated(net, inputs, 1, everyone=True)
    before = rated(net, inputs, 0)
    for image, score in enumerate(look.heard["attention"]):
        assert (score - right[image]).abs().max() < CLOSE
        assert (score - before[image]).abs().max() > 100 * CLOSE
        assert (score - all_text[image]).abs().max() > 100 * CLOSE


def test_raters_are_followed_when_columns_have_gone():
    """Removing tokens before the layer that is read equals masking them, so the first stage's survivors are rated the same."""
    net = tiny.model(LLAVA, "eager")
    inputs = tiny.inputs_for(net)
    look = Looking(3, attention=TextAttention())
    with apply(net, get("fastv", layer=1, keep=20) | look) as run:
        maps = eager(net, inputs)
        at, length = run.costs.flow.at, run.costs.flow.length
        weights = run_raters(net, inputs)
    for image, (sample, _) in enumerate(images(net, inputs)):
        columns = at[image] - sample * length
        raters = [length - back for back in weights[image]]
        by_hand_score = maps[2][sample][raters][:, columns].mean(0)
        assert (look.heard["attention"][image] - by_hand_score).abs().max() < CLOSE
        off = [each - 1 for each in raters]
        assert (look.heard["attention"][image] - maps[2][sample][off][:, columns].mean(0)).abs().max() > 100 * CLOSE


def run_raters(net, inputs):
    """How far from the end of its prompt each rater of an image stands; no image follows the second one's text here."""
    embeds = net.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat([f[None] for f in net.model.get_image_features(inputs["pixel_values"]).pooler_output])
    out = []
    for image, (sample, columns) in enumerate(images(net, inputs)):
        ids = inputs["input_ids"][sample]
        text = [c for c in range(columns[-1] + 1, len(ids)) if ids[c] != tiny.IMAGE]
        relevance = (features[image] @ embeds[sample][text].T).softmax(1).mean(0)
        gone = {c: sum(1 for d in range(c + 1, len(ids)) if ids[d] == tiny.IMAGE) for c in text}
        kept = {c: 20 if gone[c] else 0 for c in text}
        out.append([len(ids) - c - gone[c] + kept[c] for c, r in zip(text, relevance, strict=True) if r > relevance.mean()])
    return out


@pytest.mark.parametrize("text", [(4, 1), (4, 0), (0, 3), (4, 9)])
@pytest.mark.parametrize("equal", [False, True])
def test_there_is_always_a_rater(text, equal):
    """One word, none (the prompt's last token then rates), or many that are all alike."""
    net = tiny.model(LLAVA, "eager")
    inputs = tiny.prompts(net, [tiny.Sample(((),), text, 5)])
    if equal and text[1]:
        inputs["input_ids"][:, -text[1] :] = tiny.WORDS
    look, later = (Looking(layer, attention=TextAttention()) for layer in (1, 3))
    with apply(net, look | get("sparsevlm", keep=5) | later):
        assert tiny.run(net, inputs).isfinite().all()
    assert (look.heard["attention"].sum(1) > 0).all() and (later.heard["attention"].sum(1) > 0).all()
    assert (look.heard["attention"][0] - rated(net, inputs, 0, everyone=equal)[0]).abs().max() < CLOSE


def test_long_texts_are_rated_a_slab_at_a_time():
    net = tiny.model(LLAVA, "eager")
    inputs = tiny.prompts(net, [tiny.Sample(((),), (3, 300), 6)])
    look = Looking(1, attention=TextAttention())
    with apply(net, look):
        tiny.run(net, inputs)
    assert (look.heard["attention"][0] - rated(net, inputs, 0)[0]).abs().max() < CLOSE


def test_the_question_decides():
    net = tiny.model(LLAVA)
    first = tiny.prompts(net, tiny.one_image(net))
    second = {**first, "input_ids": first["input_ids"].clone()}
    second["input_ids"][:, -9:] = tiny.words(9, seed=77)
    maps = []
    for inputs in (first, first, second):
        with apply(net, "sparsevlm", keep=8) as run:
            tiny.run(net, inputs)
            maps.append(run.assignment(0)[0])
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])


def test_layers_follow_the_depth_and_may_be_set():
    def at(method, depth):
        return [layer for layer, step in enumerate(method.steps(576, depth)) if step]

    assert at(get("sparsevlm"), 32) == [3, 7, 16] and at(get("sparsevlm"), 4) == [1, 2, 3]
    assert at(get("sparsevlm", layers=(0, 3, 5)), 8) == [1, 4, 6]
    with pytest.raises(ValueError, match="layer 7 of 8; layers 0 to 6"):
        get("sparsevlm", layers=(0, 3, 7)).steps(100, 8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"counts": (10, 20, 5)}, "never grow"),
        ({"counts": (10, 5)}, "say with layers"),
        ({"counts": (10, 5), "layers": (1, 2, 3)}, "2 layers"),
        ({"counts": ()}, "never grow"),
    ],
)
def test_bad_fields_are_refused_with_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        get("sparsevlm", **fields)


# -- counts from the rank ------------------------------------------------------------------------------------------------


def ranked(found, **fields):
    """How many of ten tokens survive, without recycling."""
    score, tokens = torch.arange(10.0)[None], Tokens(torch.randn(1, 10, 4))
    step = get("sparsevlm", recycle=False, **fields)
    made = step.reduce(tokens, {"attention": score, "rank": torch.tensor([[found]])})
    assert made.index[0].tolist() == list(range(10 - made.k, 10))  # the best of them
    return made.k


@pytest.mark.parametrize(
    ("rank", "how", "left"),
    [
        *[(3, 1.0, 3), (3, 0.5, 7), (3, 0.0, 10), (10, 1.0, 10), (0, 1.0, 1)],  # 10 - floor(how (10 - rank))
        *[(3, (1.5, 0.0), 4), (3, (2.0, 1.0), 7), (9, (13.5, 0.0), 9), (10, (0.1, 0.0), 10)],  # floor(scale rank + bias)
    ],
)
def test_the_rank_says_how_many_survive(rank, how, left):
    assert ranked(rank, rank=how) == left


def test_rows_find_their_own_counts_and_recycle_what_is_left():
    tokens = Tokens(torch.randn(2, 80, 4))
    signals = {"attention": torch.rand(2, 80), "rank": torch.tensor([[5], [40]])}
    made = get("sparsevlm", rank=1.0).reduce(tokens, signals)
    counts = made.mask.sum(1).tolist()
    # 75 and 40 are dropped: floor(.3 d) + 1 = 23 and 13 candidates, in floor(m / 10) + 1 = 3 and 2 clusters
    assert counts == [5 + 3, 40 + 2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_rank_is_that_of_the_raters_own_attention(attention):
    """Every token behind the image rates it where all are equally relevant; then the rows are the model's own map's."""
    net = tiny.model(LLAVA, attention)
    inputs = tiny.prompts(net, tiny.one_image(net))
    spy, decided = spied(get("sparsevlm", rank=1.0, recycle=False, counts=(9,), layers=(1,)))
    seen = []
    own = Raters.attention

    def watch(self, *args, **more):
        out = own(self, *args, **more)
        seen.append((self.weight, out[2]))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Raters, "attention", watch)
        with apply(net, spy):
            tiny.run(net, inputs)
    maps = tiny.model(LLAVA, "eager")(**inputs, output_attentions=True).attentions[1].mean(1)[0]
    weight, rank = seen[0]
    visual = inputs["input_ids"][0] == tiny.IMAGE
    table = maps[weight[0] > 0][:, visual]
    assert int(rank) == int(torch.linalg.matrix_rank(table)) == min(table.shape)
    assert decided[0].k == int(rank)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 1.5}, "lie in"),
        ({"rank": (1.0,)}, "scale, bias"),
        ({"rank": "all"}, "number"),
        ({"rank": 0.5, "keep": 3}, "keep"),
    ],
)
def test_a_rank_that_means_nothing_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        get("sparsevlm", **fields)


# -- the second release --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [192, 128, 96, 64])
def test_the_settings_of_both_releases_are_presets(tokens):
    first, second = get("sparsevlm", calibration=str(tokens)), get("sparsevlm", calibration=f"{tokens}+")
    assert first.counts == SETTINGS[tokens] and first.recycle and not first.unbiased and first.heads is None
    assert (second.unbiased, second.heads, second.recycle, second.rank) == (True, 14, False, None)
    lengths = entering(second)
    assert (lengths[3], lengths[7], lengths[16]) == second.counts


def test_setting_192_of_the_second_release_ends_with_118():
    lengths = entering(get("sparsevlm", calibration="192+"))
    assert lengths == [576] * 3 + [300] * 4 + [200] * 9 + [118] * 16 and sum(lengths) / 32 == 206.75


def heads_of(net, inputs, layer):
    """(B, H, L, L) attention of a layer and (B, L, L) the mean cosine of each two positions' distance."""
    found = []
    module = net.model.language_model.layers[layer].self_attn
    handle = module.register_forward_hook(lambda module, args, output: found.append(output[1].float()))
    tiny.run(net, inputs)
    handle.remove()
    ids = tiny.positions(net, inputs).float()
    frequencies = net.model.language_model.rotary_emb.inv_freq
    distance = (ids[:, :, None] - ids[:, None])[..., None] * frequencies
    return found[0], distance.cos().mean(-1).clamp(min=0.01)


@pytest.mark.parametrize("strongest", [None, 2, 14])
def test_attention_is_freed_from_its_positions_and_the_heads_that_look_at_the_image_are_averaged(strongest):
    """By hand, in a padded batch with several images: the map of every head, divided by the cosines of the distances."""
    net = tiny.model(LLAVA, "eager")
    inputs = tiny.inputs_for(net)
    needs = {"free": TextAttention(unbiased=True, strongest=strongest), "bound": TextAttention(strongest=strongest)}
    look, plain = Looking(2, **needs), Looking(2, plain=TextAttention())
    maps, bias = heads_of(net, inputs, 1)
    assert bias.min() < 0.5 and maps.shape[1] == 4
    with apply(net, look | plain) as run:
        embeds = []
        handle = net.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        tiny.run(net, inputs)
        handle.remove()
        weight = Raters.choose(run.costs.flow, embeds[0], inputs["attention_mask"]).weight
    chosen = []
    for name, table in (("free", maps / bias[:, None]), ("bound", maps)):
        for image, (sample, columns) in enumerate(images(net, inputs)):
            raters = weight[image].nonzero().flatten().tolist()
            rows = table[sample][:, raters][:, :, columns]  # (H, raters, N)
            order = rows.sum((1, 2)).argsort(descending=True)[:strongest]
            chosen.append(order.tolist())
            by_hand_score = rows[order].mean((0, 1))
            assert (look.heard[name][image] - by_hand_score).abs().max() < CLOSE
    different = (look.heard["free"] - look.heard["bound"]).abs().max() > 100 * CLOSE
    assert different and (strongest != 2 or (look.heard["bound"] - plain.heard["plain"]).abs().max() > 100 * CLOSE)
    assert strongest != 2 or len(set(map(tuple, chosen))) > 1  # images have heads of their own


def test_nothing_is_divided_by_what_a_cached_prompt_left_behind():
    """A second picture in a second turn: the keys in front of it were cached, positions go on."""
    net = tiny.model(LLAVA)
    first, second = (tiny.prompts(net, [tiny.Sample(((),), (3, 5), seed)]) for seed in (5, 6))
    look = Looking(2, free=TextAttention(unbiased=True, strongest=2))
    with apply(net, look), torch.no_grad():
        cache = net(**first).past_key_values
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        net(**{**second, "attention_mask": mask}, past_key_values=cache)
        turns = look.heard["free"]
        both = {name: torch.cat([first[name], second[name]], 0 if name == "pixel_values" else 1) for name in first}
        net(**both)
    assert (turns[0] - look.heard["free"][1]).abs().max() < CLOSE


def test_the_second_release_runs_where_positions_have_three_axes():
    net = tiny.model("Qwen2_5_VLForConditionalGeneration")
    inputs = tiny.inputs_for(net)
    outputs = []
    for fields in ({}, {"unbiased": False, "heads": None}):
        with apply(net, get("sparsevlm", calibration="192+", **{"counts": (5, 3, 2), **fields})) as run:
            outputs.append(tiny.run(net, inputs))
            assert {image.after for image in run.report().images} == {2}
    assert outputs[0].isfinite().all() and not torch.equal(*outputs)


@pytest.mark.parametrize("heads", [0, -1, True, 1.5])
def test_heads_must_be_a_number_of_heads(heads):
    with pytest.raises(ValueError, match="whole number of heads"):
        get("sparsevlm", heads=heads)
