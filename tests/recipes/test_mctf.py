"""MCTF's fine-tuning: its three losses by hand, and a short run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import jeton
from jeton.recipes import mctf
from jeton.reduce.mctf import MCTF

pytest.importorskip("accelerate")
digits = pytest.importorskip("jeton.demo.digits")


@torch.no_grad()
def test_the_losses_by_hand():
    found = digits.load_digits()
    batch, method = (found.train.pixels[:16], found.train.labels[:16]), MCTF(r=8)
    told = mctf.loss(method, most=0)(found.model, batch)
    assert set(told) == {"student", "teacher", "consistency"}
    pixels, labels = batch
    with jeton.apply(found.model, method) as run:
        student, first = found.model(pixel_values=pixels).logits, run.tokens.features[:, 0]
    whole = found.model.vit(pixel_values=pixels).last_hidden_state[:, 0]
    teacher = found.model(pixel_values=pixels).logits
    right = student.softmax(-1).gather(1, labels[:, None])[:, 0] > 0.4
    each = (first - whole).square().mean(1)
    assert torch.allclose(told["student"], torch.nn.functional.cross_entropy(student, labels))
    assert torch.allclose(told["teacher"], torch.nn.functional.cross_entropy(teacher, labels))
    assert torch.allclose(told["consistency"], 3 * each[right].mean(), rtol=1e-4)
    assert told["consistency"] > 0 and right.any()
    none = mctf.loss(method, most=0, sure=1.0)(found.model, batch)["consistency"]
    assert none == 0


def test_the_teacher_is_not_moved_by_consistency():
    found = digits.load_digits()
    model, batch = found.model.train(), (found.train.pixels[:8], found.train.labels[:8])
    told = mctf.loss(MCTF(r=8), most=0)(model, batch)
    told["consistency"].backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0}
    assert any("layers.5" in name or "layer.5" in name for name in moved)
    assert not any(name.startswith("classifier") for name in moved)


def test_it_trains_measures_and_writes(tmp_path):
    recipe = dataclasses.replace(mctf.RECIPE, steps=3, batch=8)
    measured = mctf.run(tmp_path, progress=False, recipe=recipe)
    assert json.loads((tmp_path / "results.json").read_text())["after"] == measured["after"]
    assert measured["patches left"] == 2 and measured["before"]["all tokens"] == 0.9521
    assert (tmp_path / "model.safetensors").exists() or (tmp_path / "config.json").exists()
