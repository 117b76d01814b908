"""VisionDrop against its card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from witness import spied

import tiny
from in_layers import Looking, eager, images
from jeton.engine import apply
from jeton.method import get
from jeton.needs import LayerKeys, VisualAttention
from jeton.ops.anchors import share
from jeton.tokens import Tokens

CLOSE = 1e-5
LLAVA, NEXT = "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"


def contextual(part, total):
    """How many of its tokens a selection gathers the others around."""
    if isinstance(part.contextual, int):
        return part.contextual
    return int(share(torch.tensor([[total]]), *part.contextual))


def published(method, n=576, depth=32):
    """Total and contextual tokens that the encoder and each stage leave, and the tokens that enter each layer."""
    encoder = method.parts()[0]
    x = torch.randn(1, n + 1, 4)
    now = encoder.reduce(Tokens(x, prefix=1), {"attention": torch.rand(1, n + 1), "keys": x}).k
    pairs, lengths = [(now, contextual(encoder, now))], []
    for step in method.steps(n, depth):
        if step is not None:
            x = torch.randn(1, now, 4)
            reduction = step.reduce(Tokens(x), {"attention": torch.rand(1, now), "keys": x})
            pairs.append((reduction.k, contextual(step, reduction.k)))
            now = reduction.k
        lengths.append(now)
    return pairs, lengths


@pytest.mark.parametrize("fields", [{}, {"counts": ((42, 6), (30, 5), (22, 4), (16, 3)), "layers": (8, 16, 24)}])
def test_the_papers_schedule_averages_32_tokens(fields):
    method = get("visiondrop", **fields)
    pairs, lengths = published(method)
    assert pairs == [(48, 6), (35, 5), (26, 4), (19, 3)]
    assert lengths == [48] * 8 + [35] * 8 + [26] * 8 + [19] * 8 and sum(lengths) / 32 == 32.0
    assert sum(published(get("visiondrop", keep=20))[1]) / 32 != 32.0


@pytest.mark.parametrize("keep", [1, 7, 19, 100, 400, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("n", [16, 49, 576])
def test_counts_are_exact_in_every_stage_and_small_images_keep_all(keep, n):
    method = get("visiondrop", keep=keep)
    encoder, layered = method.parts()
    x = torch.randn(1, n, 4)
    tokens, wanted = Tokens(x), min(n, encoder.last) if isinstance(encoder.last, int) else round(encoder.last * n)
    signals = {"attention": torch.rand(1, n), "keys": x}
    step = encoder.reduce(tokens, signals)
    assert step.k == max(1, wanted)
    for stage in [each for each in layered.steps(step.k, 12) if each]:
        tokens = step.apply(tokens)
        step = stage.reduce(tokens, {"attention": torch.rand(1, len(tokens)), "keys": tokens.features})
        assert step.k == min(len(tokens), stage.keep) and (step.k < len(tokens) or step.is_identity)
    assert step.k == method.promise(n).count
    assert step.k == min(n, keep) if isinstance(keep, int) else abs(step.k - max(1, keep * n)) < 1


def naive(x, score, keys, dominant, contextual):
    """The released steps between two layers."""
    top = sorted(range(len(x)), key=lambda i: (-score[i].item(), i))[:dominant]
    rest = [i for i in range(len(x)) if i not in top]
    stride = max(1, len(rest) // contextual)
    anchors = rest[::stride][:contextual]
    k = keys / keys.norm(dim=-1, keepdim=True)
    out = {i: x[i].clone() for i in top}
    given = {i: [] for i in anchors}
    for i in rest:
        if i not in anchors:
            given[max(anchors, key=lambda a, i=i: k[i] @ k[a])].append(x[i])
    for i in anchors:
        out[i] = x[i] + (torch.stack(given[i]).mean(0) if given[i] else 0)
    return torch.stack([out[i] for i in sorted(out)])


def test_a_stage_equals_the_released_steps():
    generator = torch.Generator().manual_seed(0)
    x, keys = torch.randn(2, 48, 5, generator=generator), torch.randn(2, 48, 4, generator=generator)
    score = torch.rand(2, 48, generator=generator)
    stage = next(step for step in get("visiondrop").steps(576, 32) if step)
    after = stage.reduce(Tokens(x), {"attention": score, "keys": keys}).apply(Tokens(x))
    for b in range(2):
        torch.testing.assert_close(after.features[b], naive(x[b], score[b], keys[b], 30, 5))
    assert not torch.allclose(after.features[0], naive(x[0], score[0], keys[0], 31, 4)[:35])


@pytest.mark.parametrize(("name", "early"), [(LLAVA, None), (LLAVA, "fastv(layer=1, keep=30)"), (NEXT, None)])
def test_visual_attention_computed_ahead_is_that_of_the_eager_layer(name, early):
    """Of images of different sizes too."""
    net = tiny.model(name, "eager")
    inputs = tiny.inputs_for(net)
    look = Looking(2, attention=VisualAttention(), keys=LayerKeys())
    with apply(net, look if early is None else get(early) | look) as run:
        maps = eager(net, inputs)
        at, length = run.costs.flow.at, run.costs.flow.length
    for image, (sample, _) in enumerate(images(net, inputs)):
        columns = at[image][at[image] < len(maps[2]) * length] - sample * length
        own, before = (maps[layer][sample][columns][:, columns].mean(0) for layer in (2, 1))
        heard = look.heard["attention"][image, : len(columns)]
        assert (heard - own).abs().max() < CLOSE
        assert (heard - before).abs().max() > 100 * CLOSE  # the twin: the layer before
        everyone = maps[2][sample][:, columns].mean(0)  # the twin: all queries, text too
        assert (heard - everyone).abs().max() > 100 * CLOSE


def decisions(net, inputs, method):
    spy, decided = spied(method)
    with apply(net, spy):
        tiny.run(net, inputs)
    return decided


def test_the_question_does_not_change_what_is_kept():
    """With the image before the question, at every stage; the twin asks the text."""
    net = tiny.model(LLAVA)
    first = tiny.prompts(net, tiny.one_image(net))
    second = {**first, "input_ids": first["input_ids"].clone()}
    second["input_ids"][:, -9:] = tiny.words(9, seed=77)
    assert not torch.equal(first["input_ids"], second["input_ids"])
    a, b = (decisions(net, inputs, get("visiondrop", keep=8)) for inputs in (first, second))
    assert [step.k for step in a] == [20, 15, 11, 8]
    assert all(torch.equal(x.index, y.index) and torch.equal(x.assign, y.assign) for x, y in zip(a, b, strict=True))
    a, b = (decisions(net, inputs, get("pyramiddrop", keep=8)) for inputs in (first, second))
    assert not all(torch.equal(x.index, y.index) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("fields", "zip_fields"),
    [
        ({"keep": 12}, {"keep": 12}),
        ({"keep": 0.3}, {"keep": 0.3}),
        ({"counts": ((9, 4),)}, {"keep": 13, "dominant": 9, "contextual": 4}),
    ],
)
@pytest.mark.parametrize("name", [LLAVA, "LlavaNextForConditionalGeneration"])
def test_without_layers_it_is_visionzip(name, fields, zip_fields):
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    outputs = []
    for method in (get("visiondrop", layers=(), **fields), get("visionzip", **zip_fields), get("visiondrop", keep=12)):
        with apply(net, method):
            outputs.append(tiny.run(net, inputs)[:, -1])
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_early_tokens_are_seen_by_more_queries_and_debias_takes_that_back():
    """Causal attention, every query spread evenly over what it sees: without correction the first tokens win."""
    n = 12
    spread = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    seen_by = torch.arange(n, 0, -1)
    flat = (spread > 0).float().mean(0)  # every query gives one to each token it sees
    assert torch.equal(flat * n, seen_by.float())
    stage = next(step for step in get("visiondrop", counts=((8, 4), (4, 0)), layers=(1,)).steps(n, 4) if step)
    score = flat[None] + 0.001 * torch.arange(n)
    x = torch.randn(1, n, 3)
    assert stage.reduce(Tokens(x), {"attention": score, "keys": x}).index.tolist() == [[0, 1, 2, 3]]
    fair = replace(stage, debias=True).reduce(Tokens(x), {"attention": score, "keys": x})
    assert fair.index.tolist() == [[8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"counts": ((42, 6), (30, 5))}, "should have 4 pairs"),
        ({"counts": (42,), "layers": ()}, "pairs of dominant"),
        ({"counts": ((9, 1), (9, 2)), "layers": (1,)}, "grows"),
        ({"score": "text"}, "score must be"),
        ({"layers": (2, 2)}, "ascending"),
    ],
)
def test_bad_fields_are_refused_with_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        get("visiondrop", **fields)


def test_a_budget_above_every_image_is_refused_in_its_own_name():
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    with apply(net, "visiondrop", keep=30):  # 76 in the encoder, which has 49: all of them
        tiny.run(net, inputs)
    for fields in ({}, {"layers": ()}):
        with apply(net, "visiondrop", keep=50, **fields), pytest.raises(ValueError, match="visiondrop was asked to keep 50"):
            tiny.run(net, inputs)


def test_the_report_names_both_sites():
    net = tiny.model(LLAVA)
    with apply(net, "visiondrop", keep=8) as run:
        tiny.run(net, tiny.inputs_for(net))
    report = run.report()
    found = [(site.site, site.method, site.after) for site in report.sites]
    assert found == [("encoder", "visiondrop", 20), ("layer", "visiondrop", 8)]
    assert report.method == "visiondrop(keep=8)"
