"""Every family reads what its own processor makes: pictures of different sizes, several of them in a prompt, videos.

Those of Idefics3, SmolVLM, Gemma, PaliGemma, Aya Vision and Ovis2 are in the families' own files.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import COHERE2, GLM4V, INTERNVL, LLAVA, LLAVA_NEXT, LLAVA_PIXTRAL, MISTRAL3, NEXT_VIDEO, ONEVISION, QWEN, QWEN2, QWEN3
from PIL import Image
from references import CLOSE, difference, generated, recomputed, visual
from witness import spied

import processed
import tiny
import with_timm
from jeton.engine import apply
from jeton.method import get
from jeton.models import Encoder, adapt
from jeton.ops.pixels import LUMA

NEW = 4
# for each image and video of the prompts in processed.py its prompt and its tokens, worked out from the sizes by hand
CROPS = [(0, 36 + 8 * 13), (0, 36 + 12 * 5), (1, 36 + 6 * 7)]  # a thumbnail, and rows of the stitched crops with a newline each
GROUPS = [(0, 4 * 6), (0, 8 * 2), (1, 2 * 2), (2, 2 * 3 * 4)]
SHOWN: dict[str, list[list[tuple[int, int]]]] = {
    LLAVA: [[(0, 49), (0, 49), (1, 49)]],
    LLAVA_NEXT: [CROPS],
    NEXT_VIDEO: [[*CROPS, (2, 4 * 9)]],
    ONEVISION: [[(0, 25 + 1), (0, 25 + 1), (1, 25 + 5 * 7), (2, 4 * 9 + 1)]],
    QWEN2: [GROUPS],
    QWEN: [GROUPS],
    QWEN3: [GROUPS],
    GLM4V: [GROUPS[:3], [(0, 24)]],
    COHERE2: [[(0, 3 * 16), (0, 3 * 16), (1, 16)]],
    LLAVA_PIXTRAL: [[(0, 7 * 12), (0, 12 * 4), (1, 5 * 5)]],  # the longest edge is 48 pixels at most
    MISTRAL3: [[(0, 4 * 6), (0, 6 * 2), (1, 3 * 3)]],
    INTERNVL: [[(0, 3 * 9), (0, 4 * 9), (1, 9), *[(2, 9)] * 4]],  # frames are images to it
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tiny.Inputs]]:
    path = tmp_path_factory.mktemp("processed") / "inputs.pt"
    subprocess.run([sys.executable, processed.__file__, str(path)], check=True, cwd=Path(processed.__file__).parent)
    return torch.load(path, weights_only=False)


def own(made: dict[str, list[tiny.Inputs]], name: str) -> list[tiny.Inputs]:
    if name not in made and not with_timm.has_timm():
        pytest.skip("its processor wants torchvision, or timm")
    return made[name]


@pytest.mark.parametrize("name", SHOWN)
def test_prompts_of_the_familys_own_processor_are_read_and_decoded_as_recomputed(name: str, made: dict) -> None:
    net = tiny.model(name)
    for inputs, shown in zip(own(made, name), SHOWN[name], strict=True):
        spy, decided = spied(get("divprune", keep=0.5))
        with apply(net, spy) as run:
            output = generated(net, inputs, max_new_tokens=NEW)
            images = run.report().images
        assert [(image.sample, image.before) for image in images] == shown
        counts = visual(net, inputs).sum(1).tolist()
        assert counts == [sum(n for at, n in shown if at == sample) for sample in range(len(counts))]
        structure = name in (LLAVA_NEXT, NEXT_VIDEO, ONEVISION)  # newlines are no candidates
        assert structure or [image.after for image in images] == [round(image.before / 2) for image in images]
        new = output.sequences[:, -NEW:]
        reference = recomputed(net, inputs, get("divprune", keep=0.5), decided, new)
        assert difference(torch.stack(output.logits, 1), reference) < CLOSE and torch.equal(reference.argmax(-1), new)


@pytest.mark.parametrize("name", processed.ENCODERS)
def test_pixels_of_the_familys_own_processor_are_taken_back_to_the_picture(name: str, made: dict) -> None:
    """De-normalised with the adapter's mean and deviation, patch by patch; pictures of three sizes are one batch."""
    (inputs,) = own(made, name)
    net = tiny.model(name)
    view = adapt(net)
    assert isinstance(view, Encoder)
    picture = processed.exact(name)
    deep = 2 if picture.ndim == 4 else 1  # frames of a tubelet
    luma = torch.tensor(picture @ np.array(LUMA)).reshape(-1, *picture.shape[-3:-1])
    rows, cols = (side // tiny.PATCH for side in luma.shape[1:])
    cells = luma.reshape(-1, deep, rows, tiny.PATCH, cols, tiny.PATCH).permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1)
    assert (view.grey({"pixel_values": inputs[view.argument]})[0] - cells).abs().max() <= 1
    with apply(net, "uniform", keep=0.5) as run:
        tiny.run(net, inputs)
        images = run.report().images
    counts = inputs["spatial_shapes"].prod(1).tolist() if "spatial_shapes" in inputs else [len(cells)] * 3
    assert [image.before for image in images] == counts
    assert [image.after for image in images] == [get("uniform", keep=0.5).promise(n).count for n in counts]


@pytest.mark.parametrize("name", processed.PACKED)
def test_pixels_of_packed_towers_are_taken_back_to_the_picture(name: str) -> None:
    """Patches row by row in Pixtral, by squares of 2 x 2 in the others, where a picture stands for two frames."""
    picture, side = processed.picture(24, 32), 1 if name == "PixtralVisionModel" else 2
    made = processed.PACKED[name]()(Image.fromarray(picture), return_tensors="pt")
    inputs = made if side == 1 else {"hidden_states": made["pixel_values"], "grid_thw": made["image_grid_thw"]}
    rows, cols = (edge // tiny.PATCH // side for edge in picture.shape[:2])
    luma = torch.tensor(picture @ np.array(LUMA)).view(rows, side, tiny.PATCH, cols, side, tiny.PATCH)
    cells = luma.permute(0, 3, 1, 4, 2, 5).reshape(48, -1).repeat(1, side)
    view = adapt(tiny.model(name))
    assert isinstance(view, Encoder)
    assert (view.grey(inputs)[0] - cells).abs().max() <= 1
