"""G-Search and P-Sigmoid against their card."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

import tiny
from in_layers import Looking, eager, images
from jeton.calibration import Study
from jeton.engine import apply
from jeton.measure.tune import tune
from jeton.method import LastAttention, TextAttention, get

LLAVA = "LlavaForConditionalGeneration"
CLOSE = 1e-5


# -- the search --------------------------------------------------------------------------------------------------------------


def planted(depth, grid, seed):
    """A falling number of essential tokens in each layer, on the grid."""
    draw = random.Random(seed)
    return sorted((draw.randint(1, grid) for _ in range(depth)), reverse=True)


@pytest.mark.parametrize("seed", range(12))
def test_the_planted_schedule_is_found_in_few_evaluations(seed):
    """The score drops iff a layer has fewer tokens than it needs."""
    depth, grid = 16, 32
    method = get("g-search", keep=None, first=1)
    needed = [grid, *planted(depth - 1, grid, seed)]
    asked = []

    def measure(candidate):
        asked.append(candidate)
        if candidate is None:
            return 0.8
        return 0.8 - 0.1 * any(share * grid < least for share, least in zip(candidate.schedule, needed, strict=True))

    study = Study(measure, depth, tokens=576)
    found = method.calibrated(study)
    assert [round(share * grid) for share in found.schedule] == needed
    assert len(asked) <= depth * math.ceil(math.log2(grid))
    assert not study.notes and found.keep is None


def test_a_smaller_loss_than_allowed_is_no_drop():
    method = get("g-search", keep=None)
    for full, lost, wanted in ((0.8, 0.0039, 1 / 32), (0.8, 0.0041, 1.0), (-0.8, 0.0039, 1 / 32), (-0.8, 0.0041, 1.0)):
        study = Study(lambda candidate, full=full, lost=lost: full if candidate is None else full - lost, 6, 576)
        assert method.calibrated(study).schedule == (1.0, 1.0, *[wanted] * 4)


def test_layers_0_and_1_are_never_pruned_and_shallow_models_keep_all_but_the_last():
    study = Study(lambda candidate: 1.0, 6, 576)
    assert get("g-search", keep=None).calibrated(study).schedule[:3] == (1.0, 1.0, 1 / 32)
    for depth, whole in ((32, 2), (4, 2), (3, 2), (2, 1)):
        steps = get("g-search").steps(100, depth)
        assert [step is None for step in steps] == [True] * whole + [False] * (depth - whole)


def test_scores_that_fall_with_more_tokens_are_noted():
    """The search takes scores to rise with tokens; where they do not, it says so."""

    def noted(score):
        study = Study(lambda m: 1.0 if m is None else score(sum(m.schedule)), 4, 576)
        found = get("g-search", keep=None).calibrated(study)
        return found.schedule, study.notes

    schedule, notes = noted(lambda seen: 1.0 + 0.1 * (seen < 3))
    assert schedule == (1.0, 1.0, 1 / 32, 1 / 32) and "do not rise with tokens" in notes[0] and "schedules" in notes[0]
    assert not noted(lambda seen: 1.0 + 0.004 * (seen < 3))[1]  # less than the loss that is allowed
    assert not noted(lambda seen: 1.0 - 0.2 * (seen < 3))[1]


# -- the schedule ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.05, 0.25, 0.7, 1.0, 64, 576])
@pytest.mark.parametrize("depth", [28, 32])
def test_the_budget_is_the_mean_over_the_layers_that_may_lose_tokens(keep, depth):
    method = get("g-search", keep=keep)
    counts = method.counts(576, depth)
    k = keep if isinstance(keep, int) else round(keep * 576)
    assert counts[:2] == [576, 576] and sum(counts[2:]) == k * (depth - 2)
    assert counts == sorted(counts, reverse=True) and method.promise(576, depth).count == counts[-1] <= k
    assert [step.keep for step in method.steps(576, depth) if step] == counts[2:]


def test_the_ends_give_way_to_the_budget():
    counts = get("g-search", keep=0.5, high=0.3, low=0.1).counts(100, 12)
    assert sum(counts[2:]) == 500 and max(counts[2:]) == 50
    flat = get("g-search", keep=0.5, low=0.5).counts(100, 12)
    assert flat[2:] == [50] * 10
    assert get("g-search", keep=1).counts(100, 12) == [100, 100] + [1] * 10


def test_a_schedule_is_used_as_it_is():
    method = get("g-search", schedule=(1.0, 1.0, 0.5, 0.5))
    assert method.counts(10, 4) == [10, 10, 5, 5] and [step is None for step in method.steps(10, 4)] == [True, True, False, True]
    assert get(method.spec) == method
    with pytest.raises(ValueError, match="4 shares, but the language model has 6"):
        method.steps(10, 6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"schedule": (1.0, 0.5, 0.6)}, "never grow"),
        ({"schedule": (0.5, 0.5)}, "begin with 1.0"),
        ({"schedule": ()}, "every layer"),
        ({"kappa": 0.0}, "kappa must be above 0"),
        ({"low": 0.7, "high": 0.2}, "low <= high"),
        ({"first": 0}, "first"),
        ({"queries": "all"}, "queries must be"),
        ({"delta": -0.1}, "delta"),
    ],
)
def test_bad_fields_are_refused_with_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        get("g-search", **fields)


def test_without_budget_it_must_be_fitted_first():
    with pytest.raises(ValueError, match="fit it to a model"):
        apply(tiny.model(LLAVA), "g-search", keep=None).remove()


# -- on a model --------------------------------------------------------------------------------------------------------------


def test_a_schedule_of_all_tokens_changes_no_bit():
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    before = tiny.run(net, inputs)
    with apply(net, "g-search", schedule=(1.0,) * 4):
        assert torch.equal(tiny.run(net, inputs), before)
    with apply(net, "g-search", schedule=(1.0, 1.0, 1.0, 0.9)):
        assert not torch.equal(tiny.run(net, inputs), before)


@pytest.mark.parametrize("early", [None, "fastv(layer=1, keep=30)"])
def test_tokens_are_ranked_by_the_attention_of_all_text_in_the_layer_before(early):
    net = tiny.model(LLAVA, "eager")
    inputs = tiny.inputs_for(net)
    look = Looking(3, all=TextAttention(raters="all"), some=TextAttention(), last=LastAttention())
    with apply(net, look if early is None else get(early) | look) as run:
        maps = eager(net, inputs)
        at, length = run.costs.flow.at, run.costs.flow.length
    assert get("g-search").needs() == {"attention": TextAttention(raters="all")}
    assert get("g-search", queries="last").needs() == {"attention": LastAttention()}
    for image, (sample, own) in enumerate(images(net, inputs)):
        columns = at[image] - sample * length
        later = [where[0] for other, where in images(net, inputs) if other == sample]
        words = (inputs["input_ids"][sample] >= tiny.WORDS).nonzero().flatten().tolist()
        # prompts are aligned on the right: a word moves by what its prompt has lost behind it
        lost = len(own) - at.shape[1]
        move = [inputs["input_ids"].shape[1] - length - lost * sum(start > c for start in later) for c in words]
        text = [c - by for c, by in zip(words, move, strict=True) if c > own[-1]]
        row = maps[2][sample][text][:, columns].mean(0)
        assert (look.heard["all"][image] - row).abs().max() < CLOSE
        assert (look.heard["all"][image] - maps[1][sample][text[-1], columns]).abs().max() > 100 * CLOSE  # the twin
    assert (look.heard["all"] - look.heard["some"]).abs().max() > 100 * CLOSE


def data(net):
    """Three prompts, each with labels on its last words."""
    made = []
    for sample in tiny.samples(net):
        inputs = tiny.prompts(net, [sample])
        labels = inputs["input_ids"].clone()
        labels[:, :-3] = -100
        made.append({**inputs, "labels": labels})
    return made


def constant(depth, keep):
    """Every schedule that sees all tokens in some layers and one number in the rest, at the same cost."""
    layers = depth - 2
    for whole in range(layers):
        share = (keep * layers - whole) / (layers - whole)
        if share > 0:
            yield get("g-search", schedule=(1.0,) * (2 + whole) + (share,) * (layers - whole))


def test_the_found_schedule_is_no_worse_than_any_constant_one_of_equal_cost():
    net = tiny.model(LLAVA)
    inputs = data(net)
    fitted = get("g-search", keep=0.6).fit(net, inputs, calls=12, sampler="tpe")
    found = fitted.calibration
    assert found.objective == "answer" and found.data == 3 and len(found.trials) >= 4 and found.sampler == "tpe"
    assert sum(fitted.counts(49, 4)[2:]) == 2 * 29
    rivals = list(constant(4, 0.6))
    assert len(rivals) == 2
    for rival in rivals:
        cost = rival.counts(49, 4)
        assert abs(sum(cost) - sum(fitted.counts(49, 4))) <= 1
        study = tune(net, rival, inputs, calls=1, sampler="random").calibration
        assert found.score >= _worth(net, rival, inputs) - 1e-6 and study.full == pytest.approx(found.full)


def _worth(net, method, inputs):
    total = 0.0
    with apply(net, method), torch.no_grad():
        for each in inputs:
            total += float((-net(**each).loss).exp())
    return total / len(inputs)


def test_greedy_search_on_a_model_loses_no_more_than_allowed_and_is_measured_as_it_runs():
    net = tiny.model(LLAVA)
    inputs = data(net)
    fitted = get("g-search", keep=None, delta=0.3).fit(net, inputs)
    found = fitted.calibration
    assert found.score >= 0.7 * found.full and found.sampler == "bisection"
    assert found.score == pytest.approx(_worth(net, fitted, inputs), rel=1e-5)
    with apply(net, fitted) as run:
        tiny.run(net, tiny.inputs_for(net))
        text = 75.333333 - 4 / 3 * 49
        expected = [text + 4 / 3 * count for count in fitted.counts(49, 4)]
        assert run.report().layer_tokens == pytest.approx(tuple(expected), abs=1e-3)
    again = replace(fitted, keep=0.5).fit(net, inputs, calls=6, sampler="random")  # starts from the curve
    assert again.schedule is None and again.keep == 0.5
