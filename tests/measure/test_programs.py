"""Programs as answers: parsed, run within bounds, refused, chosen; and questions about charts."""

import time

import pytest

from jeton.measure.charts import Chart, picture, questions, random_chart, relaxed, relaxed_accuracy
from jeton.measure.programs import Outcome, asks_for_calculation, choose, parse, run


def test_steps_are_run_in_order():
    assert run("<step>x=[1,2,3]</step><step>Answer=sum(x)</step>") == Outcome("6")
    assert parse("First,\n<step>a = 1</step> then\n<step>Answer = a</step>") == "a = 1\nAnswer = a"


@pytest.mark.parametrize(
    ("value", "said"),
    [("np.mean([1, 2])", "1.5"), ("[7]", "7"), ("np.array([4])", "4"), ("['a', 'b', 'c']", "a, b and c"), ("3 > 2", "Yes"),
     ("np.max([1]) > 2", "No"), ("len([v for v in [1, 5] if v > 2])", "1"), ("['x', 'y'][np.argmax([1, 2])]", "y"),
     ("max([3, 1], key=lambda v: -v)", "1"), ("round(2 / 3, 2)", "0.67")],
)  # fmt: skip
def test_answers_as_text(value, said):
    assert run(f"<step>Answer={value}</step>") == Outcome(said)


def test_a_loop_over_lines():
    assert run("<step>s = 0\nfor v in [1, 2]:\n    s += v</step><step>Answer = s</step>").answer == "3"


WRONG = {
    "import": ("import os\nAnswer=1", "imports"),
    "file": ("Answer=open('/etc/passwd').read()", "attribute 'read'"),
    "file by name": ("x=open('/etc/passwd')\nAnswer=1", "not defined"),
    "underscore": ("Answer=().__class__", "attribute '__class__'"),
    "name": ("Answer=__builtins__", "the name '__builtins__'"),
    "eval": ("Answer=eval('1')", "not defined"),
    "function": ("def f(): return 1\nAnswer=f()", "FunctionDef"),
    "format": ("Answer='{0.__class__}'.format(1)", "attribute 'format'"),
    "text": ("what?", "no program"),
    "nothing": ("x=1", "no variable Answer"),
    "division": ("Answer=1/0", "division by zero"),
    "kind": ("Answer={}", "is a dict"),
    "memory": ("Answer=len('a'*10**10)", "more than 64 MB"),
    "numpy file": ("Answer=np.load('x')", "attribute 'load'"),
}


@pytest.mark.parametrize(("program", "words"), WRONG.values(), ids=WRONG)
def test_what_is_no_calculation_is_an_error_of_the_program(program, words):
    found = run(f"<step>{program}</step>", megabytes=64)
    assert found.answer == "" and words in found.error and not found.usable


def test_an_endless_loop_ends():
    start = time.monotonic()
    found = run("<step>while True:\n    pass</step><step>Answer=1</step>", seconds=0.5)
    assert "longer than 0.5 s" in found.error and time.monotonic() - start < 10


def test_a_text_without_steps_is_an_error():
    assert "no <step>" in run("The answer is 4.").error
    with pytest.raises(ValueError, match="some time"):
        run("<step>Answer=1</step>", seconds=0)


def test_the_program_answers_where_the_question_asks_for_a_calculation():
    assert asks_for_calculation("What is the SUM of both?") and asks_for_calculation("How many colors are there?")
    assert not asks_for_calculation("Which summer is shown?")
    assert choose("What is the average?", Outcome("4"), "5") == "4"
    assert choose("What is the average?", Outcome("", "it failed"), "5") == "5"
    assert choose("What is the average?", Outcome("nan"), "5") == choose("What is the ratio?", Outcome("inf"), "5") == "5"
    assert choose("What is shown?", Outcome("4"), "5") == "5"


@pytest.mark.parametrize(
    ("said", "target", "right"),
    [("105", "100", True), ("105.1", "100", False), ("95", "100", True), ("0", "0", True), ("0.01", "0", False),
     ("50", "-10", False), ("-10.4", "-10", True), ("-9.4", "-10", False), ("Yes", "Yes", True), ("yes", "Yes", False),
     ("nan", "5", False), ("4", "four", False)],
)  # fmt: skip
def test_relaxed_accuracy(said, target, right):
    assert relaxed(said, target) is right


def test_a_share_of_right_answers():
    assert relaxed_accuracy(["1", "9", "b"], ["1", "1", "b"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="1 predictions for 2"):
        relaxed_accuracy(["1"], ["1", "2"])


def test_templates_answer_what_their_programs_compute():
    asked = [question for seed in range(2) for question in questions(random_chart(seed), seed)]
    assert len({question.question for question in asked}) > 30
    for each in asked[::3]:
        found = run(each.program)
        assert found.error is None and relaxed(found.answer, each.answer, 1e-9), each
    assert random_chart(3) == random_chart(3) != random_chart(4)


def test_charts_are_drawn_at_the_size_the_tower_reads():
    chart = Chart(("a", "b"), {"Sales": (3, 4)})
    assert picture(chart).size == (768, 768) and len(picture(chart, 96).getcolors(96 * 96)) > 10
    with pytest.raises(ValueError, match="needs 2 values"):
        Chart(("a", "b"), {"Sales": (3,)})
