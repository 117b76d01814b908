"""Questions in words about a scene: which digit has a colour, which colour a digit, how many, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jeton.demo.data import COLOURS, NUMBERS, SIZE, Digit

KINDS = ("digit", "colour", "count", "position")
PLACES = ("top left", "top right", "bottom left", "bottom right")
_CLEAR_OF_MIDDLE = 10  # pixels, half a digit; nearer to a midline "left" and "right" would be a matter of taste


class Question(NamedTuple):
    kind: str
    text: str
    answer: str
    digit: int = -1  # the digit it is about, by its number in the scene; -1 for questions about all of them


def _place(digit: Digit) -> str | None:
    """The quarter of the image a digit lies in, or None where that is unclear."""
    x, y = (c - SIZE / 2 for c in digit.centre)
    if min(abs(x), abs(y)) < _CLEAR_OF_MIDDLE:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def ask(digits: Sequence[Digit]) -> list[Question]:
    """Every question about a scene that has exactly one right answer, grouped by kind."""
    values = [digit.value for digit in digits]
    questions = [Question("count", "How many digits are there?", NUMBERS[len(digits)])]
    for at, digit in enumerate(digits):
        number, unique, place = NUMBERS[digit.value], values.count(digit.value) == 1, _place(digit)
        questions.append(Question("digit", f"Which digit is {digit.colour}?", number, at))
        if unique:
            questions.append(Question("colour", f"What colour is the {number}?", digit.colour, at))
        if place:
            questions.append(Question("position", f"Where is the {digit.colour} digit?", place, at))
        if place and unique:
            questions.append(Question("position", f"Where is the {number}?", place, at))
    return sorted(questions, key=lambda question: KINDS.index(question.kind))


def describe(digits: Sequence[Digit]) -> list[Question]:
    """Requests to describe a scene, digit by digit in the order given. They are for training only.

    After "red" must come the digit that is red, after "seven" the colour of the seven: the plainest exercise in looking
    something up in the image. Answering "Which digit is red?" takes one step more, and is hard to learn without.
    """
    names = [(digit.colour, NUMBERS[digit.value]) for digit in digits]
    return [
        Question("caption", "What do you see?", ", ".join(f"{colour} {number}" for colour, number in names)),
        Question("caption", "Name the digits.", ", ".join(f"{number} {colour}" for colour, number in names)),
    ]


def all_questions() -> list[str]:
    """Every question that can be asked of any scene."""
    texts = ["How many digits are there?", *(question.text for question in describe([]))]
    for colour in COLOURS:
        texts += [f"Which digit is {colour}?", f"Where is the {colour} digit?"]
    for number in NUMBERS:
        texts += [f"What colour is the {number}?", f"Where is the {number}?"]
    return texts
