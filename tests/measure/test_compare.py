"""A comparison that was really run on the embedded model."""

import json
import math

import pytest
import torch

import jeton
from jeton.measure.compare import compare
from jeton.measure.data import as_questions
from jeton.measure.plan import CONTROLS

FIELDS = {
    "method", "spec", "keep", "control", "reason", "kept", "fraction", "accuracy", "low", "high", "retained", "flops", "seconds",
    "seconds_low", "seconds_high", "stages", "speedup", "speedup_low", "speedup_high", "ideal", "realised", "second_turn",
}  # fmt: skip


def test_the_full_model_comes_first_then_controls_and_methods(ran):
    assert [row.method for row in ran.rows] == ["full", *CONTROLS, "divprune", "tome(r=12)", "tome(keep=72) | fastv"]
    assert ran.rows[0].fraction == ran.rows[0].flops == ran.rows[0].speedup == 1


def test_tokens_are_counted_not_promised(ran):
    kept = {row.method: row.kept for row in ran.rows}
    assert kept["full"] == 144 and kept["divprune"] == kept["random"] == 36
    assert kept["tome(r=12)"] == 144 - 4 * 12, "the last encoder block of this model is not used, so four blocks merge"


def test_rows_are_consistent(ran):
    for row in ran.rows:
        assert row.low <= row.accuracy <= row.high
        assert row.fraction == pytest.approx(row.kept / 144)
        assert row.ideal == pytest.approx(1 / row.flops) and row.realised == pytest.approx(row.speedup / row.ideal)
        assert 0 < row.seconds_low <= row.seconds <= row.seconds_high
        assert 0 <= row.second_turn <= 1
        assert row.flops < 1 or row.method == "full"


def test_the_json_has_every_field_and_no_host_name(ran):
    data = json.loads(ran.to_json())
    assert data["model"] == "jeton demo" and data["rows"][0]["method"] == "full"
    assert all(set(row) == FIELDS for row in data["rows"])
    assert {"processor", "cores", "torch", "transformers"} <= set(data["machine"]) and "node" not in data["machine"]
    assert data["settings"]["questions"] == 8


def test_the_same_seed_gives_the_same_answers(ran):
    again = compare(methods=["divprune"], keep=[36], limit=8, batch_size=4, pictures=0, progress=False)
    pick = {row.method: (row.accuracy, row.second_turn, row.kept, row.flops) for row in ran.rows}
    for row in again.rows:
        assert (row.accuracy, row.second_turn, row.kept, row.flops) == pick[row.method]


def test_examples_show_where_tokens_went(ran):
    (shown,) = ran.shown
    assert shown.pictures[0].size == (84, 84)
    for look in shown.looks[1:]:
        (one,) = look.maps
        assert one.shape == (12, 12)
        kept = len(one[one >= 0].unique())
        assert kept <= 36 or look.case.label == "tome(r=12)"


def test_a_method_that_cannot_be_applied_is_a_row_with_the_reason(monkeypatch):
    from jeton import engine

    def refuse(model, method, **options):
        raise jeton.Unsupported("it lacks a class token.")

    monkeypatch.setattr(engine, "apply", refuse)
    result = compare(methods=["fastervlm"], keep=[36], limit=4, controls=False, pictures=1, progress=False)
    assert result.rows[1].reason == "it lacks a class token." and result.rows[1].accuracy is None
    assert "fastervlm (36 tokens): not applied. it lacks a class token." in " ".join(str(result).split())


def test_a_loaded_model_is_left_as_it_was():
    demo = jeton.load_demo()
    before = {name: value.clone() for name, value in demo.model.state_dict().items()}
    inputs = demo.processor(images=demo.examples[0].image, text=jeton.demo.prompt("Where?"), return_tensors="pt")
    logits = demo.model(**inputs).logits
    result = compare(
        demo.model, demo.processor, demo.examples[:4], ["divprune"], keep=[0.25], controls=False, pictures=0, progress=False
    )
    assert len(result.rows) == 2 and result.settings["questions"] == 4
    assert all(torch.equal(before[name], value) for name, value in demo.model.state_dict().items())
    assert torch.equal(demo.model(**inputs).logits, logits)


def test_questions_without_partner_have_no_second_turn():
    first, *_, last = as_questions(jeton.load_demo().examples)
    result = compare(examples=[first, last], methods=[], keep=[36], controls=False, pictures=0, progress=False)
    assert result.rows[0].second_turn is None


@pytest.mark.parametrize("keep", [[0], [1.5], [math.nan], [1000]])
def test_bad_budgets_are_refused(keep):
    with pytest.raises(ValueError, match="keep"):
        compare(methods=["divprune"], keep=keep, limit=2, progress=False)
