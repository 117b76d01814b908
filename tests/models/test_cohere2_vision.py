"""Cohere 2 Vision: prompts as its processor writes them, which tiles make one image, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import AYA, COHERE2
from references import CLOSE, difference, generated, recomputed
from transformers import Cohere2VisionProcessor
from witness import spied

import jeton
import tiny
import tiny_cohere2
from jeton.engine import apply
from jeton.method import get

START, END, LINE = tiny_cohere2.MARKS


def written(tiles: int) -> list[int]:
    """One image as the processor writes it; the image processor in front of it wants torchvision."""
    writer = Cohere2VisionProcessor.__new__(Cohere2VisionProcessor)
    writer.image_token, writer.img_line_break_token, writer.boi_token, writer.eoi_token = "I", "L", "B", "E"
    writer.patch_size = 4  # what it calls so are the tokens at the side of a tile
    ids = {"I": tiny.IMAGE, "L": LINE, "B": START, "E": END}
    return [ids[sign] for sign in writer.replace_image_token({"num_patches": [tiles]}, 0)]


def prompt(*tiles: int) -> dict[str, Any]:
    """Images of so many tiles, nothing said between them."""
    ids = torch.tensor([[20, *(at for count in tiles for at in written(count)), 21, 22]])
    pixels = torch.randn(sum(tiles), 3, tiny_cohere2.TILE, tiny_cohere2.TILE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("tiles", [1, 5])
def test_prompts_here_are_written_as_its_own_processor_writes_them(tiles: int) -> None:
    assert written(tiles) == tiny_cohere2._written(tiles).tolist()


def test_what_its_processor_writes_is_read_and_decoded_as_recomputed() -> None:
    """Images next to each other stay apart, and the tiles of one together."""
    net, inputs = tiny.model(COHERE2), prompt(1, 3, 1)
    spy, decided = spied(get("divprune", keep=0.5))
    with apply(net, spy) as run:
        output = generated(net, inputs, max_new_tokens=3)
        report = run.report()
    assert [(image.before, image.after) for image in report.images] == [(16, 8), (48, 24), (16, 8)]
    new = output.sequences[:, -3:]
    reference = recomputed(net, inputs, get("divprune", keep=0.5), decided, new)
    assert difference(torch.stack(output.logits, 1), reference) < CLOSE and torch.equal(reference.argmax(-1), new)


def test_halves_beside_each_other_cannot_be_told_apart() -> None:
    with pytest.raises(jeton.Unsupported, match=r"Cohere2DecoderLayer.*fastv"):
        apply(tiny.model(COHERE2), "ima").remove()


@pytest.mark.parametrize(("name", "said"), [(COHERE2, "line breaks"), (AYA, "names of its tiles")])
def test_what_stands_between_tiles_is_text_not_newlines(name: str, said: str) -> None:
    with pytest.raises(jeton.Unsupported, match=said):
        apply(tiny.model(name), "divprune", keep=0.5, newlines="drop").remove()
