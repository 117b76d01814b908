"""Text against pixels: the same question in two modes, judged alike, and what a model looks at."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import jeton
from jeton.layout import Geometry
from jeton.measure.pixelworld import (
    KINDS,
    Item,
    Prompt,
    Reader,
    _over_boxes,
    _over_words,
    compare_modes,
    embedded_items,
    is_right,
    prompted,
    read_items,
)
from jeton.measure.render import Page, Table, Word
from jeton.measure.subject import load_subject

TASKS = {"glue", "superglue", "mmlu", "mmlu-pro", "arc", "gsm8k", "mbpp", "tablebench", "slidesvqa", "wikiss-qa", "mathverse"}
CHOICE = Item("arc", "choice", "Which one?", ("B",), choices=("wood", "copper"))
TABLE = Item("tablebench", "number", "How many?", ("1,250",), context="Visitors.", table=Table.of([["m", "v"], ["May", 1250]]))


@pytest.fixture(scope="module")
def demo():
    return load_subject()


def test_the_embedded_items_cover_every_task_and_all_kinds() -> None:
    items = embedded_items()
    assert {item.task for item in items} == TASKS and {item.kind for item in items} == set(KINDS)
    assert all(sum(item.task == task for item in items) == 2 for task in TASKS)
    for item in items:
        for mode in ("text", "vision"):
            for prompt in ("base", "cot"):
                assert KINDS[item.kind] in prompted(item, mode, prompt).text
        if item.kind not in ("code",):
            assert all(is_right(item, answer) and is_right(item, f"Well...\nAnswer: {answer}.") for answer in item.answers)


def test_modes_say_the_same_in_words_or_on_the_page() -> None:
    text, vision, semi = (prompted(TABLE, mode) for mode in ("text", "vision", "semi"))
    assert text.image is None and "| May | 1250 |" in text.text and "How many?" in text.text
    assert vision.page is not None and "How many?" not in vision.text and "Visitors." not in vision.text
    assert [word.text for word in vision.page.words] == ["Visitors.", "How", "many?"] == text.body.split()
    assert semi.page is not None and not semi.page.words and "How many?" in semi.text and "1250" not in semi.text
    assert "Think step by step" in prompted(TABLE, "vision", "cot").text
    assert "B. copper" in prompted(CHOICE, "text").text and len(prompted(CHOICE, "vision").page.words) == 6
    figure = next(item for item in embedded_items() if item.task == "mathverse")
    assert prompted(figure, "text").image is figure.image
    page = prompted(figure, "vision").image
    assert np.asarray(page).shape[0] > figure.image.height and (np.asarray(page.convert("L")) < 60).sum() > 300


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to show"):
        prompted(CHOICE, "semi")
    with pytest.raises(ValueError, match="mode must be"):
        prompted(CHOICE, "pixels")
    with pytest.raises(ValueError, match="prompt must be"):
        prompted(CHOICE, "text", "zero-shot")
    for bad in ({"kind": "essay"}, {"kind": "choice"}, {"kind": "code"}):
        with pytest.raises(ValueError):
            Item(**{"task": "t", "question": "q", "answers": ("a",), **bad})


def test_answers_are_judged_by_kind() -> None:
    assert is_right(CHOICE, "B") and is_right(CHOICE, "(B) copper") and is_right(CHOICE, "wood is not\nAnswer: B.")
    assert not is_right(CHOICE, "A") and not is_right(CHOICE, "Answer: B\nAnswer: A") and not is_right(CHOICE, "")
    assert (
        is_right(TABLE, "1250")
        and is_right(TABLE, "It is 1,250.0 visitors")
        and not is_right(TABLE, "125")
        and not is_right(TABLE, "-1250")
    )
    label = Item("glue", "label", "q", ("positive",))
    assert is_right(label, " Positive. ") and not is_right(label, "negative")


def test_code_is_run_only_when_asked_for() -> None:
    code = Item("mbpp", "code", "q", (), tests="assert double(4) == 8")
    with pytest.raises(ValueError, match="run_code=True"):
        is_right(code, "def double(x): return 2 * x")
    assert is_right(code, "def double(x): return 2 * x", run_code=True)
    assert is_right(code, "Here:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.", run_code=True)
    assert not is_right(code, "def double(x): return x", run_code=True)


def test_items_are_read_from_a_file(tmp_path) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    rows = [
        {"task": "t", "kind": "text", "question": "What colour?", "answer": ["red", "scarlet"], "image": "a.png"},
        {"task": "t", "kind": "number", "question": "1 + 1?", "answer": 2, "table": [["a"], [1]]},
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_items(path)
    assert first.answers == ("red", "scarlet") and first.image.size == (9, 9) and second.table.rows == (("a",), ("1",))
    for line, message in (("{}", "line 3.*'task' is missing"), ("{", "line 3"), ('{"task":"t","kind":"x"}', "line 3")):
        path.write_text("\n".join([*map(json.dumps, rows), line]))
        with pytest.raises(ValueError, match=message):
            read_items(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no item"):
        read_items(path)


def test_the_gap_is_text_minus_pixels(monkeypatch) -> None:
    """Prepared answers: text right twice of three, pixels once."""
    said = {"one": ("B", "B"), "two": ("B", "A"), "three": ("A", "A")}
    items = [Item(task, "choice", question, ("B",), choices=("x", "y")) for task, question in zip("aab", said)]

    def answer(self, prompt: Prompt, most: int) -> tuple[str, float]:
        word = prompt.page.words[0].text if prompt.page else prompt.text.split()[0]
        return said[word][prompt.page is not None], 2.0 if prompt.page else 0.5

    monkeypatch.setattr(Reader, "answer", answer)
    subject = SimpleNamespace(name="m", model=None, processor=SimpleNamespace(tokenizer=None))
    code = Item("mbpp", "code", "q", (), tests="pass")
    report = compare_modes(subject, [*items, code], similarity=False)
    assert [(row.task, row.items, row.text, row.pixel) for row in report.rows] == [
        ("a", 2, 1.0, 0.5), ("b", 1, 0.0, 0.0), ("all", 3, pytest.approx(2 / 3), pytest.approx(1 / 3)),
    ]  # fmt: skip
    assert [row.gap for row in report.rows] == pytest.approx([0.5, 0.0, 1 / 3])
    assert report.rows[-1].seconds_text == 0.5 and report.rows[-1].seconds_pixel == 2.0 and report.rows[-1].similarity is None
    assert report.left_out == ("mbpp: answers would have to be run (run_code=True)",)
    assert "| a | 2 | 1.000 | 0.500 | +0.500 |" in report.table() and json.loads(json.dumps(report.as_dict()))["mode"] == "vision"
    with pytest.raises(ValueError, match="no item could be asked: mbpp"):
        compare_modes(subject, [code], similarity=False)
    with pytest.raises(ValueError, match="vision"):
        compare_modes(subject, items, mode="text")


def test_attention_over_boxes_by_hand() -> None:
    """A page of 40 x 20 over a grid of 2 x 4 cells: boxes take what of each cell they cover; pieces of a word add up."""
    layout = SimpleNamespace(album=SimpleNamespace(geometry=(Geometry.picture(2, 4),)), position=torch.arange(1, 9)[None])
    row = torch.tensor([9.0, 1, 2, 3, 4, 5, 6, 7, 8])  # column 0 is text
    boxes = [(0, (0.0, 0.0, 10.0, 10.0)), (1, (5.0, 5.0, 20.0, 10.0)), (1, (30.0, 10.0, 40.0, 20.0))]
    page = Page(Image.new("RGB", (40, 20)), tuple(Word(number, "w", box) for number, box in boxes))
    got = torch.tensor([1.0, 0.25 * 1 + 0.5 * 2 + 8.0])
    assert torch.allclose(_over_boxes(row, layout, page), got / got.sum())
    assert torch.allclose(_over_words(row, [[1, 2], [], [8]]), torch.tensor([3.0, 0.0, 8.0]) / 11)


def test_the_tokens_of_words_are_found_in_the_prompt(demo) -> None:
    reader = Reader(demo)
    prompt = prompted(CHOICE, "text")
    words = prompt.body.split()
    ids = reader.encode(prompt)["input_ids"][0]
    parts = reader._words(prompt)
    assert len(parts) == len(words) and all(parts)
    for word, tokens in zip(words, parts, strict=True):
        assert word in demo.processor.tokenizer.decode(ids[tokens])


def test_it_runs_on_a_real_model(demo) -> None:
    before = demo.model.config._attn_implementation
    items = [item for item in embedded_items() if item.task in ("arc", "tablebench")]
    report = compare_modes(demo, items, max_new_tokens=4, apply=lambda model: jeton.apply(model, "pixelworld", keep=0.5))
    assert [row.task for row in report.rows] == ["arc", "tablebench", "all"] and report.rows[-1].items == 4
    assert report.method == "pixelworld(keep=0.5)" and demo.model.config._attn_implementation == before
    arc, table, _ = report.rows
    assert arc.similarity is not None and 0 < arc.similarity <= 1 and table.similarity is None
    assert arc.seconds_text > 0 and all(0 <= row.text <= 1 and row.gap == row.text - row.pixel for row in report.rows)
    reader = Reader(demo)
    shares = reader.attention(prompted(items[0], "vision"))
    assert len(shares) == len(prompted(items[0], "text").body.split()) and float(shares.sum()) == pytest.approx(1)
