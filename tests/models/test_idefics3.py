"""Idefics3 and SmolVLM: which tiles make an image, and what stands between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import IDEFICS3, SMOLVLM
from PIL import Image
from references import generated
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import jeton
import tiny
from jeton.layout import Geometry
from patches import heard_scores, squares
from tiny_idefics3 import LINE, MARK, TILE

BOTH = (IDEFICS3, SMOLVLM)


def layout(net, inputs):
    with jeton.apply(net, "random", keep=0.5) as run:
        tiny.run(net, inputs)
        return run.layout


@pytest.mark.parametrize("name", BOTH)
def test_scores_of_patches_become_scores_of_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.model(name)
    inputs = tiny.prompts(net, tiny.samples(net)[:2])
    tiles = [rows * cols + 1 for sample in tiny.samples(net)[:2] for rows, cols in sample.images]
    scores = torch.rand(sum(tiles) * 36)
    told = heard_scores(net, inputs, scores, monkeypatch)
    for mine, part in zip(told, scores.split([36 * count for count in tiles]), strict=True):
        assert torch.allclose(mine, torch.cat([squares(tile, 6, 6, 2) for tile in part.split(36)]))


def test_tiles_lie_over_their_thumbnail_which_comes_last() -> None:
    """A score in the lower right of each picture, by hand: 2 rows of 3 tiles of 2 x 2 tokens."""
    item = Geometry.tiles(Geometry.blocks(4, 4, 2), 2, 3)
    assert item.kinds == ("thumbnail", *["crop"] * 6) and item.patches == 7 * 16
    assert item.unit.tolist() == [unit for unit in (1, 2, 3, 4, 5, 6, 0) for _ in range(4)]
    assert item.crop_row[::4].tolist() == [0, 0, 0, 1, 1, 1, 0] and item.crop_col[::4].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert item.crop_rows[::4].tolist() == [2] * 6 + [1] and item.crop_cols[::4].tolist() == [3] * 6 + [1]
    assert item.source[3].tolist() == [10, 11, 14, 15] and item.source[-1].tolist() == [6 * 16 + at for at in (10, 11, 14, 15)]


@pytest.mark.parametrize("name", BOTH)
def test_the_prompt_says_which_tiles_make_an_image(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    seen = layout(net, inputs)
    wanted = [grid for sample in tiny.samples(net) for grid in sample.images]
    assert [len(item.kinds) for item in seen.album.geometry] == [rows * cols + 1 for rows, cols in wanted]
    assert seen.sample == ((0, 1, 1, 2, 2) if name == SMOLVLM else (0, 1, 1, 2))
    crops = [(int(item.crop_rows.max()), int(item.crop_cols.max())) for item in seen.album.geometry]
    assert crops == [grid if grid != (0, 0) else (1, 1) for grid in wanted]
    # names of tiles are nobody's words; what closes an image is text again
    between = seen.between & inputs["attention_mask"].bool()
    assert bool((inputs["input_ids"][between] < tiny.WORDS).all()) and int(between.sum()) > 0
    assert int(((inputs["input_ids"] == MARK) & ~between).sum()) == 2 * len(wanted)


@pytest.mark.parametrize("name", BOTH)
def test_budgets_are_those_of_whole_images_and_frames_are_images(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    with jeton.apply(net, "divprune", keep=12) as run:
        tiny.run(net, inputs)
        after = [image.after for image in run.report().images]
    assert after == ([12, 12, 9, 9, 9] if name == SMOLVLM else [12, 12, 9, 12])
    assert "video" not in run.view.streams()
    with pytest.raises(jeton.Unsupported, match="takes no videos"):
        jeton.apply(net, "quota", scores=[[1.0, 0.5]])


@pytest.mark.parametrize("change", ["names", "rows", "adjacent"])
def test_a_prompt_that_its_processor_would_not_write_is_refused(change: str) -> None:
    net = tiny.model(IDEFICS3)
    inputs = tiny.prompts(net, tiny.one_image(net))
    ids = inputs["input_ids"][0]
    if change == "names":  # the second tile is announced by another mark
        ids[(ids == MARK).nonzero()[1]] = tiny.WORDS
    if change == "rows":  # the first row breaks where it should not
        at = int((ids == MARK).nonzero()[1])
        inputs["input_ids"] = torch.cat([ids[:at], torch.tensor([LINE]), ids[at:]])[None]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if change == "adjacent":  # 2 x 2 tiles without any thumbnail behind them
        inputs["pixel_values"], inputs["pixel_attention_mask"] = (
            inputs["pixel_values"][:, :4],
            inputs["pixel_attention_mask"][:, :4],
        )
        last = int((ids == MARK).nonzero()[4])
        inputs["input_ids"] = torch.cat([ids[: last - 2], ids[last + 12 - 1 :]])[None]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    tiny.run(net, inputs)
    with jeton.apply(net, "random", keep=0.5), pytest.raises(ValueError, match="let the model's processor write the prompt"):
        tiny.run(net, inputs)


@pytest.mark.parametrize("name", BOTH)
def test_a_black_tile_is_dropped_by_the_model_itself_and_nothing_hides_it(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.prompts(net, tiny.one_image(net))
    inputs["pixel_values"][0, 1] = 0
    refusals = (ValueError, RuntimeError, IndexError)  # versions of transformers find out at different places
    with pytest.raises(refusals):
        tiny.run(net, inputs)
    with jeton.apply(net, "random", keep=0.5), pytest.raises(refusals):
        tiny.run(net, inputs)
    assert tiny.run(net, tiny.inputs_for(net)).isfinite().all()


def test_pictures_that_are_all_black_are_refused_or_seen_as_the_model_does() -> None:
    sample = tiny.Sample(((0, 0),), (2, 3), 1)
    for name in BOTH:
        net = tiny.model(name)
        inputs = tiny.prompts(net, [sample])
        inputs["pixel_values"].zero_()
        with jeton.apply(net, "random", keep=3) as run:
            if name == SMOLVLM:  # keeps the first picture of a batch without any other
                tiny.run(net, inputs)
                assert [image.after for image in run.report().images] == [3]
            else:
                with pytest.raises(ValueError, match="takes pictures of zeros"):
                    tiny.run(net, inputs)


def test_hidden_patches_are_refused_by_the_tower() -> None:
    net = tiny.model("Idefics3VisionTransformer")
    inputs = tiny.inputs_for(net)
    mask = torch.ones(3, 6, 6, dtype=torch.bool)
    with jeton.apply(net, "tome", keep=0.5) as run:
        net(**inputs, patch_attention_mask=mask)
        assert run.tokens.features.shape[1] == 18
        mask[0, -1] = False
        with pytest.raises(jeton.Unsupported, match="hidden patches"):
            net(**inputs, patch_attention_mask=mask)
    with jeton.apply(net, "downsample", keep=0.5) as run:  # the mask is that of the larger picture
        net(**inputs, patch_attention_mask=torch.ones_like(mask))
        assert run.tokens.features.shape[1] < 36


# -- what the families' own processors write -------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    names = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    known = {"<pad>": tiny.PAD, "<s>": 1, "</s>": 2, "<image>": tiny.IMAGE, "<fake_token_around_image>": MARK, "\n": LINE}
    known |= {word: tiny.WORDS + number for number, word in enumerate(["\n\n", "<global-img>", *names, "what", "is", "Frame"])}
    known |= {"<end_of_utterance>": 60}
    made = Tokenizer(models.WordLevel(known, unk_token="what"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", padding_side="left")
    special = [word for word in known if word[0] in "<\n" and word not in ("<pad>", "<s>", "</s>")]
    fast.add_special_tokens({"additional_special_tokens": special})
    return fast


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(1, 255, (height, width, 3), np.uint8))


@pytest.mark.parametrize(("name", "images"), [(IDEFICS3, Idefics3ImageProcessorPil), (SMOLVLM, SmolVLMImageProcessorPil)])
def test_what_the_processor_writes_is_read(name: str, images: type) -> None:
    net = tiny.model(name)
    made = images(size={"longest_edge": 3 * TILE}, max_image_size={"longest_edge": TILE})
    processor = Idefics3Processor(made, tokenizer(), image_seq_len=9)
    inputs = processor(
        text=["<image> what is", "<image> is <image> what"],
        images=[[picture(40, 80)], [picture(90, 30), picture(70, 70)]],
        padding=True,
        return_tensors="pt",
    )
    with jeton.apply(net, "divprune", keep=0.5) as run:
        generated(net, dict(inputs), max_new_tokens=3)
        seen, report = run.layout, run.report()
    crops = [(int(item.crop_rows.max()), int(item.crop_cols.max())) for item in seen.album.geometry]
    assert crops == [(2, 3), (3, 1), (3, 3)] and seen.sample == (0, 1, 1)
    assert [image.before for image in report.images] == [9 * (rows * cols + 1) for rows, cols in crops]


def test_frames_of_a_video_as_smolvlm_writes_them_are_images() -> None:
    net, words = tiny.model(SMOLVLM), tokenizer()
    written = "".join(
        processing_smolvlm.FRAME_TIMESTAMP_MESSAGE.format(timestamp=f"00:0{second}")
        + processing_smolvlm._prompt_single_image(9, "<fake_token_around_image>", "<image>", "<global-img>")
        for second in range(3)
    )
    inputs = dict(words([written + "\n\n what"], return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    inputs["pixel_values"] = torch.randn(1, 3, 3, TILE, TILE)
    with jeton.apply(net, "divprune", keep=4) as run:
        generated(net, inputs, max_new_tokens=3)
        assert [(image.before, image.after) for image in run.report().images] == [(9, 4)] * 3
        assert run.layout.between is None  # times of frames stand between images
