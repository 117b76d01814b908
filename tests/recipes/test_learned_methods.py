"""Recipes of the methods that learn, on the digits: a few steps, and the whole run where its outcome is what was promised."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import ViTForImageClassification

from jeton.demo.digits import accuracy, splits
from jeton.engine import apply
from jeton.recipes import a_vit, diffrate, dynamicvit, sparsifiner
from jeton.train import Recipe

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")


def short(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, steps=2, batch=8)


def again(out, measured, spec: str) -> None:
    """The model and the weights in a folder are what was measured."""
    assert json.loads((out / "results.json").read_text())["machine"] == measured["machine"]
    model = ViTForImageClassification.from_pretrained(out).eval()
    with apply(model, spec):
        assert accuracy(model, splits()[1]) == pytest.approx(measured["accuracy of the test"], abs=1e-4)


def test_dynamicvit_trains_measures_and_writes(tmp_path):
    measured = dynamicvit.run(tmp_path, progress=False, recipe=short(dynamicvit.RECIPE))
    assert measured["trained"]["tokens"] == [65, 33, 33, 17, 9, 9] and measured["trained"]["flops"] < 0.5
    assert set(measured["losses"]) == {"task", "ratio", "logits", "tokens"}
    again(
        tmp_path,
        {**measured, "accuracy of the test": measured["trained"]["accuracy"]},
        f"dynamicvit(ratio=0.5, weights={str(tmp_path)!r})",
    )


def test_what_is_built_anew_depends_on_the_seed_alone(tmp_path):
    losses = []
    for number in (1, 2):
        torch.manual_seed(number)
        losses.append(dynamicvit.run(tmp_path / str(number), progress=False, recipe=short(dynamicvit.RECIPE))["losses"])
    assert losses[0] == losses[1]


def test_a_vit_trains_measures_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(a_vit, "ALONE", 3)
    measured = a_vit.run(tmp_path, progress=False, recipe=short(a_vit.RECIPE))
    assert set(measured["losses"]) == {"task", "ponder", "prior"} and len(measured["trained"]["tokens"]) == 6
    fields = ", ".join(f"{name}={value}" for name, value in a_vit.METHOD.items())
    again(tmp_path, {**measured, "accuracy of the test": measured["trained"]["accuracy"]}, f"a-vit({fields})")


def test_diffrate_trains_measures_and_writes(tmp_path):
    measured = diffrate.run(tmp_path, progress=False, recipe=short(diffrate.RECIPE))
    assert len(measured["trained"]["prune"]) == 6 and abs(measured["multiply-adds"] - measured["uniform"]["flops"]) < 0.02
    again(tmp_path, {**measured, "accuracy of the test": measured["trained"]["accuracy"]}, f"diffrate(weights={str(tmp_path)!r})")


def test_sparsifiner_trains_measures_and_writes(tmp_path):
    measured = sparsifiner.run(tmp_path, progress=False, imitate=short(sparsifiner.IMITATE), adapt=short(sparsifiner.ADAPT))
    assert set(measured["imitating"]["losses"]) == {"task", "attention"}
    assert measured["attention with masked pairs left out"] == pytest.approx((65 + 64 * 17) / 65**2, abs=1e-4)
    again(
        tmp_path, {**measured, "accuracy of the test": measured["adapted"]["accuracy"]}, f"sparsifiner(weights={str(tmp_path)!r})"
    )


@pytest.mark.slow
def test_diffrate_reaches_its_target_and_is_no_worse_than_uniform(tmp_path):
    measured = diffrate.run(tmp_path, progress=False)
    assert measured["multiply-adds"] == pytest.approx(diffrate.TARGET, rel=0.02)
    assert measured["trained"]["accuracy"] >= measured["uniform"]["accuracy"] - 0.01


@pytest.mark.slow
def test_learned_masks_beat_fixed_random_ones(tmp_path):
    measured = sparsifiner.run(tmp_path, progress=False)
    assert measured["imitated"]["accuracy"] > measured["fixed at random"]["accuracy"]
    assert measured["adapted"]["accuracy"] > measured["fixed at random, adapted"]["accuracy"]
