"""CATP against its card."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from references import kept_at, numbered, visual
from torch import Tensor
from witness import Listening, kept, spied, watching

import tiny
from in_layers import Looking, eager, images
from jeton.engine import apply
from jeton.method import get
from jeton.needs import LastAttention, PairedText, PromptNumber
from jeton.ops.selection import top_k
from jeton.ops.similarity import cosine
from jeton.tokens import Tokens

LLAVA, QWEN = "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
CLOSE = 1e-5


def stage(**fields):
    return next(step for step in get("catp", layers=(0, 1), **fields).parts()[1].steps(16, 4) if step)


# -- before the language model -------------------------------------------------------------------------------------------


def test_the_first_selection_covers_and_fits_the_text():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    words = torch.tensor([[1.0, 0.0]])
    cover = get("catp", keep=1, first=0.5, balance=1.0).parts()[0]
    assert cover.promise(3).count == 2 and cover.reduce(Tokens(x), {"words": words}).index.tolist() == [[0, 2]]
    fit = get("catp", keep=1, first=0.5, balance=0.0).parts()[0]
    assert fit.reduce(Tokens(x), {"words": words}).index.tolist() == [[0, 1]]
    generator = torch.Generator().manual_seed(0)
    x, words = torch.randn(3, 40, 6, generator=generator), torch.randn(3, 6, generator=generator)
    fits = cosine(x, words[:, None])[..., 0]
    part = get("catp", keep=8, balance=0.0).parts()[0]
    assert torch.equal(part.reduce(Tokens(x), {"words": words}).index, top_k(fits, part.promise(40).count).index)


@pytest.mark.parametrize(
    ("n", "keep", "first", "left"), [(576, 128, 0.5, 352), (576, 0.25, 0.5, 360), (9, 9, 0.5, 9), (50, 10, 1.0, 10)]
)
def test_half_of_what_goes_goes_there(n, keep, first, left):
    method = get("catp", keep=keep, first=first)
    assert method.parts()[0].promise(n).count == left
    assert method.promise(n).count == (keep if isinstance(keep, int) else round(keep * n)) and method.promise(n).per == "prompt"
    assert get("catp").promise(576).count == 128  # 77.8 % removed


def shows(net, parts: list[tuple[int, Tensor]], pixels: Tensor) -> tiny.Inputs:
    """A prompt of two words and, for each part, the picture of this number and its text."""
    ids = [torch.tensor([20, 21])]
    for _, text in parts:
        ids += [torch.full((tiny.SIDE**2,), tiny.IMAGE), text]
    ids = torch.cat(ids)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels[[at for at, _ in parts]]}


def demos(net, seed: int = 0) -> tuple[list[tuple[int, Tensor]], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(4, 3, tiny.SIDE * tiny.PATCH, tiny.SIDE * tiny.PATCH, generator=generator)
    texts = [tiny.words(length, seed + length)[0] for length in (3, 5, 4, 6)]
    return list(enumerate(texts)), pixels


def test_every_image_is_paired_with_the_text_behind_it():
    net = tiny.model(LLAVA)
    listener = Listening("entry", {"words": PairedText(), "prompt": PromptNumber()})
    embed = net.get_input_embeddings()
    cases = [(2, 3, 5), (2, 0, 5), (3, 4, 0), (4, 0, 0)]
    inputs = tiny.prompts(net, [tiny.Sample(((), ()), text, 7 + i) for i, text in enumerate(cases)])
    with apply(net, listener):
        tiny.run(net, inputs)
    assert listener.heard["prompt"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]

    def run_of(case: int, number: int) -> Tensor:
        return tiny.words(cases[case][number], 10 * (7 + case) + number)[0]

    def all_of(case: int) -> Tensor:
        return torch.cat([run_of(case, number) for number in range(3)])

    wanted = [run_of(0, 1), run_of(0, 2), run_of(1, 2), run_of(1, 2), run_of(2, 1), all_of(2), all_of(3), all_of(3)]
    for row, ids in zip(listener.heard["words"], wanted, strict=True):
        torch.testing.assert_close(row, embed(ids).mean(0))
    assert not torch.allclose(listener.heard["words"][0], embed(run_of(0, 2)).mean(0), atol=1e-3)


def first_sets(net, inputs) -> list[list[int]]:
    spy, decided = spied(get("catp", keep=9))
    with apply(net, spy):
        tiny.run(net, inputs)
    return kept(decided[:1])[0]


def test_a_demonstration_never_changes_what_another_keeps_and_order_only_permutes():
    net = tiny.model(LLAVA)
    parts, pixels = demos(net)
    before = first_sets(net, shows(net, parts, pixels))
    other = pixels.clone()
    other[1] = other[1].flip(-1) + 1
    changed = first_sets(net, shows(net, [parts[0], (1, tiny.words(5, 77)[0]), *parts[2:]], other))
    assert [a == b for a, b in zip(before, changed, strict=True)] == [True, False, True, True]
    for order in list(permutations(range(4)))[1::5]:
        assert first_sets(net, shows(net, [parts[at] for at in order], pixels)) == [before[at] for at in order]
    asked = first_sets(net, shows(net, [*parts[:3], (3, tiny.words(6, 99)[0])], pixels))
    assert asked[:3] == before[:3] and asked[3] != before[3]  # behind the last image it is the question


# -- inside the language model ----------------------------------------------------------------------------------------------


def test_the_share_of_an_image_follows_its_rise():
    x, flat = torch.randn(3, 16, 4), torch.full((3, 16), 0.01)
    after = flat.clone()
    after[1, :8] += 0.03
    after[2, :2] += 0.04
    prompt = torch.zeros(3, dtype=torch.long)
    step = stage(keep=5).reduce(Tokens(x), {"before": flat, "after": after, "prompt": prompt, "quota": torch.full((3, 1), 5)})
    assert step.count().tolist() == [1, 10, 4]  # one each, and 12 shared by 0 : 0.24 : 0.08
    apart = stage(keep=5).reduce(Tokens(x), {"before": flat, "after": after, "quota": torch.full((3, 1), 5)})
    assert apart.count().tolist() == [5, 5, 5] and apart.mask is None


@pytest.mark.parametrize("change", [0.0, 0.02, -0.02])
def test_a_constant_change_changes_no_budget(change):
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(4, 16, generator=generator)
    prompt = torch.tensor([0, 0, 0, 1])
    signals = {"before": before, "after": before + change, "prompt": prompt, "quota": torch.full((4, 1), 5)}
    step = stage(keep=5).reduce(Tokens(torch.randn(4, 16, 4, generator=generator)), signals)
    assert step.count().tolist() == [5, 5, 5, 5]
    signals["after"] = before + torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None]
    assert stage(keep=5).reduce(Tokens(torch.randn(4, 16, 4)), signals).count().tolist() != [5, 5, 5, 5]


def test_the_last_image_goes_by_its_rise_and_others_also_by_likeness_to_it():
    x = torch.tensor([[[1.0, 0], [0, 1.0], [1.0, 0.1], [0.0, 1.0]], [[1.0, 0], [1.0, 0], [1.0, 0], [1.0, 0.0]]])
    rise = torch.tensor([[0.0, 0.1, 0.0, 0.09], [-0.3, -0.1, 0.2, -0.2]])
    signals = {"before": torch.zeros(2, 4), "after": rise, "prompt": torch.zeros(2, dtype=torch.long)}

    def chosen(mix: float) -> list[list[int]]:
        step = stage(keep=2, mix=mix).reduce(Tokens(x), {**signals, "quota": torch.full((2, 1), 2)})
        return kept([step])[0]

    assert chosen(0.0)[0][:1] == [0] and chosen(1.0)[0][:1] == [1]
    step = stage(keep=2).reduce(Tokens(x[1:]), {"before": torch.zeros(1, 4), "after": rise[1:]})
    assert step.index.tolist() == [[1, 2]]  # where nothing rises, the least fall


def toy(seed: int, static: bool = True) -> tuple[Tokens, dict[str, Tensor], int]:
    """Four demonstrations and a question's image, 16 tokens each; one demonstration is of the question's class.

    Attention is made by hand, as a softmax over all tokens: in the first layer it only grows towards the end of the prompt, in
    the second it also turns to tokens like the question."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.nn.functional.normalize(torch.randn(4, 12, generator=generator), dim=-1)
    match = int(torch.randint(4, (1,), generator=generator))
    about = torch.cat([classes, classes[match : match + 1]])
    x = about[:, None] + 0.5 * torch.randn(5, 16, 12, generator=generator)
    recency = 0.04 * torch.arange(80.0)
    a, b = (recency + 0.2 * torch.randn(80, generator=generator) for _ in range(2))
    b = b + 2 * cosine(x, about[-1].expand(5, 1, -1))[..., 0].flatten()
    before, after = (logits.softmax(0).view(5, 16) for logits in (a, b))
    if not static:
        before = torch.zeros_like(before)
    return Tokens(x), {"before": before, "after": after, "prompt": torch.zeros(5, dtype=torch.long)}, match


