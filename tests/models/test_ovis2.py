"""Ovis2: tiles with indicator tokens between them are one image; indicators stay, with the rows of the visual table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Ovis2Processor
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from witness import watching

import jeton
import tiny
import tiny_ovis2
from jeton.engine import apply
from jeton.engine.encoder import EncoderSite
from jeton.models import VisionLanguage, adapt
from tokenized import tokenizer

NAME, SIDE, EACH = "Ovis2ForConditionalGeneration", tiny_ovis2.SIDE, tiny_ovis2.TOKENS
PATCHES = SIDE**2
INDICATORS = (tiny.START, tiny_ovis2.GRID, tiny_ovis2.COL, tiny_ovis2.ROW, tiny.END)


def view() -> VisionLanguage:
    seen = adapt(tiny.model(NAME))
    assert isinstance(seen, VisionLanguage)
    return seen


def test_a_token_is_made_of_a_square_of_patches() -> None:
    """By hand: the token in row 1 and column 2 of 3 x 3 has rows 2 and 3, columns 4 and 5 of 6 x 6."""
    geometry = view().geometry({"pixel_values": torch.zeros(1, 3, 24, 24)}, "image")[0]
    assert sorted(geometry.source[1 * 3 + 2].tolist()) == [2 * 6 + 4, 2 * 6 + 5, 3 * 6 + 4, 3 * 6 + 5]


def test_tiles_and_indicators_say_how_crops_lie_over_the_thumbnail() -> None:
    seen = view()
    tile = seen.geometry({"pixel_values": torch.zeros(1, 3, 24, 24)}, "image")[0]
    ids = torch.cat([tiny.words(2, 1)[0], tiny_ovis2.written(2, 3), tiny.words(3, 2)[0], tiny_ovis2.written(1, 1)])
    ids = torch.cat([ids, tiny.words(1, 3)[0], tiny_ovis2.written(1, 2)])[None]
    images = seen.prompted((tile,) * 11, ids, ids == tiny.IMAGE)
    assert [image.kinds for image in images] == [("thumbnail",) + ("crop",) * 6, ("image",), ("thumbnail", "crop", "crop")]
    assert images[2].crop_rows[-1] == 1 and images[2].crop_cols[-1] == 2
    crops = images[0].unit > 0
    places = torch.stack([images[0].unit, images[0].crop_row, images[0].crop_col], 1)[crops].unique(dim=0).tolist()
    assert places == [[1, 0, 0], [2, 0, 1], [3, 0, 2], [4, 1, 0], [5, 1, 1], [6, 1, 2]]
    assert torch.equal(images[0].source[images[0].unit == 4], tile.source + 4 * PATCHES)
    twice = torch.cat([ids, ids])  # as beams show them
    assert all(a is b for a, b in zip(seen.prompted((tile,) * 11, twice, twice == tiny.IMAGE), images, strict=True))


@pytest.mark.parametrize("patch", [0, 13, PATCHES + 2, 4 * PATCHES + 28])
@torch.no_grad()
def test_a_planted_score_keeps_the_token_that_holds_the_patch(patch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.model(NAME)
    inputs = tiny.prompts(net, tiny.one_image(net))  # a thumbnail and 2 x 2 crops
    score = torch.nn.functional.one_hot(torch.tensor(patch), 5 * PATCHES).float()
    monkeypatch.setattr(EncoderSite, "flat", lambda site, need: score)
    with apply(net, "fastervlm", keep=1, per="crop", score="received") as run:
        tiny.run(net, inputs)
        kept = [(grid >= 0).nonzero().tolist() for grid in run.assignment(0)]
    tile, own = divmod(patch, PATCHES)
    assert kept[tile] == [[own // SIDE // 2, own % SIDE // 2]] and len(kept) == 5


@torch.no_grad()
def test_indicators_stay_with_their_rows_of_the_visual_table() -> None:
    net = tiny.model(NAME)
    inputs = tiny.prompts(net, tiny.one_image(net))
    with apply(net, "divprune", keep=0.2) as run, watching(net) as seen:
        tiny.run(net, inputs)
        assert run.report().images[0].before == 5 * EACH
    rows = net.model.visual_embeddings_table.weight[-5:]
    text = inputs["input_ids"][0]
    for number, indicator in enumerate(INDICATORS):
        there = (seen.embeds[0] == rows[number]).all(1).sum()
        assert int(there) == int((text == indicator).sum()) > 0
    with pytest.raises(jeton.Unsupported, match="indicator tokens"):
        apply(net, "divprune", keep=0.2, newlines="drop").remove()


@torch.no_grad()
def test_tiles_share_the_budget_of_their_image_and_the_thumbnail_weighs_crops() -> None:
    net = tiny.model(NAME)
    inputs = tiny.inputs_for(net)
    with apply(net, "divprune", keep=12) as run:  # more than a tile has
        tiny.run(net, inputs)
        assert [(image.before, image.after) for image in run.report().images] == [(45, 12), (9, 9), (27, 12), (27, 12)]
    with apply(net, "globalcom2", keep=20, score="received", temperature=0.05) as run:
        tiny.run(net, inputs)
        kept = [int((grid >= 0).sum()) for grid in run.assignment(0)]
    assert len(kept) == 5 and sum(kept) == 20 and len(set(kept[1:])) > 1  # crops do not all keep the same


@torch.no_grad()
def test_pictures_of_different_sizes_through_the_familys_own_processor() -> None:
    named = {"<IMG_ATOM>": tiny.IMAGE, "<image>": 99}
    named |= dict(zip(("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"), INDICATORS, strict=True))
    processor = Ovis2Processor(
        Ovis2ImageProcessorPil(size={"height": 24, "width": 24}, crop_to_patches=True, max_patches=4),
        tokenizer(named),
        image_seq_length=EACH,
    )
    rng = np.random.default_rng(0)
    shots = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((24, 24), (24, 48), (48, 48))]
    texts = ["w20 w21 <image> w22 w23 <image> w24", "w30 <image> w31 w32 w33"]
    inputs = processor(images=shots, text=texts, padding=True, return_tensors="pt")
    net = tiny.model(NAME)
    with apply(net, "divprune", keep=0.25) as run:
        output = net.generate(
            **{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}, max_new_tokens=3, do_sample=False
        )
        images, kinds = run.report().images, [item.kinds for item in run.layout.album.geometry]
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3
    assert [image.sample for image in images] == [0, 0, 1]
    assert [len(each) for each in kinds] == [1, 3, 5] and kinds[1] == ("thumbnail", "crop", "crop")
    assert [image.before for image in images] == [EACH, 3 * EACH, 5 * EACH]
    assert all(image.after == round(image.before / 4) for image in images)


def test_tokens_cannot_leave_inside_the_tower() -> None:
    with pytest.raises(jeton.Unsupported, match="mixes neighbouring patches"):
        apply(tiny.model(NAME), "tome").remove()
    with pytest.raises(jeton.Unsupported, match="pictures of one size"):
        apply(tiny.model(NAME), "downsample", keep=0.5).remove()
    with pytest.raises(jeton.Unsupported, match="without a class token"):
        apply(tiny.model(NAME), "fastervlm").remove()
    with pytest.raises(jeton.Unsupported, match="no adapter for Ovis2VisionModel"):
        apply(tiny.model(NAME).model.vision_tower, "tome").remove()
