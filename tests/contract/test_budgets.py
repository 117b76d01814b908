"""The budget is met exactly: at every site, in every sample, in the report and in what really runs."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from cases import (
    ENCODER_CASES,
    LANGUAGE,
    LANGUAGE_CASES,
    LITTLE_SAVED,
    LLAVA_NEXT,
    Case,
    budgeted,
    claimed,
    coordinates,
    each,
    made,
    structure_policy,
    view,
)
from references import runs_of_images, visual
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from witness import Replay, Seen, spied, watching

import tiny
from jeton.engine import apply, watch
from jeton.engine.run import Run
from jeton.method import Method, Unsupported, reducers
from jeton.models import Encoder, VisionLanguage
from jeton.needs import Need

BUDGETS = (0.3, 0.5, 7)


def text_lengths(net: nn.Module, inputs: tiny.Inputs) -> Tensor:
    return (inputs["attention_mask"].bool() & ~visual(net, inputs)).sum(1)


def depth_of(case: Case) -> int:
    """Encoder blocks or language-model layers that tokens pass where the method acts."""
    seen = view(case.model)
    if case.made().site == "layer":
        assert isinstance(seen, VisionLanguage)
        return len(seen.layers)
    return seen.feature_block + 1 if isinstance(seen, VisionLanguage) else len(seen.blocks)


def promised(method: Method, n: int, structure: int, policy: str, depth: int) -> tuple[int, bool]:
    """Tokens that should be left of an image of n tokens, of which `structure` show nothing."""
    promise = method.promise(n if policy == "pool" else n - structure, depth)
    return promise.count + (structure if policy == "keep" else 0), promise.exact


def check_images(case: Case, method: Method, run: Run, inputs: tiny.Inputs) -> list[int]:
    """The report's images against the promise. Returns what is left in each prompt."""
    report = run.report()
    assert run.layout is not None
    policy, structure = structure_policy(method), run.layout.album.structure
    inside = method.site in ("block", "pixels")
    left = [0] * inputs["input_ids"].shape[0]
    shared = [0] * len(left)  # what prompts whose images share a budget should have left
    expected = [count for sample in range(len(left)) for count in runs_of_images(inputs, sample)]
    assert [image.before for image in report.images] == expected
    for image in report.images:
        left[image.sample] += image.after
        if inside and case.model == LLAVA_NEXT:  # the budget holds for each crop; crops are cut to the picture afterwards
            shown = sum(int((grid >= 0).sum() > 0) and len(grid[grid >= 0].unique()) for grid in run.assignment(image.image))
            assert image.after == shown + structure[image.image]
            continue
        wanted, exact = promised(method, image.before, structure[image.image], policy, depth_of(case))
        if method.promise(image.before, depth_of(case)).per == "prompt":
            shared[image.sample] += wanted
            assert image.after >= 1
            continue
        assert image.after == wanted if exact else 1 <= image.after <= wanted
    assert shared in (left, [0] * len(left))
    return left


def check_door(seen: Seen, text: Tensor, left: list[int], lost_later: bool) -> None:
    """What arrived at the language model: all text, and of each prompt's images what the report says."""
    if not lost_later:
        assert (seen.real().sum(1) - text).tolist() == left
    assert (seen.lengths(len(seen.layers) - 1) - text).tolist() == left


@pytest.mark.parametrize("keep", BUDGETS, ids=str)
@each(LANGUAGE_CASES)
def test_language_models_get_exactly_what_was_promised(case: Case, keep: int | float) -> None:
    net, method = case.net(), case.made(keep)
    inputs = tiny.inputs_for(net)
    text = text_lengths(net, inputs)
    with apply(net, method) as run, watching(net) as seen:
        tiny.run(net, inputs)
        left = check_images(case, method, run, inputs)
        report = run.report()
    check_door(seen, text, left, method.site == "layer")
    lengths = [float(seen.lengths(layer).float().mean()) for layer in range(len(seen.layers))]
    assert report.layer_tokens == pytest.approx(lengths)


@pytest.mark.parametrize("keep", BUDGETS, ids=str)
@each(ENCODER_CASES)
def test_encoders_alone_keep_exactly_what_was_promised(case: Case, keep: int | float) -> None:
    net, method = case.net(), case.made(keep)
    encoder = view(case.model)
    assert isinstance(encoder, Encoder)
    inputs = tiny.inputs_for(net)
    before = tiny.real(net, inputs).sum(1) - encoder.prefix
    with apply(net, method) as run, watching(net) as seen:
        output = tiny.run(net, inputs)
        report, tokens = run.report(), run.tokens
    assert tokens is not None and torch.equal(tokens.features, output)
    for picture, count in enumerate(before.tolist()):
        promise = method.promise(count, depth_of(case))
        after = report.images[picture].after
        assert report.images[picture].before == count
        assert after == int(tokens.count()[picture]) - tokens.prefix
        if method.prefix_tokens:  # the class token is one of those counted
            after += tokens.prefix
        assert after == promise.count if promise.exact else 1 <= after <= promise.count
    assert report.encoder_tokens == pytest.approx(tuple(float(length) for length in seen.blocks))


