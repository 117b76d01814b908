"""`generate` with the cache equals a recomputation without it, token for token: greedy, beams, sampling, several answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from cases import (
    AT_ONCE,
    AT_THE_DOOR,
    IDS_ONLY,
    LANGUAGE,
    LANGUAGE_CASES,
    LLAVA,
    RECOMPUTABLE,
    Case,
    as_recomputed,
    both_attentions,
    each,
    renumbers,
)
from references import CLOSE, STEPS, difference, generated, recomputed
from torch import Tensor
from witness import Replay, spied, watching

import tiny
from jeton.engine import apply
from jeton.method import get


@both_attentions
@each(RECOMPUTABLE)
def test_greedy_with_a_cache_equals_recomputation_without(case: Case, attention: str) -> None:
    net = case.net(attention)
    inputs = tiny.inputs_for(net)
    spy, decided = spied(case.made())
    with apply(net, spy):
        output = generated(net, inputs)
    new, logits = output.sequences[:, -STEPS:], torch.stack(output.logits, 1)
    reference = recomputed(net, inputs, case.made(), decided, new)
    assert torch.equal(reference.argmax(-1), new)
    assert difference(logits, reference) < CLOSE
    # the twin: the same tokens without any reduction are something else
    longer = tiny.extended(inputs, new[:, :-1])
    whole = tiny.run(net, {**longer, "position_ids": tiny.positions(net, longer)}, use_cache=False)[:, -STEPS:]
    assert difference(logits, whole) > 100 * CLOSE


@pytest.mark.parametrize("method", ["visionzip(keep=20)", "divprune", "fastv", "tome(keep=0.3)"])
def test_greedy_equals_growing_the_prompt_one_token_at_a_time(method: str) -> None:
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    spy, decided = spied(get(method))
    with apply(net, spy):
        new = generated(net, inputs).sequences[:, -STEPS:]
    said = new[:, :0]
    for _ in range(STEPS):
        longer = tiny.extended(inputs, said)
        longer["position_ids"] = tiny.positions(net, longer)
        with apply(net, Replay(get(method), list(decided))):
            said = torch.cat([said, tiny.run(net, longer, use_cache=False)[:, -1:].argmax(-1)], 1)
    assert torch.equal(said, new)


@each(RECOMPUTABLE)
def test_beams_are_worth_what_recomputation_says(case: Case) -> None:
    """The score of the best beam is the sum of its tokens' log-probabilities, computed without a cache."""
    net = case.net()
    inputs = tiny.for_beams(net)
    spy, decided = spied(case.made())
    with apply(net, spy) as run:
        tiny.run(net, inputs)
        once = list(decided)
        output = generated(net, inputs, num_beams=3, max_new_tokens=8, length_penalty=0.0, output_scores=True)
        shown: dict[int, list[list[Tensor]]] = {}
        for image, sample in enumerate(run.layout.sample):
            shown.setdefault(sample, []).append(run.assignment(image))
    for sample in range(3 * len(inputs["input_ids"])):  # beams of one prompt share what is kept
        for a, b in zip(shown[sample], shown[sample - sample % 3], strict=True):
            assert all(torch.equal(x < 0, y < 0) for x, y in zip(a, b, strict=True))
    new = output.sequences[:, -8:]
    logits = recomputed(net, inputs, case.made(), once, new)
    worth = logits.log_softmax(-1).gather(2, new[..., None]).sum((1, 2))
    assert torch.allclose(output.sequences_scores, worth, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["beams", "several-beams", "sampling", "several-samples"],
)
@each([case for case in AT_THE_DOOR if renumbers(case.model) and case.model not in IDS_ONLY and not case.fields])
def test_compact_generation_equals_that_from_a_prompt_cut_by_hand(case: Case, how: dict[str, Any]) -> None:
    """`generate` numbers embeddings without gaps, so a prompt cut by hand is the reference for positions="compact"."""
    net = case.net()
    inputs = tiny.inputs_for(net) if how == {"do_sample": True} else tiny.for_beams(net)
    with apply(net, case.made(), positions="compact"):
        with watching(net) as seen:
            tiny.run(net, {**inputs, "position_ids": tiny.positions(net, inputs)})
        embeds, mask = seen.embeds, seen.real().long()
        torch.manual_seed(1)
        output = generated(net, inputs, max_new_tokens=8, **how)
    torch.manual_seed(1)
    by_hand = generated(net, {"inputs_embeds": embeds, "attention_mask": mask}, max_new_tokens=8, **how)
    assert torch.equal(output.sequences[:, -8:], by_hand.sequences[:, -8:])


@pytest.mark.parametrize("name", LANGUAGE)
def test_several_samples_show_the_same_images_again(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.for_beams(net)
    with apply(net, "divprune", keep=0.3) as run:
        torch.manual_seed(3)
        output = generated(net, inputs, do_sample=True, num_return_sequences=2)
        left = [(image.sample, image.after) for image in run.report().images]
        tiny.run(net, inputs)
        once = [(image.sample, image.after) for image in run.report().images]
    assert output.sequences.shape[0] == 2 * len(inputs["input_ids"])
    doubled = sorted((2 * sample + copy, after) for sample, after in once for copy in (0, 1))
    assert sorted(left) == doubled
    assert not torch.equal(output.sequences[0], output.sequences[1])


@each([case for case in LANGUAGE_CASES if not case.fields])
def test_sampling_under_a_seed_repeats(case: Case) -> None:
    net = case.net()
    inputs = tiny.inputs_for(net)
    answers = []
    for _ in range(2):
        torch.manual_seed(7)
        with apply(net, case.made()):
            answers.append(generated(net, inputs, do_sample=True, max_new_tokens=8).sequences)
    assert torch.equal(*answers)


@each([as_recomputed(case) for case in LANGUAGE_CASES if not case.fields])
def test_generating_without_a_cache_says_the_same(case: Case) -> None:
    """`generate` encodes once and runs the whole prompt at every step; each must begin with all visual tokens."""
    if case.model in AT_ONCE and not hasattr(transformers.GenerationMixin, "_supports_mm_encoder_outputs"):
        pytest.skip("older versions count what is said as part of the prompt when they have no cache, without any method too")
    net = case.net()
    inputs = tiny.inputs_for(net)
    spy, decided = spied(case.made())
    with apply(net, spy):
        cached = generated(net, inputs, max_new_tokens=6)
    with apply(net, Replay(case.made(), decided)) as run:
        uncached = generated(net, inputs, max_new_tokens=6, use_cache=False)
        left = run.report().images
    assert torch.equal(cached.sequences, uncached.sequences)
    with apply(net, case.made()) as run:
        tiny.run(net, inputs)
        assert run.report().images == left


@pytest.mark.parametrize("spec", ["uniform(keep=0.3)", "divprune(keep=0.3)", "tome(keep=0.3)", "fastv(keep=0.3)"])
def test_prompt_lookup_says_what_greedy_says(spec: str) -> None:
    """Candidates that are rejected are cut from the cache again, whose layers may differ in length."""
    net = tiny.model(LLAVA)
    inputs = tiny.prompts(net, tiny.one_image(net))
    with apply(net, spec):
        greedy = generated(net, inputs).sequences
        looked = generated(net, inputs, prompt_lookup_num_tokens=3).sequences
    assert torch.equal(greedy, looked)