def hits(static: bool) -> int:
    """Of 50 trials, those in which the matching demonstration keeps most of all demonstrations."""
    found = 0
    for seed in range(50):
        tokens, signals, match = toy(seed, static)
        counts = stage(keep=6).reduce(tokens, {**signals, "quota": torch.full((5, 1), 6)}).count()
        assert int(counts.sum()) == 30 and int(counts.min()) >= 1
        found += int(counts[:4].argmax()) == match and int((counts[:4] == counts[:4].max()).sum()) == 1
    return found


def test_the_demonstration_that_matches_the_question_keeps_most():
    assert hits(static=True) >= 40
    assert hits(static=False) < 40  # the twin: attention as it is, which recency rules


# -- in the model --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", [LLAVA, QWEN])
@pytest.mark.parametrize("keep", [5, 0.25])
def test_every_block_of_image_tokens_stays_between_its_text_and_keeps_one(name, keep):
    net = tiny.model(name)
    inputs = numbered(net, tiny.inputs_for(net))
    with watching(net) as whole:
        tiny.run(net, inputs)
    with apply(net, "catp", keep=keep) as run, watching(net) as seen:
        tiny.run(net, inputs)
        report, layout = run.report(), run.layout
    text = inputs["attention_mask"].bool() & ~visual(net, inputs)
    there = kept_at(seen, whole, 3, inputs)
    assert bool(there[text].all())
    for image in report.images:
        own = layout.position[image.image, : image.before]
        assert int(there[image.sample, own].sum()) == image.after >= 1
    method = get("catp", keep=keep)
    for sample in range(3):
        wanted = sum(method.promise(image.before).count for image in report.images if image.sample == sample)
        assert sum(image.after for image in report.images if image.sample == sample) == wanted
    after = [image.after for image in report.images if image.sample == 1]
    assert after != [method.promise(image.before).count for image in report.images if image.sample == 1]
    rotary = seen.layers[3]["rotary"][0]
    assert rotary.shape[-2] == seen.layers[3]["hidden"].shape[1]


