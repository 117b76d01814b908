"""DyMU's merging against its card: thresholds, their fitting, schedules and what is conserved."""

from __future__ import annotations

import pytest
import torch

import jeton
import tiny
from jeton.engine import apply
from jeton.engine.calibrate import calibrate
from jeton.method import get
from jeton.reduce.dymu import PRESETS, DyMU
from jeton.tokens import Tokens

CLIP, LLAVA, NAFLEX = "CLIPVisionModel", "LlavaForConditionalGeneration", "Siglip2VisionModel"


def test_hand_case_merges_every_edge_above_the_threshold():
    """Behind a class token: senders at 2 and 4, receivers at 1 and 3; cosines .8 (2 to 1), .96 (4 to 1), then .6, .28."""
    x = torch.tensor([[[9.0, 9.0], [1, 0], [0.8, 0.6], [0, 1], [0.96, 0.28]]])
    tokens = Tokens(x, prefix=1, size=torch.tensor([[1.0, 3, 1, 1, 1]]))
    for threshold, groups in [(0.7, [{0}, {1, 2, 4}, {3}]), (0.9, [{0}, {1, 4}, {2}, {3}]), (0.97, None)]:
        step = get("dymu", thresholds=(threshold,)).reduce(tokens)
        if groups is None:
            assert step.is_identity
            continue
        assert [set(row.nonzero().flatten().tolist()) for row in step.dense[0]] == groups
    after = get("dymu", thresholds=(0.9,)).reduce(tokens).apply(tokens)
    torch.testing.assert_close(after.features[0, 1], (3 * x[0, 1] + x[0, 4]) / 4)
    assert after.size[0].tolist() == [1, 4, 1, 1]


def test_threshold_one_merges_nothing_and_minus_one_whatever_parity_allows():
    for n, prefix in [(20, 1), (21, 1), (20, 0), (21, 0), (9, 2)]:
        twins = torch.ones(2, n, 4) / 3  # all the same: their cosine may come out above 1
        assert get("dymu", thresholds=(1.0,)).reduce(Tokens(twins, prefix=prefix)).is_identity
        tokens = Tokens(torch.randn(2, n, 4), prefix=prefix)
        senders = len([place for place in range(0, n, 2) if place >= prefix])
        assert get("dymu", thresholds=(-1.0,)).reduce(tokens).k == n - senders


def test_rows_of_a_batch_differ_and_are_what_they_are_alone():
    generator = torch.Generator().manual_seed(0)
    plain, noise = torch.ones(1, 31, 6), torch.randn(1, 31, 6, generator=generator)
    x = torch.cat([plain + 0.05 * noise, noise])
    method, tokens = get("dymu", thresholds=(0.5,)), Tokens(x, prefix=1)
    alone = [Tokens(x[row : row + 1], prefix=1) for row in range(2)]
    for _ in range(3):
        tokens = method.reduce(tokens).apply(tokens)
        alone = [method.reduce(each).apply(each) for each in alone]
        assert tokens.count().tolist() == [len(each) for each in alone]
        for row, each in enumerate(alone):
            torch.testing.assert_close(tokens.features[row][tokens.real[row]], each.features[0])
    assert tokens.count()[0] < tokens.count()[1]


@torch.no_grad()
@pytest.mark.parametrize("method", ["dymu(keep=0.3)", "dymu(keep=0.3, schedule='linear')", "dymu(thresholds=(.6,.3,.6,-1.,.6))"])
@pytest.mark.parametrize("model", [CLIP, NAFLEX])
def test_every_patch_belongs_to_one_token_and_sizes_add_up(method: str, model: str):
    net = tiny.model(model)
    inputs = tiny.inputs_for(net)
    before = tiny.real(net, inputs)
    with apply(net, method) as run:
        tiny.run(net, inputs)
        reduction, tokens = run.reduction, run.tokens
    assert torch.equal(reduction.dense.gt(0).sum(1) == 1, before)
    torch.testing.assert_close((tokens.size * tokens.real).sum(1), before.sum(1).float())
    torch.testing.assert_close(reduction.dense.sum(2)[tokens.real], torch.ones(int(tokens.real.sum())))


