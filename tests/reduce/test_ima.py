"""IMA against its card: what skipping does to the output, to the cache and to the bill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BESIDE, LANGUAGE, LLAVA, LLAVA_NEXT
from references import CLOSE, TIGHT, difference, generated, view_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from witness import snapshot

import jeton
import tiny
from jeton.engine import apply, watch
from jeton.method import get, methods, reducers
from jeton.models import adapt

SKIPS = ["block", "ffn", "attention", "parallel"]


def by_hand(net: nn.Module, layer: int, part: str, who: Any) -> Any:
    """A forward of one layer, written out: tokens where who (B, L) run in part only."""
    module = view_of(net).layers[layer]
    own = type(module).forward

    def forward(hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        x = hidden_states
        plain = own(module, x, **given)
        cache = given.pop("past_key_values", None)
        n = module.input_layernorm(x)
        if cache is not None:  # the plain forward has written this layer's keys and values
            raise AssertionError("the reference runs without a cache")
        attended = x + module.self_attn(hidden_states=n, **given)[0]
        ways = {
            "block": x,
            "ffn": attended,
            "attention": x + module.mlp(module.post_attention_layernorm(x)),
            "parallel": attended + module.mlp(n),
        }
        chosen = torch.ones(x.shape[:2], dtype=torch.bool) if who is True else who
        return torch.where(chosen[..., None], ways[part], plain)

    return forward


def altered(net: nn.Module, inputs: tiny.Inputs, layer: int, part: str, who: Any) -> torch.Tensor:
    module = view_of(net).layers[layer]
    module.forward = by_hand(net, layer, part, who)
    try:
        return tiny.run(net, {**inputs, "position_ids": tiny.positions(net, inputs)}, use_cache=False)
    finally:
        del module.forward


def only(layer: int, part: str, scope: str) -> Any:
    return get("ima", skip=part, scope=scope, start=layer - 1, end=layer + 1)


def test_it_is_a_method_but_reduces_nothing():
    assert "ima" in {card.id for card in methods()} and "ima" not in {card.id for card in reducers()}
    assert get("ima(skip='ffn', interval=4)") == get("ima", skip="ffn", interval=4)


def test_layers_strictly_between_start_and_end_that_the_interval_divides():
    assert list(get("ima", end=31).rules(32)) == list(range(1, 31)) == list(get("ima").rules(32))
    assert list(get("ima", interval=4).rules(32)) == [4, 8, 12, 16, 20, 24, 28]
    assert list(get("ima", interval=3, start=5, end=12).rules(32)) == [6, 9] and not get("ima", interval=40).rules(32)


@pytest.mark.parametrize("fields", [{"skip": "mlp"}, {"scope": "all"}, {"interval": 0}, {"start": 3, "end": 3}])
def test_bad_fields_are_refused_with_a_sentence(fields):
    with pytest.raises(ValueError):
        get("ima", **fields)
    with pytest.raises(TypeError):
        get("ima", interval=1.5)


@pytest.mark.parametrize("scope", ["decode", "context"])
@pytest.mark.parametrize("skip", SKIPS)
def test_an_interval_above_the_depth_changes_no_bit(skip, scope):
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    plain = generated(net, inputs, max_new_tokens=4)
    with apply(net, "ima", skip=skip, scope=scope, interval=9):
        same = generated(net, inputs, max_new_tokens=4)
    with apply(net, "ima", skip=skip, scope=scope, interval=1):
        other = generated(net, inputs, max_new_tokens=4)
    stacked = [torch.stack(each.logits, 1) for each in (plain, same, other)]
    assert torch.equal(stacked[0], stacked[1]) and difference(stacked[2], stacked[0]) > 100 * CLOSE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("skip", SKIPS)
def test_each_way_to_skip_is_the_layer_written_out(skip, attention):
    net = tiny.model(LLAVA, attention)
    inputs = tiny.inputs_for(net)
    visual = inputs["input_ids"] == tiny.IMAGE
    ids = {"position_ids": tiny.positions(net, inputs)}
    real = inputs["attention_mask"].bool()
    for scope, who in (("context", True), ("only_context", True), ("visual", visual)):
        with apply(net, only(2, skip, scope)):
            logits = tiny.run(net, {**inputs, **ids})
        assert difference(logits[real], altered(net, inputs, 2, skip, who)[real]) < TIGHT
        twin = altered(net, inputs, 1, skip, who)
        assert difference(logits[real], twin[real]) > 100 * TIGHT
    with apply(net, only(2, skip, "decode")):
        assert torch.equal(tiny.run(net, {**inputs, **ids}), tiny.run(net, {**inputs, **ids}))


@pytest.mark.parametrize("name", LANGUAGE)
def test_skipping_a_block_for_all_is_the_model_without_the_layer(name):
    """Prompt and decoding; and the caches of all layers stay aligned."""
    net, deleted = tiny.model(name), tiny.BUILDERS[name]()
    if name in BESIDE:
        with pytest.raises(jeton.Unsupported, match="fastv"):
            apply(net, only(2, "block", "context")).remove()
        return
    layers, config = adapt(deleted).decoder.layers, adapt(deleted).decoder.config
    del layers[2]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2] + config.layer_types[3:]
    inputs = tiny.inputs_for(net)
    with apply(net, only(2, "block", "context")):
        output = generated(net, inputs, max_new_tokens=8)
    reference = generated(deleted, inputs, max_new_tokens=8)
    assert torch.equal(output.sequences, reference.sequences)
    assert difference(torch.stack(output.logits, 1), torch.stack(reference.logits, 1)) < CLOSE
    assert len({layer.get_seq_length() for layer in output.past_key_values.layers}) == 1


@pytest.mark.parametrize("skip", SKIPS)
def test_a_conversation_goes_on_without_the_method(skip):
    """Every layer's cache holds every column: the next step of the plain model is that of a prompt with the same hidden
    states."""
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    ids = tiny.positions(net, inputs)
    longer = tiny.extended(inputs, torch.full((3, 1), 20))
    with torch.no_grad():
        with apply(net, only(2, skip, "only_context")):
            cache = net(**inputs, position_ids=ids, use_cache=True).past_key_values
            lengths = {layer.keys.shape[2] for layer in cache.layers}
        later = net(
            input_ids=torch.full((3, 1), 20),
            attention_mask=longer["attention_mask"],
            position_ids=tiny.positions(net, longer)[:, -1:],
            past_key_values=cache,
        ).logits[:, -1]
    who = torch.ones(3, longer["input_ids"].shape[1], dtype=torch.bool)
    who[:, -1] = False
    assert lengths == {inputs["input_ids"].shape[1]}
    assert difference(later, altered(net, longer, 2, skip, who)[:, -1]) < CLOSE


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("scope", ["decode", "context", "only_context", "visual"])
def test_decoding_with_a_cache_equals_the_layers_written_out(skip, scope):
    """Sixteen steps, a padded batch; the reference knows without a cache which tokens are the answer's."""
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    with apply(net, only(2, skip, scope)):
        output = generated(net, inputs)
    new, logits = output.sequences[:, -16:], torch.stack(output.logits, 1)
    longer = tiny.extended(inputs, new[:, :-1])
    answer = torch.zeros_like(longer["input_ids"], dtype=torch.bool)
    answer[:, inputs["input_ids"].shape[1] :] = True
    who = {"decode": answer, "context": True, "only_context": ~answer, "visual": longer["input_ids"] == tiny.IMAGE}[scope]
    right = altered(net, longer, 2, skip, who)[:, -16:]
    assert difference(logits, right) < CLOSE and torch.equal(right.argmax(-1), new)


