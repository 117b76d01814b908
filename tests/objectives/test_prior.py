"""PRIOR: the weights by hand, that the reference is left alone, and what it does to words that need the image."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from jeton.objectives._common import IGNORE, cross_entropy
from jeton.objectives.prior import Prior, prior_weights
from jeton.train import Recipe, train

IMAGE = 5


def language(vocab=32, width=32, layers=1):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            initializer_range=0.2,
            max_position_embeddings=64,
        )
    ).eval()


def everywhere(p):
    return torch.ones_like(p, dtype=torch.bool)


def test_weights_by_hand():
    p = torch.tensor([[0.9, 0.5, 0.1]])
    w = prior_weights(p, everywhere(p))
    assert torch.allclose(w, torch.tensor([[0.2, 1.0, 1.8]]))
    three = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])  # logits whose cross-entropy is ln 2 each
    assert cross_entropy(three, torch.zeros(1, 3, dtype=torch.long), w).item() == pytest.approx(torch.tensor(2.0).log().item())
    assert (w * torch.tensor([0.0, 0.0, 3.0])).sum().item() / 3 == pytest.approx(1.8)


def test_equal_expectations_give_plain_cross_entropy_exactly():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, :2] = IGNORE
    w = prior_weights(torch.full((2, 5), 0.25), labels != IGNORE)
    plain = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    assert torch.equal(w, (labels != IGNORE).float())
    assert cross_entropy(logits, labels, w).item() == pytest.approx(plain.item(), abs=1e-7)


def test_inverse_weights_are_clipped_and_floors_hold():
    p = torch.tensor([[0.5, 0.001]])
    raw = prior_weights(p, everywhere(p), form="inverse", most=10.0)
    assert torch.allclose(raw, torch.tensor([[2.0, 10.0]]) / 6)
    sure = torch.tensor([[1.0, 0.0]])
    assert torch.allclose(prior_weights(sure, everywhere(sure), floor=0.05), torch.tensor([[0.05, 1.0]]) / 0.525)
    assert torch.equal(prior_weights(torch.ones(1, 3), everywhere(torch.ones(1, 3))), torch.ones(1, 3))


def test_the_mean_is_over_the_batch_or_over_each_sample():
    p = torch.tensor([[0.9, 0.9], [0.1, 0.1]])
    assert torch.allclose(prior_weights(p, everywhere(p)), torch.tensor([[0.2, 0.2], [1.8, 1.8]]))
    assert torch.allclose(prior_weights(p, everywhere(p), per="sample"), torch.ones(2, 2))


def test_tokens_without_a_label_have_no_part_in_the_mean():
    p, valid = torch.tensor([[0.9, 0.5, 0.0]]), torch.tensor([[True, True, False]])
    assert torch.allclose(prior_weights(p, valid), torch.tensor([[0.1, 0.5, 0.0]]) / 0.3)


def test_the_reference_reads_the_text_without_the_image_whatever_stands_around_it():
    reference = language()
    prior = Prior(reference, [IMAGE])
    words = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        p = reference(input_ids=words).logits[:, :-1].softmax(-1).gather(-1, words[:, 1:, None]).squeeze(-1)[0]
    shown = torch.tensor([[0, 0, 7, IMAGE, IMAGE, 8, 9, IMAGE, 10], [7, IMAGE, 8, IMAGE, 9, 10, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0]])
    found = prior.expected(shown, mask)
    none = torch.nan
    right = torch.tensor([[none] * 5 + [p[0], p[1], none, p[2]], [none, none, p[0], none, p[1], p[2], none, none, none]])
    assert torch.allclose(found, right, atol=1e-6, equal_nan=True)
    weights = prior.weights(shown, mask, shown.masked_fill((mask == 0) | (shown == IMAGE), IGNORE))
    assert weights[0, 2] == 1 and weights[1, 0] == 0  # nothing precedes the first word; the first column is never predicted
    assert weights[0, 5:].sum() + weights[1, 2:].sum() == pytest.approx(6)


def test_no_gradient_enters_the_reference_and_it_never_trains():
    reference, model = language(), language()
    prior = Prior(reference, [IMAGE]).train()
    ids = torch.randint(6, 32, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    prior.loss(model, batch)["prior"].backward()
    assert all(value.grad is None for value in reference.parameters()) and not reference.training
    assert any(value.grad is not None for value in model.parameters())


def test_the_loss_is_the_weighted_one_over_predicted_tokens():
    reference, model = language(), language(width=16)
    prior = Prior(reference, [IMAGE])
    ids = torch.tensor([[IMAGE, IMAGE, 7, 8, 9, 10]])
    labels = torch.tensor([[IGNORE, IGNORE, IGNORE, 8, 9, 10]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        logp = model(input_ids=ids).logits.log_softmax(-1)[0]
        each = -torch.stack([logp[at - 1, ids[0, at]] for at in (3, 4, 5)])
        p = prior.expected(ids, mask)[0, 3:]
    weights = (1 - p) / (1 - p).mean()
    loss = prior.loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})["prior"]
    assert loss.item() == pytest.approx((weights * each).mean().item(), rel=1e-5)
    assert loss.item() != pytest.approx(each.mean().item(), rel=1e-3)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="form"):
        Prior(language(), [IMAGE], form="linear")
    with pytest.raises(ValueError, match="per"):
        Prior(language(), [IMAGE], per="token")


# -- captions of which one word in five needs the image --------------------------------------------------------------------

WORDS = 8  # ids 10..17 are template words; 20..27 colours, 30..37 shapes; 40..55 what the image tokens show


def captions(count, seed):
    """Encoder-free captions: two image tokens that show colour and shape, then ten words, two of which tell them."""
    draw = torch.Generator().manual_seed(seed)
    colour, shape = (torch.randint(0, 8, (count,), generator=draw) for _ in range(2))
    template = torch.arange(10, 18).expand(count, 8)
    ids = torch.cat(
        [40 + colour[:, None], 48 + shape[:, None], template[:, :4], 20 + colour[:, None], template[:, 4:6], 30 + shape[:, None],
         template[:, 6:]], 1)  # fmt: skip
    labels = ids.clone()
    labels[:, :2] = IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def errors(model, batch):
    """Cross-entropy on the words that need the image, and on the template's."""
    with torch.no_grad():
        logp = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    each = -logp.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    needs = batch["input_ids"][:, 1:] >= 20
    needs[:, 0] = False
    words = (batch["input_ids"][:, 1:] < 20) & (torch.arange(1, batch["input_ids"].shape[1]) > 2)
    return each[needs].mean().item(), each[words].mean().item()


def test_words_that_need_the_image_are_learnt_sooner():
    recipe = Recipe(steps=120, rate=3e-3)

    def draw(step):
        return captions(32, step)

    reference = language(64)
    text = {"input_ids": slice(2, None)}

    def plain(model, batch):
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return cross_entropy(out.logits[:, :-1], batch["labels"][:, 1:])

    train(reference, lambda step: {k: v[:, text["input_ids"]] for k, v in draw(step).items()}, plain, recipe, progress=False)
    prior = Prior(reference, range(40, 56))
    told = {}
    for name, loss in (("plain", plain), ("prior", prior.loss)):
        model = language(64, layers=2)
        train(model, draw, loss, recipe, progress=False)
        told[name] = errors(model.eval(), captions(256, 10_000))
    print(told)  # (words that need the image, template words)
    assert told["prior"][0] < told["plain"][0]
