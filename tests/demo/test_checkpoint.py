"""The checkpoint that comes with the package does what a user is told it does."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration

import jeton.demo
from jeton.demo.evaluate import accuracy, answers, second_turn_accuracy


@pytest.fixture(scope="module")
def demo():
    return jeton.demo.load_demo()


def test_auto_classes_load_it_as_llava_with_a_clip_encoder(demo):
    model = AutoModelForImageTextToText.from_pretrained(demo.path)
    processor = AutoProcessor.from_pretrained(demo.path)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(model.model.vision_tower, CLIPVisionModel)
    assert processor.tokenizer.padding_side == "left" and processor.tokenizer.pad_token is not None


def test_it_answers_held_out_questions(demo):
    assert accuracy(demo.model, demo.processor, demo.examples[:240])["all"] >= 0.95


def test_it_answers_a_second_question_about_the_same_image(demo):
    assert second_turn_accuracy(demo.model, demo.processor, demo.examples[:120]) >= 0.93


def test_a_second_turn_in_the_same_cache_equals_one_long_prompt(demo):
    first, second = demo.examples[:2]
    tokens = demo.processor.tokenizer
    inputs = demo.processor(images=first.image, text=jeton.demo.prompt(first.question), return_tensors="pt")
    said = demo.model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    answer = tokens.decode(said.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    history = [(first.question, answer)]
    follow_up = jeton.demo.prompt(second.question, history).removeprefix(jeton.demo.prompt(first.question, ()))
    follow_up = follow_up.removeprefix(f" {answer}</s>")
    more = tokens(follow_up, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([said.sequences, more], 1)
    out = demo.model.generate(ids, past_key_values=said.past_key_values, max_new_tokens=6, do_sample=False)
    cached = tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    whole = answers(demo.model, demo.processor, [first.image], [jeton.demo.prompt(second.question, history)])
    assert [cached] == whole


def test_a_question_gets_the_same_answer_alone_and_in_a_padded_batch(demo):
    examples = demo.examples[:12]
    images, prompts = [e.image for e in examples], [jeton.demo.prompt(e.question) for e in examples]
    assert len({len(demo.processor.tokenizer(text).input_ids) for text in prompts}) > 1
    alone = answers(demo.model, demo.processor, images, prompts, batch=1)
    assert answers(demo.model, demo.processor, images, prompts, batch=12) == alone


def test_the_class_token_looks_at_the_digits(demo):
    examples = list({e.scene: e for e in demo.examples[:80]}.values())
    pixels = demo.processor.image_processor([e.image for e in examples], return_tensors="pt")["pixel_values"]
    model = AutoModelForImageTextToText.from_pretrained(demo.path, attn_implementation="eager")
    with torch.inference_mode():
        seen = model.model.vision_tower(pixels, output_attentions=True)
    row = seen.attentions[-2].mean(1)[:, 0, 1:].view(-1, 12, 12)
    for attention, example in zip(row, examples):
        inside = torch.zeros(84, 84)
        for left, top, right, bottom in example.boxes:
            inside[top:bottom, left:right] = 1
        touched = inside.view(12, 7, 12, 7).amax((1, 3))
        assert (attention * touched).sum() > 0.8
        assert touched.mean() < 0.6


def test_the_package_data_stay_small(demo):
    def megabytes(folder):
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6

    assert megabytes(demo.path) <= 12
    assert megabytes(demo.examples[0].path.parent) <= 4


def test_there_are_enough_questions_of_every_kind(demo):
    kinds = [e.kind for e in demo.examples]
    assert len(kinds) >= 600 and len({e.scene for e in demo.examples}) >= 200
    assert all(kinds.count(kind) >= 100 for kind in ("digit", "colour", "count", "position"))
