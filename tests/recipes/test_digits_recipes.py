"""Recipes on the digits train several models into folders of their own, and go on where they were."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from jeton.recipes import _digits, lookupvit, sit

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")


def test_what_was_finished_is_read_and_the_rest_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(lookupvit, "RECIPE", replace(lookupvit.RECIPE, steps=2, batch=8))
    first = lookupvit.run(tmp_path, progress=False, seeds=(0,))
    weights = tmp_path / "seed-0" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    again = lookupvit.run(tmp_path, resume=True, progress=False, seeds=(0, 1))
    assert weights.stat().st_mtime_ns == written and (tmp_path / "seed-1" / "model.safetensors").exists()
    assert again["of each seed"]["0"] == first["of each seed"]["0"] == first["accuracy"]
    assert json.loads((tmp_path / "results.json").read_text())["accuracy"] == again["accuracy"]


def test_the_student_of_sit_is_saved_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sit, "RECIPE", replace(sit.RECIPE, steps=2, batch=8))
    told = sit.run(tmp_path, progress=False)
    assert told["patches behind each block"] == [32, 32, 16, 8, 8, 8] and 0 < told["share of FLOPs"] < 0.5
    assert {"sit.safetensors", "student", "results.json", "history.json"} <= {path.name for path in tmp_path.iterdir()}


def test_seeds_are_averaged():
    found = _digits.over_seeds((3, 5), [{"a": 0.5, "b": 1.0}, {"a": 1.0, "b": 0.00004}])
    assert found == {"accuracy": {"a": 0.75, "b": 0.5}, "of each seed": {"3": {"a": 0.5, "b": 1.0}, "5": {"a": 1.0, "b": 0.0}}}
