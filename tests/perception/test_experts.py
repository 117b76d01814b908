"""Transformers models as experts: tiny ones of the real classes, and what they are asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

import jeton
from jeton.demo import prompt
from jeton.perception.experts import BlipScorer, ChatModel, VisionLanguageCaptioner, ZeroShotDetector

WORDS = ["a", "red", "circle", "square", "blue", "dog", "user", "assistant", ":"]


def picture(seed=0, width=40, height=30):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def bold(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.copy_(0.2 * torch.randn_like(weight))
    return model.eval()


def words(*special, between=("", "")):
    vocabulary = {word: at for at, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=special[-1]))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if all(between):
        known = [(name, vocabulary[name]) for name in between]
        inner.post_processor = processors.TemplateProcessing(single=f"{between[0]} $A {between[1]}", special_tokens=known)
    return inner


# -- captioner -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return jeton.load_demo()


def test_the_captioner_says_what_the_model_says(demo):
    images, question = [one.image for one in demo.examples[:3]], demo.examples[0].question
    captioner = VisionLanguageCaptioner(demo.model, demo.processor, max_new_tokens=6, batch=2)
    said = captioner(images, question, 0.0)
    for image, caption in zip(images, said, strict=True):
        inputs = demo.processor(images=image, text=prompt(question), return_tensors="pt")
        ids = demo.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert demo.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == caption


def test_captions_at_a_temperature_differ_but_follow_the_seed_and_leave_the_global_state(demo):
    captioner = VisionLanguageCaptioner(demo.model, demo.processor, max_new_tokens=6)
    images = [demo.examples[0].image] * 6
    state = torch.get_rng_state()
    first = captioner(images, "What is there?", 3.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == captioner(images, "What is there?", 3.0) and len(set(first)) > 1
    captioner.seed = 1
    assert first != captioner(images, "What is there?", 3.0)
    with pytest.raises(ValueError, match="temperature"):
        captioner(images, "What is there?", -1.0)


def test_without_a_chat_template_the_prompt_is_wrapped_by_hand(demo, monkeypatch):
    image, question = demo.examples[0].image, demo.examples[0].question
    captioner = VisionLanguageCaptioner(demo.model, demo.processor, max_new_tokens=6)
    said = captioner([image], question, 0.0)
    monkeypatch.setattr(demo.processor, "chat_template", None)
    with pytest.raises(ValueError, match="wrap="):
        captioner([image], question, 0.0)
    captioner.wrap = prompt
    assert captioner([image], question, 0.0) == said


# -- detector ------------------------------------------------------------------------------------------------------------


def test_the_detector_names_boxes_in_pixels_best_first():
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OwlViTConfig(
        text_config={
            **size, "vocab_size": 20, "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=32,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words("[PAD]", "[S]", "[E]", "[UNK]", between=("[S]", "[E]")), pad_token="[PAD]", eos_token="[E]",
        unk_token="[UNK]", model_max_length=8,
    )  # fmt: skip
    processor = OwlViTProcessor(OwlViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    model = bold(OwlViTForObjectDetection(config))
    image, labels = picture(), ["a red circle", "dog"]
    found = ZeroShotDetector(model, processor, labels, floor=0.0)(image)
    with torch.no_grad():
        out = model(**processor(images=image, text=[labels], return_tensors="pt"))
    scores, which = out.logits[0].sigmoid().max(-1)
    assert [one.score for one in found] == pytest.approx(scores.sort(descending=True).values.tolist())
    best = int(scores.argmax())
    x, y, w, h = out.pred_boxes[0, best].tolist()
    assert found[0].label == labels[which[best]]
    assert found[0].box == pytest.approx([(x - w / 2) * 40, (y - h / 2) * 30, (x + w / 2) * 40, (y + h / 2) * 30], abs=1e-3)
    floor = scores.median().item()
    few = ZeroShotDetector(model, processor, labels, floor=floor, most=3)(image)
    assert few == [one for one in found if one.score > floor][:3]
    with pytest.raises(ValueError, match="labels"):
        ZeroShotDetector(model, processor, [])(image)


# -- scorer --------------------------------------------------------------------------------------------------------------


def test_the_scorer_is_the_mean_of_match_and_cosine(tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    processor = BlipProcessor(
        BlipImageProcessorPil(size={"height": 32, "width": 32}),
        BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), model_max_length=16),
    )
    config = BlipConfig(
        text_config={**size, "vocab_size": 20, "encoder_hidden_size": 32, "max_position_embeddings": 16},
        vision_config={**size, "image_size": 32, "patch_size": 8}, image_text_hidden_size=16,
    )  # fmt: skip
    model = bold(BlipForImageTextRetrieval(config))
    texts = ["a red circle", "dog", "a blue square dog"]
    scores = BlipScorer(model, processor)(picture(), texts)
    for text, score in zip(texts, scores, strict=True):  # by the model's own forward, one text at a time
        inputs = processor(images=picture(), text=text, return_tensors="pt")
        with torch.no_grad():
            match = model(**inputs).itm_score.softmax(-1)[0, 1]
            cosine = model(**inputs, use_itm_head=False).itm_score[0, 0]
        assert score == pytest.approx(((match + cosine) / 2).item(), abs=1e-5)
    assert len({round(score, 3) for score in scores}) == 3 and BlipScorer(model, processor)(picture(), []) == []


# -- language model ------------------------------------------------------------------------------------------------------


def test_the_chat_model_answers_each_chat_as_if_alone():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words("[PAD]", "[UNK]"), pad_token="[PAD]", unk_token="[UNK]")
    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=None,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    speaker = ChatModel(bold(LlamaForCausalLM(config)), tokenizer, max_new_tokens=5, batch=2)
    chats = [[{"role": "user", "content": text}] for text in ("a red circle", "dog", "a blue square a dog")]
    with pytest.raises(ValueError, match="chat template"):
        speaker(chats, 0.0)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    together = speaker(chats, 0.0)
    assert together == [speaker([chat], 0.0)[0] for chat in chats] and len(set(together)) > 1
    ids = tokenizer("user : dog assistant :", return_tensors="pt").input_ids
    alone = speaker.model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    assert together[1] == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert speaker(chats, 2.0) == speaker(chats, 2.0) != together
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad"):
        speaker(chats, 0.0)
