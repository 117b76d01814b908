"""Tuning on models: objectives, data, and what is refused before anything runs."""

from __future__ import annotations

import pytest
import torch

import jeton
import tiny
from jeton.engine import apply
from jeton.measure.data import as_questions
from jeton.measure.speak import Speaker
from jeton.measure.tune import tune
from jeton.method import get

LLAVA = "LlavaForConditionalGeneration"


def data(net, labels=True):
    made = []
    for sample in tiny.samples(net):
        inputs = tiny.prompts(net, [sample])
        target = inputs["input_ids"].clone()
        target[:, :-3] = -100
        made.append({**inputs, "labels": target} if labels else inputs)
    return made


def test_both_spellings_find_the_same_and_repeat(tmp_path):
    net = tiny.model(LLAVA)
    inputs = data(net)
    first = jeton.tune(net, "g-search", inputs, keep=0.5, calls=5, sampler="random", seed=1)
    second = get("g-search", keep=0.5).fit(net, iter(inputs), calls=5, sampler="random", seed=1)
    assert first == second and first.calibration == second.calibration
    assert type(first) is type(get("g-search")) and first.keep == 0.5
    first.save(tmp_path / "x.json")
    assert jeton.get("g-search", calibration=tmp_path / "x.json") == first == jeton.get(first.spec)


def test_the_score_is_taken_with_the_candidate_applied_and_the_model_left_as_it_was():
    net = tiny.model(LLAVA)
    lengths = []

    def words_left(model, inputs):
        with torch.no_grad():
            model(**inputs)
        lengths.append(running(model))
        return -abs(lengths[-1] - 20.0)

    def running(model):
        from jeton.engine.run import _RUNNING

        return _RUNNING[model].report().layer_tokens[-1]

    net.train()
    inputs = data(net, labels=False)[:1]
    before = tiny.run(net.eval(), inputs[0])
    net.train()
    tuned = tune(net, "g-search", inputs, score=words_left, keep=0.6, calls=6, sampler="random")
    assert net.training and tuned.calibration.objective == "words_left"
    assert len(set(lengths)) > 1 and lengths[0] == inputs[0]["input_ids"].shape[1]
    assert torch.equal(tiny.run(net.eval(), inputs[0]), before)


@pytest.mark.parametrize("name", [LLAVA, "LlavaNextForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"])
def test_objectives_of_a_batch_are_those_of_its_samples(name):
    """The cosine looks at each prompt's last token, padded or not; with all tokens it is 1."""
    net = tiny.model(name)
    together = tiny.inputs_for(net)
    together = {**together, "position_ids": tiny.positions(net, together)}
    singles = [tiny.prompts(net, [sample]) for sample in tiny.samples(net)]
    singles = [{**each, "position_ids": tiny.positions(net, each)} for each in singles]
    batch, alone = (
        tune(net, "vflowopt", given, keep=0.3, calls=3, sampler="random", objective="cosine").calibration
        for given in ([together], singles)
    )
    assert batch.full == pytest.approx(1.0) and batch.data == alone.data == 3
    assert [t.score for t in batch.trials] == pytest.approx([t.score for t in alone.trials], abs=1e-4)
    assert batch.trials[0].score < 0.999


def test_answers_of_the_embedded_model_are_worth_their_likelihood():
    demo = jeton.load_demo()
    speaker = Speaker(demo.model, demo.processor)
    questions = as_questions(demo.examples)[:3]
    inputs = [speaker.answered(question) for question in questions]
    for question, each in zip(questions, inputs, strict=True):
        said = each["labels"][each["labels"] != -100]
        assert demo.processor.tokenizer.decode(said).strip() == question.answers[0]
    found = tune(demo.model, "g-search", inputs, calls=3, sampler="random").calibration
    assert 0.5 < found.full <= 1.0 and 0 < found.score <= 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"method": "tome"}, TypeError, "tome has nothing to calibrate"),
        ({"method": "g-search | fastv"}, TypeError, "one method at a time"),
        ({"objective": "best"}, ValueError, "no objective 'best'"),
        ({"sampler": "luck"}, ValueError, "no sampler 'luck'"),
        ({"data": []}, ValueError, "at least one calibration input"),
        ({"data": ["text"]}, TypeError, "input 0 must be a mapping"),
        ({"data": "unlabelled"}, ValueError, "input 0 has no labels"),
        ({"data": "text"}, ValueError, "no picture was found"),
        ({"kep": 3}, TypeError, "no field 'kep'"),
    ],
)
def test_what_cannot_be_tuned_is_refused_with_a_sentence(arguments, error, words):
    net = tiny.model(LLAVA)
    given = {"method": "g-search", "data": data(net), **arguments}
    if given["data"] == "unlabelled":
        given["data"] = data(net, labels=False)
    if given["data"] == "text":
        text = tiny.text_only(net)
        given["data"] = [{**text, "labels": text["input_ids"]}]
    with pytest.raises(error, match=words):
        tune(net, given.pop("method"), given.pop("data"), **given)


def test_a_model_in_use_is_left_to_its_user():
    net = tiny.model(LLAVA)
    with apply(net, "fastv"), pytest.raises(RuntimeError, match="already has fastv applied"):
        tune(net, "g-search", data(net))
    with pytest.raises(TypeError, match="no language model"):
        tune(tiny.model("ViTModel"), "vflowopt", [{"input_ids": torch.zeros(1, 1)}])


def test_progress_is_shown_only_when_asked_for(capsys):
    net = tiny.model(LLAVA)
    tune(net, "g-search", data(net)[:1], calls=2, sampler="random")
    assert capsys.readouterr() == ("", "")
    tune(net, "g-search", data(net)[:1], calls=2, sampler="random", progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "tuning g-search" in shown.err and "best answer 0." in shown.err
