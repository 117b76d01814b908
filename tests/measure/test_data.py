"""Data files are read line by line; a bad line is named and stops the run or is skipped."""

import json
import logging

import pytest
from PIL import Image

from jeton.measure.data import BadLine, Question, as_questions, partners, read_questions, sample


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "words.png").write_text("no picture")
    return tmp_path


def write(folder, *lines):
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


GOOD = {"image": "a.png", "question": "What colour?", "answer": "red"}

BAD = {
    "not json": ("{'image': 1}", "not JSON"),
    "not an object": ("[1, 2]", "not a JSON object"),
    "no question": ({"image": "a.png", "answer": "red"}, "'question' is missing"),
    "no such image": (GOOD | {"image": "b.png"}, "there is no image"),
    "half an image": (GOOD | {"image": "broken.png"}, "corrupt"),
    "no image at all": (GOOD | {"image": "words.png"}, "corrupt"),
}


def test_paths_are_relative_to_the_file_and_answers_may_be_several(folder):
    (folder / "sub").mkdir()
    found = read_questions(write(folder, GOOD, "", GOOD | {"answer": ["red", "crimson"]}))
    assert [question.answers for question in found] == [("red",), ("red", "crimson")]
    assert found[0].image.size == (20, 10) and found[0].image.mode == "RGB"


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_line_stops_with_its_number(folder, bad):
    line, reason = bad
    with pytest.raises(BadLine, match=r"data.jsonl, line 2: ") as error:
        read_questions(write(folder, GOOD, line, GOOD))
    assert reason in str(error.value)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_line_is_skipped_with_a_warning_if_asked(folder, bad, caplog):
    with caplog.at_level(logging.WARNING):
        found = read_questions(write(folder, GOOD, bad[0], GOOD), on_bad_line="skip")
    assert len(found) == 2
    assert "line 2" in caplog.text and bad[1] in caplog.text


def test_a_file_without_a_usable_line_is_refused(folder):
    with pytest.raises(ValueError, match="no usable question"):
        read_questions(write(folder, "nonsense"), on_bad_line="skip")


def test_an_unknown_policy_is_refused(folder):
    with pytest.raises(ValueError, match="stop"):
        read_questions(write(folder, GOOD), on_bad_line="ignore")


def test_examples_without_a_field_are_refused_with_a_sentence():
    with pytest.raises(TypeError, match=r"example 0, a object, must have \.image, \.question and \.answer"):
        as_questions([object()])


def questions(*scenes):
    picture = Image.new("RGB", (2, 2))
    return [Question(picture, f"{number}?", ("x",), scene) for number, scene in enumerate(scenes)]


def test_partners_show_the_same_picture():
    assert partners(questions("a", "b", "a", "a", "c")) == [2, None, 3, 0, None]


def test_a_sample_is_fixed_by_its_seed_and_takes_whole_scenes():
    all_of_them = questions(*(str(number // 3) for number in range(30)))
    chosen = sample(all_of_them, 9, seed=1)
    assert chosen == sample(all_of_them, 9, seed=1) != sample(all_of_them, 9, seed=2)
    assert len({question.scene for question in chosen}) == 3
    assert sample(all_of_them, None) == all_of_them
    with pytest.raises(ValueError, match="limit=0"):
        sample(all_of_them, 0)
