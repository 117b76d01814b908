"""Several images, crops and frames are reduced each within its own bounds; text is never dropped; structure as asked."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cases import AT_THE_DOOR, LANGUAGE, LANGUAGE_CASES, LLAVA_NEXT, NEXT_VIDEO, ONEVISION, QWEN, QWEN2, QWEN3, Case, each, view
from references import CLOSE, STEPS, columns, difference, full_columns, generated, runs_of_images, visual
from torch import Tensor, nn
from witness import Replay, spied, watching

import tiny
from jeton.engine import apply
from jeton.layout import Layout
from jeton.method import get
from jeton.models import VisionLanguage

DROPPING = [case for case in LANGUAGE_CASES if case.made().site in ("encoder", "entry")]


def arrived(net: nn.Module, inputs: tiny.Inputs, method: object, **how: str) -> tuple[Tensor, Layout]:
    """(B, L) which columns of the prompt reached the language model; and the layout."""
    whole = {**inputs, "position_ids": tiny.positions(net, inputs)}
    with apply(net, method, **how) as run, watching(net) as seen:
        tiny.run(net, whole)
        layout = run.layout
    at = columns(seen.ids, full_columns(net, inputs), seen.real())
    there = torch.zeros(at.shape[0], inputs["input_ids"].shape[1] + 1, dtype=torch.bool)
    return there.scatter(1, torch.where(at < 0, there.shape[1] - 1, at), True)[:, :-1], layout


@each(LANGUAGE_CASES)
def test_the_layout_covers_the_prompt_without_gap_or_overlap(case: Case) -> None:
    net = case.net()
    inputs = tiny.inputs_for(net)
    with apply(net, case.made()) as run:
        tiny.run(net, inputs)
        layout = run.layout
    shows = visual(net, inputs)
    for sample in range(layout.batch):
        spans = layout.spans(sample)
        assert sum(span.length for span in spans) == layout.length
        assert all(a.start + a.length == b.start for a, b in pairwise(spans))
        for span in spans:
            assert bool((shows[sample, span.start : span.start + span.length] == (span.kind != "text")).all())
        own = [image for image, at in enumerate(layout.sample) if at == sample]
        assert [layout.album.counts[image] for image in own] == runs_of_images(inputs, sample)


@each(DROPPING)
def test_every_image_keeps_its_own_and_text_is_never_dropped(case: Case) -> None:
    net = case.net()
    inputs = tiny.inputs_for(net)
    there, layout = arrived(net, inputs, case.made())
    text = inputs["attention_mask"].bool() & ~visual(net, inputs)
    assert bool(there[text].all())
    for image, sample in enumerate(layout.sample):
        own = layout.position[image, : layout.album.counts[image]]
        kept = int(there[sample, own].sum())
        assert 0 < kept < len(own)


@each([case for case in DROPPING if case.model in (LLAVA_NEXT, ONEVISION)])
@pytest.mark.parametrize("newlines", ["keep", "drop", "pool"])
def test_newlines_are_kept_dropped_or_compete_as_asked(case: Case, newlines: str) -> None:
    net, method = case.net(), case.made()
    inputs = tiny.inputs_for(net)
    there, layout = arrived(net, inputs, method, newlines=newlines)
    for image, sample in enumerate(layout.sample):
        geometry = layout.album.geometry[image]
        kept = there[sample, layout.position[image, : len(geometry)]]
        breaks = geometry.unit < 0
        assert int(breaks.sum()) > 0
        if newlines == "keep":
            assert bool(kept[breaks].all())
        if newlines == "drop":
            assert not bool(kept[breaks].any())
        wanted = method.promise(len(kept) if newlines == "pool" else int((~breaks).sum()))
        counted = int(kept.sum() if newlines == "pool" else kept[~breaks].sum())
        assert counted == wanted.count if wanted.exact else counted <= wanted.count


@pytest.mark.parametrize("name", [LLAVA_NEXT])
@pytest.mark.parametrize("per", ["image", "crop"])
def test_a_budget_per_crop_holds_in_every_crop(name: str, per: str) -> None:
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    with apply(net, "fastervlm", keep=5, per=per) as run:
        tiny.run(net, inputs)
        for image in range(run.layout.images):
            counts = [int((grid >= 0).sum()) for grid in run.assignment(image)]
            assert counts == [5] * len(counts) if per == "crop" else sum(counts) == 5


@pytest.mark.parametrize("name", [NEXT_VIDEO, ONEVISION, QWEN2, QWEN, QWEN3])
def test_a_budget_per_frame_holds_in_every_frame(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.prompts(net, tiny.samples(net)[2:])
    with apply(net, "fastervlm", keep=3, per="frame", score="received") as run:
        tiny.run(net, inputs)
        assert [int((grid >= 0).sum()) for grid in run.assignment(0)] == [3, 3]


@each(AT_THE_DOOR)
def test_an_image_is_reduced_the_same_beside_any_other(case: Case) -> None:
    """Change the first image of a prompt: the second keeps what it kept. (Inside the language model they see each other.)"""
    net = case.net()
    inputs = tiny.prompts(net, tiny.samples(net)[1:2])
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    first = other["pixel_values"].narrow(tiny.first_picture(inputs)[0], 0, tiny.first_picture(inputs)[1])
    first.copy_(first.flip(-1) + 1)
    maps = []
    for given in (inputs, other):
        with apply(net, case.made()) as run:
            tiny.run(net, given)
            maps.append([run.assignment(image) for image in (0, 1)])
    assert all(torch.equal(a, b) for a, b in zip(maps[0][1], maps[1][1], strict=True))


@pytest.mark.parametrize("name", LANGUAGE)
def test_methods_in_sequence_each_act_at_their_site(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    seen_by = view(name)
    assert isinstance(seen_by, VisionLanguage)
    block = "" if seen_by.mixes or seen_by.encoder.packed else "tome(keep=0.8) | "
    with apply(net, f"{block}uniform(keep=0.7) | divprune(keep=0.5) | fastv(layer=2, keep=0.5)") as run, watching(net) as seen:
        tiny.run(net, inputs)
        report = run.report()
    assert [site.method for site in report.sites] == [*(["tome"] if block else []), "uniform", "divprune", "fastv"]
    assert all(site.after < site.before for site in report.sites)
    lengths = [float(seen.lengths(layer).float().mean()) for layer in range(4)]
    assert report.layer_tokens == pytest.approx(lengths)
    assert lengths[0] == lengths[1] > lengths[2] == lengths[3]


@pytest.mark.parametrize("name", LANGUAGE)
def test_methods_in_sequence_generate_as_recomputed(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    parts = [get("divprune", keep=0.5), get("fastv", layer=1, keep=0.6), get("fastv", layer=3, keep=0.5)]
    spies = [spied(part) for part in parts]
    with apply(net, spies[0][0] | spies[1][0] | spies[2][0]):
        output = generated(net, inputs)
    new = output.sequences[:, -STEPS:]
    longer = tiny.extended(inputs, new[:, :-1])
    replays = [Replay(part, list(decided)) for part, (_, decided) in zip(parts, spies, strict=True)]
    with apply(net, replays[0] | replays[1] | replays[2]):
        whole = tiny.run(net, {**longer, "position_ids": tiny.positions(net, longer)}, use_cache=False)[:, -STEPS:]
    assert difference(torch.stack(output.logits, 1), whole) < CLOSE
    assert torch.equal(whole.argmax(-1), new)


@each([case for case in LANGUAGE_CASES if not case.fields])
def test_a_prompt_without_pictures_beside_others_is_left_alone(case: Case) -> None:
    net = case.net()
    first = tiny.samples(net)[0]
    words = tiny.Sample((), (7,), 9)
    together = tiny.prompts(net, [first, words])
    alone = tiny.prompts(net, [words])
    whole = tiny.run(net, alone)[:, -1]
    with apply(net, case.made()) as run:
        batch = tiny.run(net, {**together, "position_ids": tiny.positions(net, together)})[:, -1]
        single = tiny.prompts(net, [first])
        assert {image.sample for image in run.report().images} == {0}
        picture = tiny.run(net, {**single, "position_ids": tiny.positions(net, single)})[:, -1]
    assert difference(batch[1], whole[0]) < CLOSE
    assert difference(batch[0], picture[0]) < CLOSE
