"""Recipes of a few steps: what they write down is whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jeton.demo import digits
from jeton.recipes import glsim, patch_scaling, ph_reg, robust_token_attention

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")


def short(module, **more):
    return replace(module.RECIPE, steps=2, batch=8, **more)


def test_patch_sizes(tmp_path):
    found = patch_scaling.run(tmp_path, progress=False, recipe=short(patch_scaling), seeds=1)
    assert [point["tokens"] for point in found["points"]] == [4, 16, 64] and found["verdict"]


def test_token_attention_goes_on_where_it_was(tmp_path):
    found = robust_token_attention.run(tmp_path, progress=False, recipe=short(robust_token_attention), seeds=1)
    written = (tmp_path / "tap-and-adl-0" / "model.safetensors").stat().st_mtime_ns
    again = robust_token_attention.run(tmp_path, resume=True, progress=False, recipe=short(robust_token_attention), seeds=1)
    assert (tmp_path / "tap-and-adl-0" / "model.safetensors").stat().st_mtime_ns == written
    assert found["tap and adl"] == again["tap and adl"] and found["plain"] == again["plain"]


def test_salt_and_pepper_hits_its_share():
    unseen = digits.splits()[1]
    spoilt = robust_token_attention.noisy(unseen, 0.2)
    changed = spoilt.pixels != unseen.pixels
    assert set(spoilt.pixels[changed].unique().tolist()) <= {-1.0, 1.0}
    assert 0.08 < changed.float().mean() < 0.2, "black pixels that were hit by black stay as they are"


def test_registers(tmp_path):
    found = ph_reg.run(tmp_path, progress=False, recipe=short(ph_reg), most=40)
    assert found["cosine with denoised"]["denoised"] == pytest.approx(1.0, abs=1e-3)
    assert 0.5 < found["cosine with denoised"]["student"] < 1


def test_two_views(tmp_path):
    found = glsim.run(tmp_path, progress=False, recipe=short(glsim), first=short(glsim), seeds=1)
    assert [len(each) for each in found["accuracy"].values()] == [1, 1, 1]
    pictures = glsim.hidden(
        digits.Split(*(each[:50] for each in (digits.splits()[1].pixels, digits.splits()[1].labels))), 3
    ).pixels
    assert pictures.shape == (50, 1, 64, 64)
