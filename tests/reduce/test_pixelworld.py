"""pixelworld: what counts as blank, and that dropping a group before the encoder equals hiding it from every other one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import jeton
import tiny
from jeton.engine import apply
from jeton.measure.render import Style, render
from jeton.ops.pixels import cut, variance
from jeton.tokens import Tokens

QWENS = ["Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"]
VALUES = 2 * 14 * 14


def patch(values: list[float]) -> Tensor:
    """One patch of three equal channels of 2 x 14 x 14 values: these, then zeros."""
    one = torch.zeros(VALUES)
    one[: len(values)] = torch.tensor(values)
    return one.expand(1, 3, -1)


def decided(scores: list[float], **fields: object) -> list[int]:
    step = jeton.get("pixelworld", **fields).reduce(Tokens(torch.zeros(1, len(scores), 1)), {"variance": torch.tensor([scores])})
    return step.index[0][step.real[0]].tolist()


def test_the_variance_of_a_patch() -> None:
    assert float(variance(patch([]))) == 0
    assert float(variance(patch([1.0] * (VALUES // 2)))) == pytest.approx(98 / 391, abs=1e-7)  # 0.2506
    assert float(variance(patch([1.0] * 4))) == pytest.approx(4 * 388 / 392 / 391, rel=1e-5)  # 0.0101
    assert float(variance(torch.cat([patch([1.0] * 196)[:, :1], patch([])[:, :2]], 1))) == pytest.approx(98 / 391 / 3, rel=1e-5)


def test_above_the_threshold_stays() -> None:
    half, four, three = (float(variance(patch([1.0] * count))) for count in (196, 4, 3))
    assert decided([0.0, half, four, three]) == [1, 2]
    assert decided([0.0, half, four, three], threshold=0.005) == [1, 2, 3]
    assert decided([0.0, 0.01, 0.0100001]) == [2]  # strictly above


def test_a_blank_picture_keeps_its_first_token() -> None:
    assert decided([0.0, 0.0, 0.0]) == [0]


def test_a_budget_takes_the_most_varied_and_the_first_of_equals() -> None:
    assert decided([0.5, 0.0, 0.5, 0.7, 0.5], keep=3) == [0, 2, 3]
    assert decided([0.0, 0.0, 0.0, 0.0], keep=2) == [0, 1]
    assert decided([0.1, 0.9, 0.2, 0.3], keep=0.5) == [1, 3]


def test_special_tokens_stay_beyond_the_budget() -> None:
    tokens = Tokens(torch.zeros(1, 5, 1), prefix=2)
    score = {"variance": torch.tensor([[0.0, 0.0, 0.3, 0.0, 0.6]])}
    for fields, kept in (({}, [0, 1, 2, 4]), ({"keep": 1}, [0, 1, 4]), ({"threshold": 1.0}, [0, 1, 2])):
        assert jeton.get("pixelworld", **fields).reduce(tokens, score).index[0].tolist() == kept


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), True, "0.01"])
def test_a_threshold_that_means_nothing_is_refused(threshold: object) -> None:
    with pytest.raises(ValueError, match="threshold"):
        jeton.get("pixelworld", threshold=threshold)


def test_pictures_are_cut_row_by_row() -> None:
    picture = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches = cut(picture, 2)
    assert patches.shape == (2, 6, 3, 4)
    assert torch.equal(patches[1, 4], picture[1, :, 2:4, 2:4].flatten(1))


# -- in the models ---------------------------------------------------------------------------------------------------------


def groups_of(grid: tuple[int, int, int], inked: list[tuple[int, int, int]]) -> Tensor:
    """Patches of one picture in merge order: noise in the groups (frame, row, column) that are inked, flat elsewhere."""
    t, h, w = grid
    noise = torch.randn(t, h // 2, w // 2, 4, 6 * tiny.PATCH**2, generator=torch.Generator().manual_seed(3))
    page = torch.full_like(noise, 0.7)
    for frame, row, col in inked:
        page[frame, row, col, 1] = noise[frame, row, col, 1]  # ink in one of its four patches
    return page.flatten(0, 3)


PAGES = [
    ((1, 8, 12), [(0, 0, 1), (0, 1, 0), (0, 1, 5), (0, 3, 2)]),
    ((1, 6, 6), [(0, 2, 2)]),
    ((1, 4, 8), []),  # blank: its first group stays
]


def page_inputs(net: nn.Module, frames: bool = False) -> tiny.Inputs:
    pages = [((3, 6, 8), [(0, 0, 0), (2, 1, 3), (2, 2, 3)])] if frames else PAGES
    samples = [tiny.Sample((tuple(grid),), (3, 4 + i), i) for i, (grid, _) in enumerate(pages)]
    inputs = tiny.prompts(net, samples)
    inputs["pixel_values_videos" if frames else "pixel_values"] = torch.cat([groups_of(*page) for page in pages])
    return inputs


@contextmanager
def hidden_from_others(net: nn.Module, grids: list[tuple[int, int, int]], kept: Tensor) -> Iterator[None]:
    """The unreduced tower with its attention written out as one masked map: within its own frame or window, as the model cuts
    them, no patch sees one of a group that is not in `kept` (groups,)."""
    seen = torch.nn.functional.scaled_dot_product_attention
    tower = net.model.visual
    group = torch.arange(sum(t * h * w for t, h, w in grids) // 4)
    if hasattr(tower, "fullatt_block_indexes"):
        group = windowed(grids)
    alive = kept[group].repeat_interleave(4)
    state = {"at": 0}

    def masked(query: Tensor, key: Tensor, value: Tensor, **more: object) -> Tensor:
        here = alive[state["at"] : state["at"] + key.shape[2]]
        state["at"] = (state["at"] + key.shape[2]) % len(alive)
        mask = here[None, None, None, :] | torch.eye(key.shape[2], dtype=torch.bool)  # a hidden one sees itself: no empty row
        weights = ((query @ key.mT) * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        return weights @ value

    torch.nn.functional.scaled_dot_product_attention = masked
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = seen


def windowed(grids: list[tuple[int, int, int]]) -> Tensor:
    """The order of groups in a tower with windows of 2 x 2 groups."""
    out, start = [], 0
    for t, h, w in grids:
        index = start + torch.arange(t * h * w // 4).reshape(t, h // 2, w // 2)
        for frame in index:
            out += [frame[i : i + 2, j : j + 2].flatten() for i in range(0, h // 2, 2) for j in range(0, w // 2, 2)]
        start += t * h * w // 4
    return torch.cat(out)


@torch.no_grad()
@pytest.mark.parametrize("frames", [False, True], ids=["pages", "video"])
@pytest.mark.parametrize("name", [*QWENS, "Qwen3VLForConditionalGeneration", "Glm4vForConditionalGeneration"])
def test_dropping_groups_equals_hiding_them_in_the_full_tower(name: str, frames: bool) -> None:
    net = tiny.model(name)
    inputs = page_inputs(net, frames)
    stream = "video" if frames else "image"
    pixels = "pixel_values_videos" if frames else "pixel_values"
    grids = [tuple(grid) for grid in inputs[f"{stream}_grid_thw"].tolist()]
    encode = getattr(net.model, f"get_{stream}_features")
    given = (inputs[pixels], inputs[f"{stream}_grid_thw"])
    with apply(net, "pixelworld") as run:
        short = torch.cat(list(getattr(net.model, f"get_{stream}_features")(*given).pooler_output))
        tiny.run(net, inputs)
        maps = [grid for image in range(len(grids)) for grid in run.assignment(image)]
        report = run.report()
    kept = torch.cat([grid.flatten() for grid in maps]) >= 0
    wanted = [3] if frames else [4, 1, 1]
    assert [image.after for image in report.images] == wanted and int(kept.sum()) == sum(wanted)
    assert bool((short[~kept] == 0).all())
    with hidden_from_others(net, grids, kept):
        full = torch.cat(list(encode(*given).pooler_output))
    assert torch.allclose(short[kept], full[kept], atol=1e-5, rtol=1e-4)
    plain = torch.cat(list(encode(*given).pooler_output))
    assert not torch.allclose(short[kept], plain[kept], atol=1e-2)  # without hiding them it is another function
    assert report.encoder_tokens[0] == pytest.approx(4 * sum(wanted) / len(grids))
    assert report.flops < report.flops_full


@torch.no_grad()
@pytest.mark.parametrize("name", QWENS)
def test_logits_equal_those_of_the_full_run_with_the_groups_hidden(name: str) -> None:
    """Hidden in the tower, and their placeholders in the language model, at the positions of the whole prompt."""
    net = tiny.model(name)
    inputs = tiny.prompts(net, [tiny.Sample(((1, 8, 12),), (3, 5), 1)])
    inputs["pixel_values"] = groups_of(*PAGES[0])
    ids = tiny.positions(net, inputs)
    with apply(net, "pixelworld") as run:
        short = tiny.run(net, {**inputs, "position_ids": ids})
        kept = torch.cat([grid.flatten() for grid in run.assignment(0)]) >= 0
    columns = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    columns[inputs["input_ids"] == tiny.IMAGE] = kept
    with hidden_from_others(net, [(1, 8, 12)], kept):
        features = torch.cat(list(net.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output))
    embeds = net.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == tiny.IMAGE] = features
    causal = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool).tril()
    mask = (causal & columns[0]) | torch.eye(embeds.shape[1], dtype=torch.bool)
    hidden = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
    full = net.lm_head(net.model.language_model(inputs_embeds=embeds, attention_mask=hidden, position_ids=ids).last_hidden_state)
    assert torch.allclose(short[0], full[0][columns[0]], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(short[0], tiny.run(net, {**inputs, "position_ids": ids})[0][columns[0]], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", QWENS)
def test_only_groups_touched_by_ink_stay_on_a_rendered_page(name: str) -> None:
    """Text in the top third of a page of 224 x 224, cut into patches as Qwen's processor cuts it."""
    net = tiny.model(name)
    page = render("Only the top of this page has text.", Style(width=224, min_height=224, padding=12, font_size=12)).image
    page = page.crop((0, 0, 224, 224)).resize((14 * 2 * tiny.PATCH, 14 * 2 * tiny.PATCH), Image.Resampling.BILINEAR)
    shade = torch.from_numpy(np.array(page.convert("L"))).float() / 127.5 - 1
    step = 2 * tiny.PATCH
    inked = torch.zeros(14, 14, dtype=torch.bool)
    for row in range(14):
        for col in range(14):
            inked[row, col] = shade[row * step : (row + 1) * step, col * step : (col + 1) * step].min() < 0.5
    lines = shade.reshape(14, 2, tiny.PATCH, 14, 2, tiny.PATCH).permute(0, 3, 1, 4, 2, 5).reshape(14 * 14 * 4, 1, 1, -1)
    inputs = tiny.prompts(net, [tiny.Sample(((1, 28, 28),), (3, 5), 1)])
    inputs["pixel_values"] = lines.expand(-1, 3, 2, -1).reshape(14 * 14 * 4, -1)
    with apply(net, "pixelworld") as run:
        tiny.run(net, inputs)
        grid = run.assignment(0)[0] >= 0
    assert bool((grid | ~inked).all()) and bool(inked.any())  # all that is inked stays
    rows = inked.any(1).nonzero().flatten()
    assert grid.any(1).nonzero().flatten().tolist() == rows.tolist() and int(rows.max()) < 14 // 3 + 1
    assert int(grid.sum()) < 60


