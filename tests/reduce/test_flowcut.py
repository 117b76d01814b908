"""FlowCut against its card."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import jeton
import tiny
from jeton.engine import apply
from jeton.method import get
from jeton.reduce.flowcut import FlowCut
from jeton.tokens import Tokens

CLIP, SIGLIP, NEXT, QWEN = (
    "CLIPVisionModel",
    "SiglipVisionModel",
    "LlavaNextForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
)


def parts_of(net: torch.nn.Module, inputs: tiny.Inputs, kind: str) -> list[dict[str, Tensor]]:
    """a, c and u of every block, from the eager model's own maps and projections."""
    maps: list[Tensor] = []
    values: list[Tensor] = []
    layers = net.vision_model.encoder.layers if hasattr(net, "vision_model") else net.encoder.layers
    handles = [layer.self_attn.register_forward_hook(lambda m, a, out: maps.append(out[1])) for layer in layers]
    handles += [layer.self_attn.v_proj.register_forward_hook(lambda m, a, out: values.append(out)) for layer in layers]
    tiny.run(net, inputs)
    for handle in handles:
        handle.remove()
    found = []
    for weights, v in zip(maps, values, strict=True):
        v = v.unflatten(-1, (4, -1)).transpose(1, 2)
        a = weights[:, :, 0, 1:].mean(1)
        c = (v[:, :, :1] @ v.mT).softmax(-1)[:, :, 0, 1:].mean(1)
        a, c = (x / x.sum(1, keepdim=True) for x in (a, c))
        found.append({"a": a, "c": c, "u": v.mean(1).abs().sum(-1)[:, 1:]})
    return found


@torch.no_grad()
def test_the_first_cut_is_by_the_cards_score():
    """Of 5 blocks the first has three to go (R = 3), the second R = 2: there S = (s0 + s1) / 2 cuts the cards' count."""
    eager = tiny.model(CLIP, "eager")
    inputs = tiny.inputs_for(eager)
    parts = parts_of(eager, inputs, "class")
    s0, s1 = ((part["a"] + part["c"]) * part["u"] for part in parts[:2])
    a = parts[1]["a"]
    entropy = -(a * a.log()).sum(1) / torch.log(torch.tensor(49.0))
    left = [49 - round(float((49 - 12) / 2**0.5 * (1 - h * h))) for h in entropy]
    net = tiny.model(CLIP)
    with apply(net, "flowcut", keep=12) as run:
        tiny.run(net, inputs)
        block, step = run.site.history[0]
    assert block == 1
    for row in range(3):
        kept = step.index[row][step.real[row]] - 1
        best = (0.5 * s0 + 0.5 * s1)[row].topk(left[row]).indices.sort().values
        assert kept[1:].tolist() == best.tolist()
        assert kept[1:].tolist() != s1[row].topk(left[row]).indices.sort().values.tolist() or left[row] == 49


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 7, 30, 0.3])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_counts_never_grow_and_end_exactly_at_the_last_cut(keep: int | float, scale: float):
    net = tiny.model(CLIP)
    inputs = tiny.inputs_for(net)
    inputs["pixel_values"] = scale * inputs["pixel_values"]
    with apply(net, "flowcut", keep=keep) as run:
        tiny.run(net, inputs)
        counts = torch.stack([step.count() - 1 for _, step in run.site.history])
        final, length = run.site.history[-1][0], run.tokens.features.shape[1]
    target = get("flowcut", keep=keep).promise(49, 5).count
    assert (counts.diff(dim=0) <= 0).all() and (counts >= target).all()
    assert final == 3 and (counts[-1] == target).all() and length == target + 1


def test_the_published_blocks_of_a_tower_of_24():
    """LLaVA uses 23 of 24: something goes behind blocks 1, 3, ..., 21, where R is even, and R counts down from 21."""
    steps = get("flowcut", keep=64).steps(576, 23)
    cutting = [block for block, step in enumerate(steps) if step is not None and step.remaining is not None]
    assert cutting == list(range(1, 22, 2)) and [steps[block].remaining for block in (1, 21)] == [20, 0]
    assert steps[22] is None and all(step is not None for step in steps[:22])


