"""Keeping everything leaves the output bitwise the same, also while methods listen to attention."""

from __future__ import annotations

import pytest
import torch
from cases import ENCODER_CASES, EVERY, LANGUAGE, MAPS, REDUCIBLE, Case, both_attentions, each, view
from witness import Listening

import tiny
from jeton.engine import apply, watch
from jeton.method import Method
from jeton.models import VisionLanguage
from jeton.needs import ClassAttention, Keys, LastAttention, Need, ReceivedAttention


@both_attentions
@each(EVERY)
def test_keeping_everything_changes_no_bit(case: Case, attention: str) -> None:
    net = case.net(attention)
    inputs = tiny.inputs_for(net)
    before = tiny.run(net, inputs)
    with apply(net, case.made(keep=1.0), newlines="keep"):
        during = tiny.run(net, inputs)
    real = tiny.real(net, inputs)
    if case.made().prefix_tokens and case in ENCODER_CASES:
        # class tokens are part of what such a method decides on: with all patches kept they may go
        before, real = (x[:, before.shape[1] - during.shape[1] :] for x in (before, real))
    assert torch.equal(before[real], during[real])


@both_attentions
@pytest.mark.parametrize("name", [name for name in REDUCIBLE if name not in MAPS])
def test_listening_to_all_signals_changes_no_bit(name: str, attention: str) -> None:
    net, seen = tiny.model(name, attention), view(name)
    encoder = seen.encoder if isinstance(seen, VisionLanguage) else seen
    asked: dict[str, Need] = {"received": ReceivedAttention(layer=-1), "keys": Keys(layer=0)}
    if encoder.has_class:
        asked["class"] = ClassAttention(layer=-1)
    inputs = tiny.inputs_for(net)
    before = tiny.run(net, inputs)
    listener: Method = Listening("encoder", asked)
    if isinstance(seen, VisionLanguage):
        listener = listener | Listening("layer", {"last": LastAttention()})
    with apply(net, listener):
        during = tiny.run(net, inputs)
    assert torch.equal(before, during)
    parts = listener.methods if hasattr(listener, "methods") else [listener]
    assert all(set(part.heard) == set(part.needs()) for part in parts)


@pytest.mark.parametrize("name", LANGUAGE)
def test_watching_changes_no_bit_and_counts_everything(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    before = tiny.run(net, inputs)
    with watch(net) as run:
        during = tiny.run(net, inputs)
    assert torch.equal(before, during)
    report = run.report()
    assert not report.applied and report.flops_share == 1.0
    assert all(image.before == image.after for image in report.images)
    assert report.layer_tokens == (float(inputs["attention_mask"].sum(1).float().mean()),) * 4