def test_a_blank_image_keeps_one_group_and_generates() -> None:
    net = tiny.model(QWENS[1])
    inputs = tiny.prompts(net, [tiny.Sample(((1, 4, 8),), (3, 5), 1)])
    inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], 2.0)
    with apply(net, "pixelworld") as run:
        said = net.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert [image.after for image in run.report().images] == [1]
    assert said.shape[1] == inputs["input_ids"].shape[1] + 3


def test_images_and_videos_of_one_batch_lose_groups_together() -> None:
    """Pages, a page beside a video: each keeps its inked groups."""
    net = tiny.model(QWENS[0])
    inputs = tiny.prompts(net, [tiny.Sample((PAGES[0][0],), (3, 5), 1), tiny.Sample(((2, 4, 4), PAGES[1][0]), (2, 2, 4), 2)])
    inputs["pixel_values"] = torch.cat([groups_of(*PAGES[0]), groups_of(*PAGES[1])])
    inputs["pixel_values_videos"] = groups_of((2, 4, 4), [(0, 1, 1), (1, 0, 0)])
    with apply(net, "pixelworld") as run:
        tiny.run(net, inputs)
        assert [(image.sample, image.after) for image in run.report().images] == [(0, 4), (1, 2), (1, 1)]
        video = run.assignment(1)
    assert [(grid >= 0).nonzero().tolist() for grid in video] == [[[1, 1]], [[0, 0]]]