@torch.no_grad()
def test_keeping_all_gives_the_encoders_own_features_and_indices_are_those_of_the_grid():
    net = tiny.model(CLIP)
    inputs = tiny.inputs_for(net)
    before = tiny.run(net, inputs)
    with apply(net, "flowcut", keep=49):
        assert torch.equal(tiny.run(net, inputs), before)
    with apply(net, "flowcut", keep=20) as run:
        tiny.run(net, inputs)
        ramp = torch.arange(50).expand(3, -1).gather(1, run.tokens.origin)
    assert (ramp.diff(dim=1) > 0).all() and len(set(map(tuple, ramp.tolist()))) > 1


def signals(batch: int, n: int, prefix: int = 1) -> tuple[Tokens, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    rows = torch.rand(batch, 2, n + prefix, generator=generator)
    rows[1, :, prefix] = 40.0  # the second picture has one token that gets nearly everything
    values = torch.randn(batch, n + prefix, 4, generator=generator)
    return Tokens(torch.randn(batch, n + prefix, 4), prefix=prefix), {
        "attention": rows,
        "similarity": rows.flip(2),
        "values": values,
    }


def test_pictures_cut_for_themselves_and_under_parity_as_much_as_the_one_that_cuts_most():
    tokens, heard = signals(2, 40)
    own, same = (get("flowcut", keep=8, parity=parity).steps(40, 6)[2].reduce(tokens, heard) for parity in (False, True))
    counts = (own.count() - 1).tolist()
    assert counts[1] < counts[0] - 5
    assert (same.count() - 1).tolist() == [counts[1]] * 2 and same.mask is None


def test_the_running_score_is_handed_on_in_step_with_the_tokens():
    tokens, heard = signals(2, 12)
    first = get("flowcut", keep=4).steps(12, 5)
    grown = first[0].reduce(tokens, heard)
    assert grown.is_identity and grown.score is not None
    after = grown.apply(tokens)
    cut = first[1].reduce(after, heard)
    assert torch.equal(cut.score, grown.score.gather(1, cut.index)) and not cut.is_identity
    torch.testing.assert_close(cut.apply(after).score, cut.score)


# -- encoders without a class token, packed ones, and the second cut -----------------------------------------------------------


@torch.no_grad()
def test_without_a_class_token_the_mean_query_takes_its_place():
    net = tiny.model(SIGLIP)
    inputs = tiny.inputs_for(net)
    states = net(**inputs, output_hidden_states=True).hidden_states
    with apply(net, "flowcut", keep=1, score="received", every=1, momentum=1.0) as run:
        tiny.run(net, inputs)
        block, step = run.site.history[0]  # the first block where anything goes
    layer = (net.vision_model if hasattr(net, "vision_model") else net).encoder.layers[block]
    x = layer.layer_norm1(states[block])
    q, k, v = (getattr(layer.self_attn, f"{name}_proj")(x).unflatten(-1, (4, -1)).transpose(1, 2) for name in "qkv")
    a = (q.mean(2, keepdim=True) @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0]
    score = a * v.mean(1).abs().sum(-1)
    assert block < 3 and int(step.count().min()) < 49
    for row in range(3):
        kept = step.index[row][step.real[row]]
        assert kept.tolist() == score[row].topk(len(kept)).indices.sort().values.tolist()


@torch.no_grad()
@pytest.mark.parametrize("keep", [5, 0.3])
def test_out_of_qwens_merger_come_exactly_the_tokens_asked_for(keep: int | float):
    net = tiny.model(QWEN)
    inputs = tiny.inputs_for(net)
    with pytest.raises(jeton.Unsupported, match=r"flowcut.*Qwen2_5_VL.*use "):
        apply(net, "flowcut", keep=keep, score="received")
    with apply(net, "flowcut", keep=keep, score="received", where="output") as run:
        tiny.run(net, inputs)
        left = [(image.before, image.after) for image in run.report().images]
    assert all(after == get("flowcut", keep=keep).promise(before).count for before, after in left)


class Caught:
    """What the second cut saw and decided."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from jeton.reduce import flowcut

        self.seen: list[tuple[Tokens, dict[str, Tensor], Any]] = []
        own = flowcut._Second.reduce

        def reduce(method: Any, tokens: Tokens, signals: Any = None) -> Any:
            made = own(method, tokens, signals)
            self.seen.append((tokens, signals, made))
            return made

        monkeypatch.setattr(flowcut._Second, "reduce", reduce)


@torch.no_grad()
@pytest.mark.parametrize(("model", "keep", "left"), [("LlavaForConditionalGeneration", 0.1, 5), (NEXT, 16, 16)])
def test_the_second_cut_is_by_the_last_token_over_the_visual_tokens_alone(
    model: str, keep: int | float, left: int, monkeypatch: pytest.MonkeyPatch
):
    net = tiny.model(model)
    caught = Caught(monkeypatch)
    inputs = tiny.prompts(net)
    states: dict[str, Tensor] = {}
    attention = net.model.language_model.layers[1].self_attn
    handles = [
        getattr(attention, f"{name}_proj").register_forward_hook(lambda m, a, out, name=name: states.update({name: out}))
        for name in "qkv"
    ]
    rotary: dict[str, Any] = {}
    handles.append(attention.register_forward_pre_hook(lambda m, a, kw: rotary.update(kw), with_kwargs=True))
    with apply(net, "flowcut", keep=keep, layer=1) as run:
        tiny.run(net, {**inputs, "position_ids": tiny.positions(net, inputs)})
        report, layout = run.report(), run.layout
        entered = report.layer_tokens
    for handle in handles:
        handle.remove()
    assert all(image.after == left for image in report.images)
    assert entered[1] > entered[2] == entered[3]
    # by hand: a token's column is the one that has its values
    tokens, signals, made = caught.seen[0]
    turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    q, k, v = (states[name].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for name in "qkv")
    q, k = turn(q, k, *rotary["position_embeddings"])
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    for image, sample in enumerate(layout.sample[:2]):
        slots = tokens.real[image].nonzero().flatten()
        at = torch.tensor([_column(v[sample], signals["values"][image, slot]) for slot in slots])
        scale = attention.head_dim**-0.5
        a = (q[sample, :, -1:] @ k[sample][:, at].mT * scale).softmax(-1).mean((0, 1))
        c = (v[sample, :, -1:] @ v[sample][:, at].mT * scale).softmax(-1).mean((0, 1))
        score = (a + c) * v[sample][:, at].mean(0).abs().sum(-1)
        kept = made.index[image][made.real[image]]
        assert kept.tolist() == slots[score.topk(left).indices.sort().values].tolist()
        assert kept.tolist() != slots[a.topk(left).indices.sort().values].tolist()


def _column(values: Tensor, mean: Tensor) -> int:
    """The column whose values (H, L, d), averaged over heads, are these."""
    return int((values.mean(0) - mean).abs().amax(-1).argmin())


@torch.no_grad()
def test_any_resolution_crops_keep_half_the_budget_each_and_lose_their_newlines():
    net = tiny.model(NEXT)
    inputs = tiny.prompts(net)
    with apply(net, "flowcut", keep=20, layer=1) as run:
        tiny.run(net, inputs)
        assert (run.reduction.count() - 1 == 10).all()
        assert run.layout.album.structure[0] > 0  # there are newlines, and none is counted any more
        assert all(image.after == 20 for image in run.report().images)
    first, second = FlowCut(keep=0.1, layer=1).parts()
    assert first.promise(576).count == 144 and second.promise(5 * 144).count == 288  # a tenth of five times 576


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": 0}, "every"),
        ({"momentum": 0.0}, "momentum"),
        ({"where": "door"}, "where"),
        ({"score": "mean"}, "score"),
        ({"layer": -1}, "layers"),
        ({"layer": 1, "where": "output"}, "nothing to cut"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        get("flowcut", **fields)


def test_a_layer_that_does_not_exist_is_refused():
    net = tiny.model("LlavaForConditionalGeneration")
    with pytest.raises(ValueError, match="layer 3 of 4; layers 0 to 2"):
        apply(net, "flowcut", keep=8, layer=3).remove()
