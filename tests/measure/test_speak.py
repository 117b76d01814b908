"""A second turn on the cache of the first equals one long prompt, in batches whose prompts and answers differ in length."""

import pytest
import torch

from jeton.measure.data import as_questions
from jeton.measure.speak import Speaker
from jeton.measure.subject import load_subject
from jeton.measure.trial import partner_of


@pytest.fixture(scope="module")
def speaker():
    subject = load_subject()
    return Speaker(subject.model, subject.processor)


@pytest.fixture(scope="module")
def asked():
    return as_questions(load_subject().examples[:12])


def test_prompts_follow_the_models_template(speaker):
    assert speaker.prompt("Where?") == "USER: <image>\nWhere? ASSISTANT:"
    assert speaker.prompt("Where?", "here", "Why?") == "USER: <image>\nWhere? ASSISTANT: here</s>USER: Why? ASSISTANT:"


def test_a_processor_without_template_is_spoken_to_plainly(speaker, monkeypatch):
    monkeypatch.setattr(speaker.processor, "chat_template", None)
    assert speaker.prompt("Where?") == "USER: <image>\nWhere? ASSISTANT:"
    assert speaker.prompt("Where?", "here", "Why?").endswith("ASSISTANT: here USER: Why? ASSISTANT:")


def test_a_template_that_hides_answers_is_named(speaker, monkeypatch):
    monkeypatch.setattr(speaker.processor, "chat_template", "always the same")
    with pytest.raises(ValueError, match="second turn"):
        speaker._follow_up("a", "b")


def test_a_second_turn_equals_one_long_prompt(speaker, asked):
    inputs = speaker.encode(asked)
    assert (inputs["attention_mask"] == 0).any(), "the batch must be ragged"
    turn = speaker.ask(inputs, 6)
    second = [(after or first).text for after, first in zip(partner_of(asked), asked, strict=True)]
    said = speaker.ask_again(turn, [question.text for question in asked], second, 6)
    for row, question in enumerate(asked):
        follow_up = speaker.tokenizer(speaker._follow_up(question.text, second[row]), add_special_tokens=False)["input_ids"]
        ids = torch.cat([turn.sequences[row][turn.mask[row]], torch.tensor(follow_up)])[None]
        pixels = inputs["pixel_values"][row : row + 1]
        out = speaker.model.generate(
            ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=6, do_sample=False
        )
        assert speaker.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == said[row]


def test_answers_are_given_room_for_one_token_too_many(speaker, asked):
    longest = max(len(speaker.tokenizer(f" {a}", add_special_tokens=False)["input_ids"]) for q in asked for a in q.answers)
    assert speaker.answer_length(asked) == longest + 1