@torch.no_grad()
def test_plain_pictures_end_with_fewer_tokens_than_noisy_ones():
    net = tiny.model(CLIP)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, 28, 28, generator=generator)
    blocks = torch.randn(1, 3, 2, 2, generator=generator).repeat_interleave(14, 2).repeat_interleave(14, 3)
    pictures = torch.cat([torch.full((1, 3, 28, 28), 0.5), blocks, noise])
    fitted = calibrate(net, get("dymu", keep=0.5), [pictures])
    with apply(net, fitted) as run:
        net(pixel_values=pictures)
        counts = [image.after for image in run.report().images]
    assert counts[0] < counts[2] and counts[1] < counts[2]


# -- fitting ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_batch_threshold_is_the_first_edge_left_over_and_merges_are_dealt_out_over_the_batch():
    plain, noise = torch.ones(1, 12, 6), torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(1))
    tokens = Tokens(torch.cat([plain + 0.1 * noise, noise]))
    learner = get("dymu", keep=9).calibrating()
    step = learner.steps(12, 1)[0]  # three merges a picture: six in all
    made = step.reduce(tokens)
    unit = tokens.features / tokens.features.norm(dim=-1, keepdim=True)
    edges = sorted((unit[:, ::2] @ unit[:, 1::2].mT).amax(2).flatten().tolist(), reverse=True)
    threshold = learner.fitted().thresholds[0]
    assert threshold == pytest.approx(max(0.0, edges[6]), abs=1e-6)
    assert made.count().sum() == 24 - 6 and made.count()[0] == 6 < made.count()[1]
    # thresholds of several batches are averaged
    step.reduce(Tokens(noise))
    alone = sorted((unit[1, ::2] @ unit[1, 1::2].T).amax(1).tolist(), reverse=True)
    assert learner.fitted().thresholds[0] == pytest.approx((threshold + max(0.0, alone[3])) / 2, abs=1e-6)
    # the fitted method merges in that batch what was merged while it was fitted
    again = DyMU(thresholds=(threshold,)).reduce(tokens)
    assert torch.equal(again.count(), made.count())


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["even", "linear", "reverse-linear"])
def test_fitted_thresholds_leave_about_the_budget_on_the_same_pictures(schedule: str):
    net = tiny.model(CLIP)
    pictures = [torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    method = calibrate(net, get("dymu", keep=25, schedule=schedule), pictures)
    assert len(method.thresholds) == 5 and jeton.get(method.spec) == method
    left = []
    with apply(net, method) as run:
        for batch in pictures:
            net(pixel_values=batch)
            left += [image.after for image in run.report().images]
    assert sum(left) / len(left) == pytest.approx(25, abs=2.5)


def test_a_vision_language_model_is_fitted_through_the_blocks_it_uses():
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    method = calibrate(net, get("dymu", keep=0.5), [inputs["pixel_values"]])
    assert len(method.thresholds) == 4
    with apply(net, method) as run:
        tiny.run(net, inputs)
        left = [image.after for image in run.report().images]
    assert sum(left) / len(left) == pytest.approx(24, abs=3)


def test_nothing_seen_too_few_thresholds_and_methods_without_any_are_refused():
    net = tiny.model(CLIP)
    with pytest.raises(ValueError, match="no picture"):
        calibrate(net, get("dymu"), [])
    with apply(net, "dymu", thresholds=(0.9, 0.9)), pytest.raises(ValueError, match=r"2 blocks.*5"):
        tiny.run(net, tiny.inputs_for(net))
    with pytest.raises(jeton.Unsupported, match="nothing to fit"):
        calibrate(net, get("tome"), [])
    for fields in ({"schedule": "steep"}, {"thresholds": ()}, {"thresholds": ("a",)}, {"thresholds": (float("nan"),)}):
        with pytest.raises(ValueError, match=r"schedule|thresholds"):
            get("dymu", **fields)


# -- schedules -------------------------------------------------------------------------------------------------------------


def removed(method: DyMU, n: int, depth: int) -> list[int]:
    plan = [n, *method.plan(n, depth)]
    return [a - b for a, b in zip(plan, plan[1:], strict=False)]


def test_schedules_of_the_card():
    assert removed(get("dymu", keep=192), 576, 24) == [16] * 24
    assert removed(get("dymu", keep=190), 200, 4) == [3, 3, 2, 2]  # the first blocks take the remainder
    falling = removed(get("dymu", keep=192, schedule="linear"), 576, 24)
    assert falling[0] == 32 and falling[-1] == 0 and sum(falling) == 384 and falling == sorted(falling, reverse=True)
    assert removed(get("dymu", keep=192, schedule="reverse-linear"), 576, 24) == falling[::-1]
    assert all(get("dymu", keep=share).promise(576, 24).count == count for count, share in PRESETS.items())
