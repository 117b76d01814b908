"""After exit, and after an exception inside, nothing of a run remains."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from cases import EVERY, INNER, LANGUAGE, LANGUAGE_CASES, MAPS, REDUCIBLE, Case, each, view
from references import generated, view_of
from torch import nn
from transformers import DynamicCache
from witness import snapshot

import jeton
import tiny
from jeton.engine import apply, watch
from jeton.models import VisionLanguage


@each(EVERY)
def test_nothing_remains_after_leaving(case: Case) -> None:
    net = case.net("eager" if case.model in INNER else "sdpa")
    inputs = tiny.inputs_for(net)
    output = tiny.run(net, inputs)
    before = snapshot(net)
    with apply(net, case.made()):
        tiny.run(net, inputs)
        assert snapshot(net) != before
    assert snapshot(net) == before
    assert torch.equal(tiny.run(net, inputs), output)


@each(LANGUAGE_CASES)
def test_nothing_remains_after_generating(case: Case) -> None:
    net = case.net()
    inputs = tiny.inputs_for(net)
    output = tiny.run(net, inputs)
    before = snapshot(net)
    with apply(net, case.made()):
        cache = generated(net, inputs, max_new_tokens=3).past_key_values
    assert snapshot(net) == before
    assert set(vars(cache)) == set(vars(DynamicCache()))
    assert torch.equal(tiny.run(net, inputs), output)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["encoder", "layer"])
@each(LANGUAGE_CASES)
def test_an_exception_in_the_middle_of_a_forward_leaves_no_trace_and_no_state(case: Case, where: str) -> None:
    net = case.net()
    seen = view_of(net)
    inputs = tiny.inputs_for(net)
    parts = seen.layers if where == "layer" else seen.encoder.blocks
    output = tiny.run(net, inputs)
    before = snapshot(net)

    def stop(module: nn.Module, args: tuple, output: Any) -> None:
        raise Interrupted

    with apply(net, case.made()):
        reduced = tiny.run(net, inputs)
    with pytest.raises(Interrupted), apply(net, case.made()):
        handle = parts[2].register_forward_hook(stop)
        try:
            tiny.run(net, inputs)
        except Interrupted:
            handle.remove()
            assert torch.equal(tiny.run(net, inputs), reduced)  # the run itself goes on as if nothing had been
            words = tiny.text_only(net)
            assert tiny.run(net, words).shape[:2] == words["input_ids"].shape
            raise
    assert snapshot(net) == before
    assert torch.equal(tiny.run(net, inputs), output)


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_a_refused_apply_leaves_no_trace(name: str) -> None:
    net = tiny.model(name)
    before = snapshot(net)
    for spec, error in (
        ("hired(keep=nan)", ValueError),
        ("fastv(layer=99)", (ValueError, jeton.Unsupported)),
        ("nothing", ValueError),
    ):
        with pytest.raises(error):
            apply(net, spec)
        assert snapshot(net) == before


@pytest.mark.parametrize("name", [name for name in REDUCIBLE if name not in MAPS])
def test_applying_twice_is_an_error_and_leaves_the_first_in_place(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    before = snapshot(net)
    with apply(net, "uniform", keep=0.5) as run:
        once = tiny.run(net, inputs)
        during = snapshot(net)
        for again in (lambda: apply(net, "random", keep=0.5), lambda: watch(net)):
            with pytest.raises(RuntimeError, match=r"already has uniform.*run.remove()"):
                again()
        assert snapshot(net) == during
        assert torch.equal(tiny.run(net, inputs), once)
        run.remove()
        run.remove()  # a second time does nothing
        assert snapshot(net) == before
    with apply(net, "uniform", keep=0.5):
        assert torch.equal(tiny.run(net, inputs), once)


@pytest.mark.parametrize("name", LANGUAGE)
def test_applying_to_a_model_and_to_its_inner_part_is_an_error(name: str) -> None:
    """A run on the whole and another on a part would both hook the same modules."""
    net = tiny.model(name)
    before = snapshot(net)
    with apply(net, "uniform", keep=0.5), pytest.raises(RuntimeError, match="already"):
        apply(net.model, "uniform", keep=0.5).remove()
    assert snapshot(net) == before


@pytest.mark.parametrize("name", LANGUAGE)
def test_two_models_at_once_do_not_meet(name: str) -> None:
    net, other = tiny.model(name), tiny.BUILDERS[name]()
    inputs = tiny.inputs_for(net)
    with apply(net, "uniform", keep=0.5):
        alone = tiny.run(net, inputs)
        with apply(other, "random", keep=0.2):
            tiny.run(other, inputs)
            assert torch.equal(tiny.run(net, inputs), alone)
        assert torch.equal(tiny.run(net, inputs), alone)
    assert isinstance(view(name), VisionLanguage)


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_run_does_not_keep_its_model_alive(name: str) -> None:
    net = tiny.BUILDERS[name]()
    with apply(net, "uniform", keep=0.5):
        tiny.run(net, tiny.inputs_for(net))
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
