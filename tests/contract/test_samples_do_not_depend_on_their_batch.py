"""A sample gives the same result alone as inside a padded batch, and an image the same beside any other."""

from __future__ import annotations

import pytest
import torch
from cases import ENCODER_CASES, LANGUAGE_CASES, Case, each
from references import CLOSE, difference
from torch import Tensor
from witness import kept, spied

import tiny
from jeton.engine import apply


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.3, 7], ids=str)
@each(LANGUAGE_CASES)
def test_a_prompt_alone_equals_the_same_prompt_in_a_padded_batch(case: Case, keep: int | float) -> None:
    net = case.net("eager" if keep == 7 else "sdpa")
    chosen = tiny.samples(net)
    together = tiny.prompts(net, chosen)
    with apply(net, case.made(keep)) as run:
        batch = tiny.run(net, {**together, "position_ids": tiny.positions(net, together)})[:, -1]
        left = {s: [i.after for i in run.report().images if i.sample == s] for s in range(3)}
        maps = _maps(run)
        for number, sample in enumerate(chosen):
            alone = tiny.prompts(net, [sample])
            single = tiny.run(net, {**alone, "position_ids": tiny.positions(net, alone)})[:, -1]
            assert [image.after for image in run.report().images] == left[number]
            assert difference(batch[number], single[0]) < CLOSE
            for image, grids in enumerate(_maps(run)):
                before = maps[sum(len(left[s]) for s in range(number)) + image]
                assert all(torch.equal(a < 0, b < 0) for a, b in zip(grids, before, strict=True))
    assert difference(batch[0], batch[1]) > 100 * CLOSE


def _maps(run) -> list[list[Tensor]]:
    return [run.assignment(image) for image in range(run.layout.images)]


@torch.no_grad()
@each(ENCODER_CASES)
def test_a_picture_alone_equals_the_same_picture_in_a_batch(case: Case) -> None:
    net = case.net()
    together = tiny.inputs_for(net)
    spy, decided = spied(case.made())
    with apply(net, spy) as run:
        net(**together)
        tokens, all_kept = run.tokens, kept(decided)
        for number in range(3):
            decided.clear()
            net(**tiny.row(together, number))
            alone = run.tokens
            assert [step[0] for step in kept(decided)] == [step[number] for step in all_kept]
            real = tokens.real[number]
            assert torch.equal(tokens.origin[number][real], alone.origin[0][alone.real[0]])
            assert difference(alone.features[0][alone.real[0]], tokens.features[number][real]) < CLOSE


@torch.no_grad()
@each(LANGUAGE_CASES)
def test_the_order_of_prompts_in_a_batch_does_not_matter(case: Case) -> None:
    net = case.net()
    chosen = tiny.samples(net)
    outputs = []
    for order in ((0, 1, 2), (2, 0, 1)):
        inputs = tiny.prompts(net, [chosen[at] for at in order])
        with apply(net, case.made()):
            logits = tiny.run(net, {**inputs, "position_ids": tiny.positions(net, inputs)})[:, -1]
        outputs.append(torch.stack([logits[order.index(at)] for at in range(3)]))
    assert difference(*outputs) < CLOSE
