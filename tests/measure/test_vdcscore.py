"""VDCscore with judges that follow a script."""

import json

import pytest

from jeton.measure.vdcscore import Unread, grade_of, make_questions, read_questions, vdcscore

PAIRS = [("What is it?", "a cat"), ("Which colour?", "black"), ("Where?", "on a sofa"), ("What does it do?", "it sleeps")]


def script(*grades):
    """A judge that answers anything, and grades as told."""
    left = list(grades)

    def judge(prompt):
        return left.pop(0) if '"pred"' in prompt else "something"

    return judge


def grade(yes, score):
    return json.dumps({"pred": "yes" if yes else "no", "score": score})


def oracle(prompt):
    """Answers with what the caption has of the true answers, and grades by equality."""
    answers = dict(PAIRS)
    if '"pred"' in prompt:
        lines = dict(line.split(": ", 1) for line in prompt.splitlines() if line.startswith(("Correct", "Their")))
        same = lines["Correct answer"] == lines["Their answer"]
        return grade(same, 5 * same)
    caption, question = prompt.split("\n\n")[1], prompt.split("Question: ")[1].split("\n")[0]
    return answers[question] if answers[question] in caption else "not mentioned"


def test_the_share_of_yes_and_the_mean_grade():
    judge = script(grade(True, 5), grade(True, 4), grade(False, 0), grade(True, 3))
    found = vdcscore({"v": "a caption"}, {"v": PAIRS}, judge)
    assert (found.accuracy, found.score, found.unread) == (0.75, 3.0, 0)


def test_a_video_with_nothing_right_lowers_the_mean():
    judge = script(*[grade(True, 5)] * 4, *[grade(False, 0)] * 4)
    found = vdcscore({"a": "x", "b": "y"}, {"a": PAIRS, "b": PAIRS}, judge)
    assert (found.accuracy, found.score) == (0.5, 2.5) and [video.accuracy for video in found.videos] == [1, 0]


def test_the_reference_itself_is_right_and_an_empty_caption_wrong():
    reference = "A cat, black, sleeps: a cat on a sofa; it sleeps."
    right = vdcscore({"v": reference}, {"v": PAIRS}, oracle)
    assert (right.accuracy, right.score) == (1.0, 5.0)
    assert vdcscore({"v": ""}, {"v": PAIRS}, oracle).accuracy == 0.0


def test_grades_that_cannot_be_read_count_as_wrong_and_are_counted():
    judge = script(grade(True, 5), "I think so", "{'pred': 'YES', 'score': 4}", '{"pred": "yes", "score": 9}')
    found = vdcscore({"v": "x"}, {"v": PAIRS}, judge)
    assert (found.videos[0].right, found.unread, found.score) == (2, 2, 9 / 4)


def test_what_a_grade_looks_like():
    assert grade_of('Sure! {"pred": "no", "score": "2"}') == (False, 2)
    for text in ("yes 4", '{"pred": "yes"}', '{"pred": "maybe", "score": 3}', '{"pred": "yes", "score": 4.5}'):
        with pytest.raises(Unread):
            grade_of(text)


def test_questions_are_made_and_read(tmp_path):
    made = make_questions("A cat.", lambda prompt: 'Here: [{"question": "What?", "answer": "a cat"}]')
    assert made == [("What?", "a cat")]
    with pytest.raises(Unread, match="list of questions"):
        make_questions("A cat.", lambda prompt: "no")
    path = tmp_path / "vdc.jsonl"
    path.write_text('{"video_name": "a.mp4", "qa_list": [{"question": "What?", "answer": "a cat"}]}\n\n')
    assert read_questions(path) == {"a.mp4": [("What?", "a cat")]}
    path.write_text('{"video_name": "a.mp4"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_questions(path)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="no caption of 'b'"):
        vdcscore({"a": "x"}, {"b": PAIRS}, oracle)
    with pytest.raises(ValueError, match="no question about 'a'"):
        vdcscore({"a": "x"}, {"a": []}, oracle)
