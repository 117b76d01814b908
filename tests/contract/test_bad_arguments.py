"""Bad arguments raise a clear error before anything runs; a prompt without pictures runs unchanged and the report says so."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from cases import ADAPTIVE, AT_ONCE, LANGUAGE, LANGUAGE_CASES, LLAVA, Case, each, view
from references import generated, sights
from witness import snapshot

import jeton
import tiny
from jeton.engine import apply
from jeton.method import reducers

IDS = [card.id for card in reducers() if card.id not in ADAPTIVE]


@pytest.mark.parametrize(
    ("keep", "error"),
    [(value, ValueError) for value in (0, -3, 0.0, -0.1, 1.5, math.nan, math.inf)]
    + [(value, TypeError) for value in ("64", True, [8])],
    ids=str,
)
@pytest.mark.parametrize("name", IDS)
def test_a_budget_that_means_nothing_is_refused(name: str, keep: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="keep"):
        jeton.get(name, keep=keep)


@pytest.mark.parametrize("name", IDS)
def test_an_unknown_method_suggests_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=f"Did you mean.*{name}"):
        jeton.get(name[:-1] + ("x" if name[-1] != "x" else "y"))


@pytest.mark.parametrize("name", IDS)
def test_a_misspelt_field_suggests_the_nearest(name: str) -> None:
    with pytest.raises(TypeError, match=r"no field 'kep'.*keep"):
        jeton.get(name, kep=0.5)
    with pytest.raises(TypeError, match=r"no field 'kep'.*keep"):
        jeton.get(f"{name}(kep=0.5)")


@pytest.mark.parametrize("spec", ["", "tome(", "tome(8)", "tome + evit", "tome(r=x)", 3, None])
def test_a_spec_that_cannot_be_read_is_refused(spec: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        jeton.get(spec)


@pytest.mark.parametrize("name", IDS)
def test_every_method_prints_a_spec_that_makes_it_again(name: str) -> None:
    made = jeton.get(name, keep=0.4)
    assert jeton.get(made.spec) == made
    assert dataclasses.is_dataclass(made)


@pytest.mark.parametrize(
    "arguments", [{"positions": "renumber"}, {"newlines": "yes"}, {"keep": 0}, {"kep": 0.5}, {"positions": None}]
)
def test_bad_options_of_apply_are_refused_before_anything_changes(arguments: dict[str, Any]) -> None:
    net = tiny.model(LLAVA)
    before = snapshot(net)
    with pytest.raises((ValueError, TypeError)):
        apply(net, "random", **arguments)
    assert snapshot(net) == before


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises((TypeError, jeton.Unsupported)):
        apply(torch.nn.Linear(2, 2), "random")


@each(LANGUAGE_CASES)
def test_a_prompt_without_pictures_runs_unchanged_and_the_report_says_so(case: Case) -> None:
    net = case.net()
    words = tiny.text_only(net)
    before = tiny.run(net, words)
    told = net.generate(**words, max_new_tokens=4, do_sample=False)
    with apply(net, case.made()) as run:
        assert torch.equal(tiny.run(net, words), before)
        report = run.report()
        assert torch.equal(net.generate(**words, max_new_tokens=4, do_sample=False), told)
        assert "nothing to reduce" in run.report().note
    assert "nothing to reduce" in report.note and not report.applied and not report.images
    assert "nothing to reduce" in str(report)


@each(LANGUAGE_CASES)
def test_a_prompt_without_pictures_after_one_with_them_does_not_inherit_anything(case: Case) -> None:
    net = case.net()
    words = tiny.text_only(net)
    before = tiny.run(net, words)
    with apply(net, case.made()) as run:
        tiny.run(net, tiny.inputs_for(net))
        assert run.report().applied
        assert torch.equal(tiny.run(net, words), before)
        assert not run.report().applied and not run.report().images


@each(LANGUAGE_CASES)
def test_a_prompt_whose_image_tokens_do_not_fit_its_images_is_refused(case: Case) -> None:
    net = case.net()
    inputs = tiny.prompts(net, tiny.one_image(net))
    at = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero()[3])
    inputs["input_ids"][0, at] = tiny.WORDS
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"][0, at] = 0
    with apply(net, case.made()), pytest.raises((ValueError, RuntimeError, StopIteration)):
        tiny.run(net, inputs)


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_mask_with_four_axes_is_cut_and_one_with_three_refused(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.prompts(net, tiny.one_image(net))
    length = inputs["input_ids"].shape[1]
    numbered = {**inputs, "position_ids": tiny.positions(net, inputs)}
    square, *others = sights(net, inputs, torch.zeros(1, length, dtype=torch.bool))
    with apply(net, "random", keep=0.3):
        right = tiny.run(net, numbered)
        given = tiny.run(net, {**numbered, "attention_mask": square})
        # one mask says the same as the model's own where these are the same in all layers
        alike = all(torch.equal(square, other) for other in others)
        seen = view(name)
        slides = seen.windowed and length > seen.decoder.config.sliding_window and name not in AT_ONCE
        assert torch.allclose(given, right, atol=1e-5) == alike and alike != slides
        with pytest.raises(ValueError, match="an attention mask is"):
            tiny.run(net, {**numbered, "attention_mask": square[0]})


@pytest.mark.parametrize("name", LANGUAGE)
def test_features_given_as_embeddings_are_left_alone_and_the_report_says_so(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.prompts(net, tiny.one_image(net))
    ids = tiny.positions(net, inputs)
    embeds = net.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "position_ids": ids}
    before = tiny.run(net, given)
    with apply(net, "random", keep=0.3) as run:
        assert torch.equal(tiny.run(net, given), before)
        assert run.report().note and not run.report().applied


@pytest.mark.parametrize("spec", ["uniform(keep=0.3)", "divprune(keep=0.3)", "tome(keep=0.3)", "fastv(keep=0.3)"])
def test_a_prompt_in_chunks_is_reduced_or_refused_or_left_alone_never_half_reduced(spec: str) -> None:
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    how = {"max_new_tokens": 6, "prefill_chunk_size": 16}
    whole, words = generated(net, inputs, max_new_tokens=6).sequences, inputs["input_ids"].shape[1]
    if not torch.equal(generated(net, inputs, **how).sequences, whole):
        return  # transformers 5.17 does not say the same in chunks without any reduction either
    with apply(net, spec) as run:
        reduced = generated(net, inputs, max_new_tokens=6).sequences
        try:
            answer = generated(net, inputs, **how).sequences
        except ValueError as refusal:
            assert "chunk" in str(refusal) or "input_ids" in str(refusal)
            return
        applied = run.report().applied
    assert torch.equal(answer[:, words:], (reduced if applied else whole)[:, words:])


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("spec", ["uniform(keep=0.3)", "divprune(keep=0.3)", "fastv(keep=0.3)"])
def test_a_static_cache_works_or_is_refused_with_a_sentence(name: str, spec: str) -> None:
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    with apply(net, spec):
        usual = generated(net, inputs, max_new_tokens=6).sequences
        try:
            static = generated(net, inputs, max_new_tokens=6, cache_implementation="static").sequences
        except ValueError as refusal:
            assert "static" in str(refusal)
            return
    assert torch.equal(usual, static)