def test_later_methods_read_signals_of_what_is_left() -> None:
    """Attention received is read among the groups that stayed; groups that left can no longer be chosen."""
    net = tiny.model(QWENS[1])
    inputs = page_inputs(net)
    with apply(net, "pixelworld | fastervlm(keep=2, score='received')") as run:
        tiny.run(net, inputs)
        assert [image.after for image in run.report().images] == [2, 1, 1]
        grid = run.assignment(0)[0]
    assert {tuple(at) for at in (grid >= 0).nonzero().tolist()} < {(row, col) for _, row, col in PAGES[0][1]}


@torch.no_grad()
def test_patches_leave_a_clip_in_front_of_its_first_block() -> None:
    """The class token and the inked patches alone, against the model's own blocks run on them."""
    net = tiny.model("CLIPVisionModel")
    pixels = torch.full((2, 3, 28, 28), 0.3)
    pixels[0, :, 4:8, 8:12] = torch.randn(3, 4, 4)
    pixels[0, :, 24:, 20:24] = torch.randn(3, 4, 4)
    pixels[1, 0, :4, :4] = torch.randn(4, 4)
    with apply(net, "pixelworld") as run:
        net(pixel_values=pixels)
        tokens = run.tokens
    assert tokens.index[0].tolist() == [0, 1 + 9, 1 + 47] and tokens.count().tolist() == [3, 2]
    inner = getattr(net, "vision_model", net)
    for row, kept in ((0, [0, 10, 48]), (1, [0, 1])):
        hidden = inner.pre_layrnorm(inner.embeddings(pixels[row : row + 1]))[:, kept]
        for block in inner.encoder.layers:
            hidden = block(hidden, attention_mask=None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        assert torch.allclose(tokens.features[row, : len(kept)], hidden[0], atol=1e-5)


def test_where_patches_are_mixed_it_is_refused() -> None:
    for name in ("LlavaOnevisionForConditionalGeneration", "LlavaNextVideoForConditionalGeneration"):
        with pytest.raises(jeton.Unsupported, match="mixes neighbouring patches"):
            apply(tiny.model(name), "pixelworld").remove()


@torch.no_grad()
@pytest.mark.parametrize("name", QWENS)
def test_a_page_through_the_models_own_processor(name: str) -> None:
    """Groups of four consecutive patches are squares of the picture only in the order in which the processor lists patches."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    net = tiny.model(name)
    page = render("Ink above,", Style(width=128, min_height=192, padding=8)).image
    processor = Qwen2VLImageProcessorPil(patch_size=tiny.PATCH, size={"shortest_edge": 64, "longest_edge": 128 * 192})
    made = processor(page, return_tensors="pt")
    grid = tuple(made["image_grid_thw"][0].tolist())
    assert grid == (1, 192 // tiny.PATCH, 128 // tiny.PATCH)
    inputs = tiny.prompts(net, [tiny.Sample((grid,), (3, 5), 1)])
    inputs["pixel_values"] = made["pixel_values"]
    with apply(net, "pixelworld") as run:
        tiny.run(net, inputs)
        kept = run.assignment(0)[0] >= 0
    step = 2 * tiny.PATCH
    grey = np.array(page.convert("L"), float).reshape(grid[1] // 2, step, grid[2] // 2, step)
    inked = torch.from_numpy(
        (grey.max((1, 3)) - grey.min((1, 3))) > 60
    )  # clearly varied; a faint edge may be below the threshold
    touched = torch.from_numpy(grey.min((1, 3)) < 255)
    assert bool((kept | ~inked).all()) and not bool((kept & ~touched).any())
    assert 0 < int(kept.sum()) < kept.numel() / 4 and int(kept.any(1).nonzero().max()) < kept.shape[0] / 3
