"""An answer is right when it matches after normalising; a share comes with an interval."""

import pytest

from jeton.measure.score import is_right, normalise, wilson


@pytest.mark.parametrize("said", ["Red", " red. ", "RED!", '"red"', "red\n"])
def test_case_space_and_outer_punctuation_do_not_matter(said):
    assert is_right(said, ["red"])


@pytest.mark.parametrize("said", ["", "dark red", "reddish", "re d"])
def test_other_words_are_wrong(said):
    assert not is_right(said, ["red"])


def test_any_accepted_answer_is_right():
    assert is_right("two", ["2", "two"])
    assert normalise("  Top   Left ") == "top left"


def test_the_interval_is_wilsons():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@pytest.mark.parametrize("right", [0, 5])
def test_the_interval_stays_within_0_and_1_and_is_never_empty(right):
    low, high = wilson(right, 5)
    assert 0 <= low < high <= 1


def test_no_question_gives_no_interval():
    with pytest.raises(ValueError, match="at least one question"):
        wilson(0, 0)
