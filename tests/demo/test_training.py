"""Every training stage runs, teaches something in a few steps, and is not run again when training resumes."""

from dataclasses import replace

import pytest
import torch

from jeton.demo import train as training
from jeton.demo.batches import Batches
from jeton.demo.losses import Teacher, look_loss, losses, point_loss, read_block_attention
from jeton.demo.model import make_model, make_tokenizer


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("stage", training.STAGES, ids=lambda stage: stage.name)
def test_a_stage_lowers_its_losses(stage):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model, teacher = make_model(tokenizer), Teacher(tokenizer)
    before = [parameter.clone() for parameter in model.model.vision_tower.parameters()]
    history = training.run_stage(
        replace(stage, steps=12, batch=4), model, teacher, Batches(tokenizer, 4, seed=1, crowded=not stage.speak)
    )
    first, last = history[0], history[-1]
    assert sum(last.values()) < sum(first.values())
    assert ("answers" in first) == stage.speak and ("class" in first) == ("look" in first) == stage.see
    moved = any((a != b).any() for a, b in zip(before, model.model.vision_tower.parameters()))
    assert moved == stage.see


def test_resuming_goes_on_after_the_last_finished_stage(tmp_path, monkeypatch):
    stages = tuple(replace(stage, steps=2, batch=2) for stage in training.STAGES)
    whole, _, _ = training.train(tmp_path / "whole", stages)
    training.train(tmp_path / "parts", stages[:2])
    ran = []
    run_stage = training.run_stage
    monkeypatch.setattr(training, "run_stage", lambda stage, *rest: (ran.append(stage.name), run_stage(stage, *rest)))
    resumed, _, seconds = training.train(tmp_path / "parts", stages, resume=True)
    assert ran == ["joint"] and set(seconds) == {"encoder", "language", "joint"}
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)


def test_saving_replaces_the_checkpoint_and_it_loads(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from jeton.demo.model import make_processor

    tokenizer = make_tokenizer()
    for version in (1, 2):
        training.save(tmp_path, make_model(tokenizer), make_processor(tokenizer), {"version": version})
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint"]
    AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    AutoProcessor.from_pretrained(tmp_path / "checkpoint")


def test_the_attention_that_is_trained_is_the_attention_the_model_computes():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).eval()
    model.set_attn_implementation("eager")
    batch = next(Batches(tokenizer, 2, seed=0))
    seen = model.model.vision_tower(batch.pixels, output_hidden_states=True, output_attentions=True)
    row = read_block_attention(model, seen.hidden_states[-3])
    torch.testing.assert_close(row, seen.attentions[-2].mean(1)[:, 0, 1:])


def test_look_loss_is_least_when_every_digit_gets_an_equal_share():
    owner = torch.tensor([[0, 0, 1, -1, -2]])
    even, uneven, away = torch.tensor([[[0.3, 0.2, 0.5, 0, 0]], [[0.5, 0.4, 0.1, 0, 0]], [[0.1, 0.1, 0.2, 0.3, 0.3]]])
    assert look_loss(even, owner) < look_loss(uneven, owner) < look_loss(away, owner)


def test_pointing_is_judged_by_the_attention_the_language_model_computes():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).eval()
    model.set_attn_implementation("eager")
    batch = next(Batches(tokenizer, 2, seed=0))
    assert (batch.asked >= 0).any(1).all()
    embeds = model.get_input_embeddings()(batch.ids)
    seen = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch.attended, output_hidden_states=True, output_attentions=True
    )
    attention, patches = seen.attentions[2].mean(1), batch.ids == model.config.image_token_id
    rows, columns = (batch.asked >= 0).nonzero(as_tuple=True)
    mass = [
        attention[row, column, patches[row]][batch.owner[row] == batch.asked[row, column]].sum()
        for row, column in zip(rows, columns, strict=True)
    ]
    expected = -(torch.stack(mass) + 1e-6).log().mean()
    torch.testing.assert_close(point_loss(model, seen.hidden_states[2], batch), expected)


def test_answers_are_the_only_text_that_is_learned():
    tokenizer = make_tokenizer()
    batch = next(Batches(tokenizer, 3, seed=0))
    learned = batch.labels != -100
    assert (batch.labels[learned] == batch.ids[learned]).all()
    text = tokenizer.decode(batch.labels[0][learned[0]])
    assert "USER" not in text and "<image>" not in text and text.endswith("</s>")


def test_losses_need_no_language_model_while_only_the_encoder_is_trained(monkeypatch):
    tokenizer = make_tokenizer()
    model, teacher = make_model(tokenizer), Teacher(tokenizer)
    monkeypatch.setattr(model.model.language_model, "forward", None)
    found = losses(model, teacher, next(Batches(tokenizer, 2, seed=0)), see=True, speak=False)
    assert set(found) == {"patches", "class", "look"}