def test_it_composes_with_methods_that_reduce():
    """Visual tokens are those that are left at the layer, wherever they stand now."""
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    chain = "divprune(keep=20) | fastv(layer=2, keep=9)"
    outputs = []
    for rule in (" | ima(skip='ffn', scope='visual')", " | ima(skip='ffn', scope='visual', interval=9)"):
        with apply(net, chain + rule) as run:
            outputs.append(tiny.run(net, inputs))
            report = run.report()
            assert [image.after for image in report.images] == [9] * 4
    with apply(net, chain):
        assert torch.equal(outputs[1], tiny.run(net, inputs))
    assert difference(outputs[0], outputs[1]) > 100 * CLOSE
    with pytest.raises(ValueError, match="the same way"):
        apply(net, "ima(skip='ffn') | ima(skip='block')")


def test_visual_tokens_are_found_anew_where_only_a_shorter_prompt_lost_some():
    """The batch is as long as before, but its columns are not where they were."""
    net = tiny.model(LLAVA_NEXT)
    long, short = tiny.Sample(((16, 70),), (1, 70), 3), tiny.Sample(((40, 46),), (4, 9), 1)
    both, alone = tiny.prompts(net, [long, short]), tiny.prompts(net, [short])
    visual = (both["input_ids"] == tiny.IMAGE).sum(1).tolist()
    assert visual[0] < visual[1] and both["attention_mask"][1].sum() < both["attention_mask"][0].sum()
    with apply(net, f"fastv(layer=2, keep={visual[0]}) | ima(skip='block', scope='visual')", newlines="pool") as run:
        rows = [tiny.run(net, inputs)[-1, -1] for inputs in (both, alone)]
        assert [image.after for image in run.report().images] == visual[:1]
    assert difference(*rows) < CLOSE


@pytest.mark.parametrize("scope", ["context", "visual"])
@pytest.mark.parametrize("skip", SKIPS)
def test_the_report_counts_what_ran(skip, scope):
    net = tiny.model(LLAVA, "eager")
    inputs = tiny.inputs_for(net)
    with watch(net) as run:
        tiny.run(net, inputs)
        full = run.report().flops
    with apply(net, "ima", skip=skip, scope=scope) as run, FlopCounterMode(display=False) as counter:
        tiny.run(net, inputs)
        report = run.report()
    counted = sum(
        sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.split(".")[-1] == "multi_modal_projector" or (name.split(".")[-1].isdigit() and name.split(".")[-2] == "layers")
    )
    assert report.flops_full == full and counted == pytest.approx(report.flops, rel=1e-6)
    saves = skip != "parallel" and not (skip == "attention" and scope == "visual")
    assert (report.flops < full) == saves and report.applied


def test_encoders_are_refused_and_nothing_remains():
    with pytest.raises(jeton.Unsupported, match="without a language model"):
        apply(tiny.model("CLIPVisionModel"), "ima")
    net = tiny.model(LLAVA)
    before = snapshot(net)
    with apply(net, "ima", skip="block", scope="context"):
        tiny.run(net, tiny.inputs_for(net))
        assert snapshot(net) != before
    assert snapshot(net) == before
