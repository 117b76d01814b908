"""Calibrations: written, read, named in specs; and studies, in which methods search."""

from __future__ import annotations

import json

import pytest

from jeton.calibration import Calibration, Study, Trial
from jeton.method import get, known
from jeton.ops.search import Range


def found(**changes):
    trials = (Trial({"layer": 2, "schedule": (1.0, 1.0, 0.5, 0.5)}, "g-search(...)", 0.875), Trial({"kappa": 0.5}, "x", 0.5))
    fields = {"keep": None, "schedule": (1.0, 1.0, 0.5, 0.25)}
    values = {
        "method": "g-search", "fields": fields, "objective": "answer", "model": "Llava", "data": 30, "full": 0.9, "score": 0.875,
        "sampler": "bisection", "seed": 0, "space": {}, "trials": trials, "notes": ("a note",),
    }  # fmt: skip
    return Calibration(**{**values, **changes})


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = found().save(tmp_path / "deep" / "g.json")
    assert Calibration.load(path) == found()
    plain = json.loads(path.read_text())
    assert plain["data"] == 30 and plain["trials"][0]["score"] == 0.875 and plain["format"] == 1


@pytest.mark.parametrize("as_spec", [True, False])
def test_a_method_is_made_from_a_calibration_and_its_spec_makes_it_again(tmp_path, as_spec):
    path = found().save(tmp_path / "g.json")
    made = get(f"g-search(calibration={str(path)!r})") if as_spec else get("g-search", calibration=path)
    assert made == get("g-search", keep=None, schedule=(1.0, 1.0, 0.5, 0.25)) and hash(made) == hash(get(made.spec))
    assert get(made.spec) == made and made.calibration == found()
    made.save(tmp_path / "again.json")
    assert Calibration.load(tmp_path / "again.json") == found()


def test_fields_beside_a_calibration_win_and_then_it_is_no_longer_that_one(tmp_path):
    made = get("g-search", calibration=found().save(tmp_path / "g.json"), keep=0.5)
    assert made.keep == 0.5 and made.schedule == (1.0, 1.0, 0.5, 0.25) and made.calibration is None
    preset = get("vflowopt(calibration='10%', cell=5.0) | fastv")
    assert preset.methods[0].cell == 5.0 and preset.methods[0].keep == 0.1 and get(preset.spec) == preset


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no calibration"),
        ("[]", "is no calibration"),
        ('{"format": 9}', "another format"),
        ('{"format": 1}', "no calibration"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path, text, words):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        get("g-search", calibration=path)


def test_wrong_uses_are_refused_with_a_sentence(tmp_path):
    path = found().save(tmp_path / "g.json")
    with pytest.raises(ValueError, match="calibrates g-search, not vflowopt"):
        get("vflowopt", calibration=path)
    with pytest.raises(ValueError, match=r"no calibration file none\.json"):
        get("g-search", calibration="none.json")
    with pytest.raises(TypeError, match="path of a file that tune"):
        get("g-search", calibration=3)
    with pytest.raises(ValueError, match="was not fitted"):
        get("g-search").save(tmp_path / "x.json")
    with pytest.raises(TypeError, match=r"tome has nothing to calibrate; methods that have: .*g-search.*vflowopt"):
        get("tome").calibrated(Study(lambda method: 0.0, 4, 49))


def test_a_calibrated_method_compares_by_its_fields_alone():
    made = known(get("g-search", keep=0.5), found())
    assert made == get("g-search", keep=0.5) and hash(made) == hash(get("g-search", keep=0.5)) and made.calibration.data == 30
    assert "g-search" in str(found()) and "30 inputs of Llava" in str(found()) and "a note" in str(found())


def test_a_study_measures_a_candidate_once_and_keeps_what_it_tried():
    asked = []

    def measure(method):
        asked.append(method)
        return 1.0 if method is None else method.kappa

    study = Study(measure, 32, 576, calls=8, sampler="random")
    assert study.full == study.full == 1.0
    best = study.maximise(lambda point: get("g-search", **point), {"kappa": Range(0.1, 2.0)}, [{"kappa": 1.5}, {"kappa": 1.5}])
    assert len(asked) == 1 + len(study.trials) == 8 and study.trials[0].point == {"kappa": 1.5}
    assert best.kappa == max(trial.score for trial in study.trials) and study.searched == "random"
    assert study.space == {"kappa": {"low": 0.1, "high": 2.0, "log": False}}


def test_a_score_that_is_no_number_stops_the_search():
    with pytest.raises(ValueError, match="score of g-search is nan"):
        Study(lambda method: float("nan"), 32, 576).score(get("g-search"))
