"""The prompt function and the chat template saved with the processor say the same."""

import pytest

from jeton.demo import prompt
from jeton.demo.model import make_processor, make_tokenizer
from jeton.demo.questions import all_questions


@pytest.fixture(scope="module")
def processor():
    return make_processor(make_tokenizer())


def _messages(question, history=()):
    turns = [text for pair in history for text in pair] + [question]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]} for i, text in enumerate(turns)
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    return messages


@pytest.mark.parametrize("history", [(), (("What colour is the two?", "red"),), (("a", "b"), ("c", "d"))])
def test_prompt_equals_chat_template(processor, history):
    expected = processor.apply_chat_template(_messages("Where is the red digit?", history))
    assert prompt("Where is the red digit?", history) == expected


def test_the_tokenizer_gives_every_question_and_any_other_text_back(processor):
    for text in [*all_questions(), "Ĝu vi parolas — 日本語?"]:
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        assert processor.tokenizer.decode(ids) == text


def test_turns_tokenized_apart_equal_the_whole_conversation(processor):
    encode = lambda text: processor.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    first, whole = prompt("Where is the two?"), prompt("Which digit is red?", [("Where is the two?", "top left")])
    rest = whole.removeprefix(first)
    assert encode(whole) == encode(first) + encode(rest)


def test_the_image_takes_one_token_per_patch(processor):
    from PIL import Image

    inputs = processor(images=Image.new("RGB", (100, 130)), text=prompt("Where?"), return_tensors="pt")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert inputs["pixel_values"].shape == (1, 3, 84, 84)
    assert (inputs["input_ids"] == image).sum() == 144
