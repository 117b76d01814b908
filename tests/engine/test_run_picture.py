"""`run.picture`: what stands behind a block, over the pixels the encoder saw."""

import numpy as np
import pytest
import torch
from PIL import Image

import jeton
import tiny
from jeton.engine.picture import overlay


def forward(name, seed=0):
    net = tiny.model(name)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
    return net, pixels


def array(image):
    return np.asarray(image).astype(int)


def test_each_block_is_shown_as_it_was():
    net, pixels = forward("CLIPVisionModel")
    with jeton.apply(net, "tome", r=6) as run, torch.no_grad():
        net(pixels)
        counts = [len(run.assignment(1, block)[0].unique()) for block in range(5)]
        pictures = [run.picture(block, image=1) for block in range(5)]
        assert counts == [43, 37, 31, 25, 19]
        assert (array(run.picture(-1, image=1)) == array(run.picture(image=1))).all()
        assert (array(run.picture(-5, image=1)) == array(pictures[0])).all()
        assert all((array(a) != array(b)).any() for a, b in zip(pictures, pictures[1:]))
        assert (run.assignment(1)[0] == run.assignment(1, 4)[0]).all()
        for wrong in (5, -6):
            with pytest.raises(ValueError, match="5 blocks"):
                run.picture(wrong)


def test_the_pixels_are_those_the_encoder_saw():
    net, pixels = forward("SiglipVisionModel")
    with jeton.apply(net, "divprune", keep=7) as run, torch.no_grad():
        net(pixels)
        levels = ((pixels[1] * 0.5 + 0.5) * 255).round().permute(1, 2, 0).byte().numpy()
        expected = overlay(Image.fromarray(levels), run.assignment(1)[0], 336)
        assert (array(run.picture(image=1)) == array(expected)).all()
        assert (
            array(run.picture(0, image=1)) == array(Image.fromarray(levels).resize((336, 336), Image.Resampling.BICUBIC))
        ).all()


def test_crops_stand_side_by_side():
    net = tiny.model("LlavaNextForConditionalGeneration")
    inputs = tiny.prompts(net, tiny.one_image(net))
    with jeton.apply(net, "fastv(keep=8)") as run, torch.no_grad():
        net(**inputs)
        maps = run.assignment(0)
        drawn = run.picture(size=100)
        crops = inputs["pixel_values"][0]
        assert len(maps) == len(crops) > 2
        assert drawn.width == 100 * len(maps) + 2 * (len(maps) - 1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (run.encoder.pixel_mean, run.encoder.pixel_std))
        last = ((crops[-1] * std + mean) * 255).round().clamp(0, 255).permute(1, 2, 0).byte().numpy()
        assert (array(drawn)[:, -100:] == array(overlay(Image.fromarray(last), maps[-1], 100))).all()


def test_patches_are_no_picture():
    net = tiny.model("Qwen2_5_VLForConditionalGeneration")
    with jeton.apply(net, "divprune", keep=4) as run, torch.no_grad():
        net(**tiny.prompts(net, tiny.one_image(net)))
        with pytest.raises(ValueError, match="of=IMAGE"):
            run.picture()
        assert run.picture(of=Image.new("RGB", (40, 20), "red"), size=80).size == (80, 40)