@each([case for case in LANGUAGE_CASES if case.made().site == "block"])
def test_block_methods_meet_the_budget_in_the_encoder_itself(case: Case) -> None:
    """Also where a language model takes fewer blocks than the encoder has."""
    net, method = case.net(), case.made()
    seen_by = view(case.model)
    assert isinstance(seen_by, VisionLanguage)
    inputs = tiny.inputs_for(net)
    side = net.config.vision_config.image_size // net.config.vision_config.patch_size
    with apply(net, method), watching(net) as seen:
        tiny.run(net, inputs)
    prefix, used = seen_by.encoder.prefix, depth_of(case)
    assert seen.blocks[0] == side**2 + prefix or method.around  # what stands around attention acts at once
    if used < len(seen.blocks):
        assert seen.blocks[used] == method.promise(side**2, used).count + prefix


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_count_above_one_image_keeps_all_of_it_and_above_all_images_is_refused(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    counts = [count for sample in range(3) for count in runs_of_images(inputs, sample)]
    if len(set(counts)) > 1:
        assert isinstance(view(name), VisionLanguage)
        keep = sorted(counts)[-1] - 1
        with apply(net, "random", keep=keep, newlines=None if view(name).marks else "pool") as run:
            tiny.run(net, inputs)
            report = run.report()
            candidates = [n - s for n, s in zip(counts, run.layout.album.structure, strict=True)]
        with apply(net, "divprune", keep=keep) as run:
            tiny.run(net, inputs)
            report = run.report()
        assert [image.after for image in report.images] == [min(count, keep) for count in counts]
        assert any(image.after == image.before for image in report.images) and candidates
    with (
        apply(net, "divprune", keep=max(counts) + 1),
        pytest.raises(ValueError, match=f"keep {max(counts) + 1} tokens.*{max(counts)}"),
    ):
        tiny.run(net, inputs)


# -- other sizes, and the FLOPs ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def sized(language: bool, side: int) -> nn.Module:
    return tiny.tiny_llava(side=side) if language else tiny.tiny_clip(image_size=side * tiny.PATCH)


def ends(method: Method, side: int) -> None:
    """Run a method on pictures of another size: it leaves what it promised."""
    language = method.site == "layer"
    net = sized(language, side)
    size = side * tiny.PATCH
    inputs = tiny.prompts(net, [tiny.Sample(((),), (2, 3), 1)]) if language else {"pixel_values": torch.randn(2, 3, size, size)}
    promise = method.promise(side**2, 4 if language else 5)
    with apply(net, method) as run:
        tiny.run(net, inputs)
        tokens, images = run.tokens, run.report().images
    left = [image.after for image in images]
    if tokens is not None and method.prefix_tokens:
        left = [count + tokens.prefix for count in left]
    assert all(count == promise.count if promise.exact else 1 <= count <= promise.count for count in left)


@pytest.mark.parametrize("keep", [0.25, 0.9, 12, "default"], ids=str)
@pytest.mark.parametrize("side", [5, 9, 12])
@pytest.mark.parametrize("name", [card.id for card in reducers()])
def test_a_promise_holds_for_other_sizes_and_for_the_defaults(name: str, side: int, keep: int | float | str) -> None:
    if keep == "default":
        side = max(side, 12)  # some papers' defaults are counts above 81
    ends(made(name) if keep == "default" else budgeted(name, keep), side)


@each(
    [
        Case(card.id, (), name)
        for card in reducers()
        for name in LANGUAGE
        if card.object.site in ("encoder", "entry", "layer") and not coordinates(Case(card.id, (), name))
    ]
)
def test_reported_flops_are_those_that_ran(case: Case) -> None:
    """Counted by torch in the blocks, the projector and the layers, while recorded decisions are replayed: what it costs to come
    to them is no saving, and reported as time."""
    net = case.net("eager")
    if not claimed(case):
        with pytest.raises(Unsupported):
            apply(net, case.made()).remove()
        return
    inputs = tiny.inputs_for(net)
    with FlopCounterMode(display=False) as whole, watch(net) as run:
        tiny.run(net, inputs)
        full = run.report().flops
    spy, decided = spied(case.made())
    with apply(net, spy):
        tiny.run(net, inputs)
    with FlopCounterMode(display=False) as less, apply(net, Unasking(case.made(), decided)) as run:
        tiny.run(net, inputs)
        report = run.report()
        # where patches are mixed behind the encoder, products with dense matrices run in none of the modules counted
        outside = run.costs._mixing() if run.view.mixes else 0.0
    assert report.flops_full == full
    assert _counted(whole) == pytest.approx(full, rel=1e-6)
    assert _counted(less) == pytest.approx(report.flops - outside, rel=2e-3)
    assert report.flops < (0.98 if case.model in LITTLE_SAVED else 0.95) * full


class Unasking(Replay):
    """Replays decisions without looking at anything."""

    def needs(self) -> dict[str, Need]:
        return {}


def _counted(counter: FlopCounterMode) -> int:
    """FLOPs in encoder blocks, the projector and language-model layers, by the names of the modules."""
    total = 0
    for name, counts in counter.get_flop_counts().items():
        parts = name.split(".")
        inside = len(parts) > 2 and parts[-2] in ("layers", "layer") and parts[-1].isdigit()
        if inside or parts[-1] in ("multi_modal_projector", "head_linear", "visual_embeddings_table"):
            total += sum(counts.values())
    return total