def test_attention_of_two_layers_is_read_even_if_tokens_left_in_between():
    net = tiny.model(LLAVA, "eager")
    inputs = tiny.inputs_for(net)
    look = Looking(3, before=LastAttention(0), after=LastAttention(2))
    with apply(net, get("fastv", layer=2, keep=20) | look) as run:
        maps = eager(net, inputs)
        slots, at, length = run.costs.flow.scene.rows.slot, run.costs.flow.at, run.costs.flow.length
    for image, (sample, columns) in enumerate(images(net, inputs)):
        early = maps[0][sample, -1][torch.tensor(columns)[slots[image]]]
        late = maps[2][sample, -1][at[image] - sample * length]
        assert (look.heard["before"][image].mean(0) - early).abs().max() < CLOSE
        assert (look.heard["after"][image].mean(0) - late).abs().max() < CLOSE


def test_layers_scale_with_the_depth_and_must_fit():
    def read(method, depth):
        (at,) = (layer for layer, step in enumerate(method.steps(100, depth)) if step)
        step = method.steps(100, depth)[at]
        assert at == step.layers[1] + 1
        return step.layers

    assert [read(get("catp"), depth) for depth in (32, 28, 12, 4, 3)] == [(6, 10), (5, 9), (2, 4), (1, 2), (0, 1)]
    assert read(get("catp", layers=(2, 5)), 8) == (2, 5)
    for layers, depth in (((2, 7), 8), (None, 2)):
        with pytest.raises(ValueError, match="choose layers"):
            get("catp", layers=layers).steps(100, depth)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"balance": 1.5}, "balance"),
        ({"mix": -1}, "mix"),
        ({"first": True}, "first"),
        ({"layers": (3,)}, "2 layers"),
        ({"layers": (4, 2)}, "ascending"),
    ],
)
def test_bad_fields_are_refused_with_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        get("catp", **fields)


def test_it_reads_the_text_of_each_image():
    with pytest.raises(ValueError, match="mean text embeddings"):
        get("catp").parts()[0].reduce(Tokens(torch.randn(1, 9, 3)))
    assert get("catp").needs()["words"] == PairedText()
