"""The patch-size study: counts, the law, its verdict, and models brought to another patch size."""

import math

import pytest
import torch

import jeton
import tiny
from jeton.demo import digits
from jeton.measure.patch_scaling import Law, Point, Scaling, fit, repatched, study
from jeton.ops.flops import block_flops


def fixed(scores):
    """A study whose metric is looked up by patch size."""
    made = study(
        lambda patch, seed: torch.nn.Conv2d(1, 1, patch), lambda *_: None, lambda m: scores[m.kernel_size[0]], (16, 8, 4), 32
    )
    return made


def test_tokens_of_the_paper():
    found = study(lambda patch, seed: torch.nn.Identity(), lambda *_: None, lambda _: 0.5, (16, 8, 4, 2, 1), 224, seeds=[0])
    assert [point.tokens for point in found.points] == [196, 784, 3136, 12544, 50176]


def test_the_law_of_points_on_a_line():
    law = fit([4, 16, 64], [0.5, 0.6, 0.7])
    assert law.base == pytest.approx(0.4) and law.slope == pytest.approx(0.05)
    assert law.slope_error == pytest.approx(0, abs=1e-9) and law.r2 == pytest.approx(1)


def test_the_error_of_a_slope_by_hand():
    """x = 0, 1, 2 and y = 0, 0, 3: slope 1.5, residuals 0.5, -1, 0.5, variance 1.5 / 1, over Sxx = 2."""
    law = fit([1, 2, 4], [0.0, 0.0, 3.0])
    assert law.slope == pytest.approx(1.5) and law.base == pytest.approx(-0.5)
    assert law.slope_error == pytest.approx(math.sqrt(1.5 / 2)) and law.r2 == pytest.approx(1 - 1.5 / 6)
    assert fit([1, 2], [0.0, 1.0]).slope_error == math.inf
    with pytest.raises(ValueError, match="two numbers"):
        fit([4, 4], [0.1, 0.2])


def test_it_says_so_where_smaller_patches_did_not_help():
    rising, falling = fixed({16: 0.5, 8: 0.6, 4: 0.8}), fixed({16: 0.5, 8: 0.7, 4: 0.6})
    assert rising.monotone and "always helped" in str(rising)
    assert not falling.monotone and "NOT monotone" in str(falling) and falling.to_dict()["monotone"] is False
    assert Scaling((Point(2, 16, 1.0, (0.4, 0.6)), Point(1, 64, 1.0, (0.5, 0.5))), Law(0, 0, 0, 0, 0)).monotone is False


def test_every_seed_is_trained_and_measured_once():
    calls = []
    found = study(
        lambda patch, seed: digits.untrained(seed),
        lambda model, patch, seed: calls.append(("train", patch, seed)) or setattr(model, "taught", True),
        lambda model: float(len(calls)) if model.taught else 0.0,
        (2, 1),
        8,
        seeds=(3, 5),
        progress=lambda *told: calls.append(told),
    )
    assert calls == [
        ("train", 2, 3),
        (2, 3, 1.0),
        ("train", 2, 5),
        (2, 5, 3.0),
        ("train", 1, 3),
        (1, 3, 5.0),
        ("train", 1, 5),
        (1, 5, 7.0),
    ]
    assert found.points[1].flops == 6 * block_flops(65, 48, 192)
    with pytest.raises(ValueError, match="do not fill"):
        study(lambda *_: None, lambda *_: None, lambda _: 0.0, (3,), 8)


@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel", "CLIPVisionModel", "SiglipVisionModel", "Dinov2WithRegistersModel"])
def test_a_repatched_model_sees_enlarged_pictures_as_before(name):
    """At twice the patch on pictures twice as large: the same tokens, so the same output."""
    model, pixels = tiny.BUILDERS[name](), torch.randn(2, 3, 7, 7)
    pixels = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)  # patches of one colour, which enlarging leaves alone
    large = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    made = repatched(model, 8, {"image_size": 56})
    with torch.no_grad():
        torch.testing.assert_close(made(large)[0], model(pixels)[0], atol=1e-3, rtol=1e-3)
        smaller = repatched(model, 2)
        assert smaller(pixels)[0].shape[1] - model(pixels)[0].shape[1] == 14 * 14 - 49


def test_packed_towers_are_refused():
    with pytest.raises(jeton.Unsupported, match="patch convolution"):
        repatched(tiny.BUILDERS["Qwen2_5_VisionTransformerPretrainedModel"](), 8)
