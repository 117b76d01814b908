"""ELECTRA: which tokens are chosen, what is replaced, and where gradients go."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from jeton.objectives._common import IGNORE, choose, cross_entropy, sample
from jeton.objectives.electra import SIZES, Electra, detection, make
from jeton.train import Recipe, train

PAD, CLS, SEP, MASK, V = 0, 1, 2, 3, 40


def tiny(width=16, **options):
    shared = {
        "vocab_size": V,
        "embedding_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    small = ElectraConfig(**shared, hidden_size=8, intermediate_size=16)
    main = ElectraConfig(**shared, hidden_size=width, intermediate_size=32)
    return Electra(ElectraForMaskedLM(small), ElectraForPreTraining(main), MASK, [PAD, CLS, SEP], **options)


def rows(batch=4, length=20, pads=5):
    ids = torch.randint(4, V, (batch, length))
    ids[:, 0], mask = CLS, torch.ones(batch, length, dtype=torch.long)
    ids[1::2, -pads:], mask[1::2, -pads:] = PAD, 0
    ids[0::2, -1], ids[1::2, -pads - 1] = SEP, SEP
    return ids, mask


def test_zero_logits_cost_ln_2_which_weighs_fifty():
    _, mask = rows()
    loss = detection(torch.zeros(4, 20), torch.randint(0, 2, (4, 20)), mask)
    assert loss.item() == pytest.approx(math.log(2)) and 50 * loss.item() == pytest.approx(34.657, abs=1e-3)


def test_detection_counts_every_real_token_and_no_padding():
    _, mask = rows()
    scores = torch.zeros(4, 20).masked_fill(mask == 0, 100.0)
    assert detection(scores, torch.zeros(4, 20), mask).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("share", [0.15, 0.25, 0.001])
def test_the_share_of_real_tokens_is_chosen_and_never_padding_or_special(share):
    model, (ids, mask) = tiny(share=share), rows()
    for _ in range(20):
        chosen = model.chosen(ids, mask)
        assert chosen.sum(1).tolist() == [max(1, round(share * int(n))) for n in mask.sum(1)]
        assert not (chosen & ((mask == 0) | (ids <= MASK))).any()


def test_choosing_never_takes_more_than_there_is():
    candidates = torch.tensor([[True, False, True, False], [False] * 4])
    assert choose(candidates, torch.tensor([3, 3])).tolist() == [[True, False, True, False], [False] * 4]


def test_a_generator_that_is_right_replaces_nothing():
    model, (ids, mask) = tiny(), rows()
    chosen = model.chosen(ids, mask)
    logits = torch.full((*ids.shape, V), -50.0).scatter(-1, ids[..., None], 50.0)
    right = model.corrupt(ids, chosen, logits)
    assert not right.replaced.any() and torch.equal(right.ids, ids)
    model.disallow_correct = True
    assert torch.equal(model.corrupt(ids, chosen, logits).replaced, chosen)


def test_a_uniform_generator_replaces_all_but_one_in_v():
    model = tiny()
    ids = torch.randint(4, V, (64, 128))
    chosen = torch.ones_like(ids, dtype=torch.bool)
    out = model.corrupt(ids, chosen, torch.zeros(64, 128, V))
    share = out.replaced.float().mean().item()
    assert share == pytest.approx(1 - 1 / V, abs=4 * math.sqrt(1 / V / ids.numel()))
    assert torch.equal(out.replaced, out.ids != ids)


def test_drawing_follows_the_softmax_and_its_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20_000, 3)
    for temperature in (1.0, 2.0):
        drawn = torch.bincount(sample(logits, temperature), minlength=3) / 20_000
        assert torch.allclose(drawn, (logits[0] / temperature).softmax(0), atol=0.015)


def test_unchosen_tokens_stay_and_most_chosen_ones_are_hidden_from_the_generator():
    model, (ids, mask) = tiny(), rows(batch=64)
    seen = []
    model.generator.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    read = []
    model.discriminator.register_forward_pre_hook(lambda m, a, k: read.append(k["input_ids"]), with_kwargs=True)
    model(ids, mask, draws=torch.Generator().manual_seed(0))
    chosen = model.chosen(ids, mask, draws=torch.Generator().manual_seed(0))
    assert torch.equal(seen[0][~chosen], ids[~chosen]) and torch.equal(read[0][~chosen], ids[~chosen])
    assert 0.75 < (seen[0][chosen] == MASK).float().mean() < 0.95


def test_the_discriminator_sends_no_gradient_into_the_generator_unless_through_shared_embeddings():
    model, (ids, mask) = tiny(tied=False), rows()
    model(ids, mask)["discriminator"].backward()
    assert all(value.grad is None for value in model.generator.parameters())
    tied = tiny()
    tied(ids, mask)["discriminator"].backward()
    reached = {name for name, value in tied.generator.named_parameters() if value.grad is not None}
    assert reached and all("embeddings" in name or name == "generator_lm_head.weight" for name in reached)


def test_the_generator_is_judged_at_chosen_tokens_only():
    model, (ids, mask) = tiny(), rows()
    logits = torch.randn(4, 20, V)
    chosen = model.chosen(ids, mask)
    by_hand = nn.functional.cross_entropy(logits[chosen], ids[chosen])
    assert torch.allclose(cross_entropy(logits, ids.masked_fill(~chosen, IGNORE)), by_hand)


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    with torch.device("meta"):
        model = make(size, 30522, 103, [0, 101, 102])
    width, layers, _, embedding, part, share = SIZES[size]
    small, main = model.generator.config, model.discriminator.config
    assert (main.hidden_size, main.num_hidden_layers, main.embedding_size) == (width, layers, embedding)
    assert small.hidden_size == width // part and small.num_hidden_layers == layers and model.share == share
    assert model.generator.electra.embeddings is model.discriminator.electra.embeddings


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="share"):
        tiny(share=1.5)
    with pytest.raises(ValueError, match="no size"):
        make("huge", 100, 1, [0])
    one = ElectraForMaskedLM(
        ElectraConfig(vocab_size=V, embedding_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    two = ElectraForPreTraining(
        ElectraConfig(vocab_size=V, embedding_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="embedding_size is 8"):
        Electra(one, two, MASK, [])


# -- on real text, character by character: what a linear probe reads off the encoders that different pre-trainings leave ------

LENGTH, SYMBOLS, STEPS = 24, 80, 2000


def text():
    """(rows to train on, held-out rows) of Python's language reference, 22 characters each between [CLS] and [SEP]."""
    every = [" ".join(topic.split()) for _, topic in sorted(pydoc_data.topics.topics.items())]
    common = Counter("".join(every)).most_common(SYMBOLS - 5)
    known = {symbol: 5 + at for at, (symbol, _) in enumerate(common)}  # 4 stands for all others
    inner = torch.cat([
        torch.tensor([known.get(symbol, 4) for symbol in topic[: len(topic) // 22 * 22]]).view(-1, 22) for topic in every
    ])  # fmt: skip
    rows = nn.functional.pad(nn.functional.pad(inner, (1, 0), value=CLS), (0, 1), value=SEP)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[3000:], rows[:3000]


def misprinted(rows):
    """The rows, 8 % of their characters replaced by others drawn from the text, and which these are."""
    draw, inner = torch.Generator().manual_seed(1), rows[:, 1:-1]
    other = inner.flatten()[torch.randint(0, inner.numel(), inner.shape, generator=draw)]
    printed = torch.where(torch.rand(inner.shape, generator=draw) < 0.08, other, inner)
    return torch.cat([rows[:, :1], printed, rows[:, -1:]], 1), printed != inner


def probe(encoder, rows):
    """Area under the ROC curve of a linear probe on the frozen states of both layers that says which characters are misprints;
    fitted on one half of the rows, judged on the other."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    rows, wrong = misprinted(rows)
    with torch.no_grad():
        states = torch.cat(encoder.eval()(input_ids=rows, output_hidden_states=True).hidden_states[1:], -1)[:, 1:-1]
    half, x = len(rows) // 2, (states - states.mean((0, 1))) / states.std((0, 1))
    judge = LogisticRegression(C=0.01, max_iter=300).fit(x[:half].flatten(0, 1).numpy(), wrong[:half].flatten().numpy())
    return roc_auc_score(wrong[half:].flatten().numpy(), judge.decision_function(x[half:].flatten(0, 1).numpy()))


def encoder(kind, width, heads):
    """Two layers; positions start as waves, and weights large enough to learn soon."""
    config = ElectraConfig(
        vocab_size=SYMBOLS, embedding_size=64, hidden_size=width, num_hidden_layers=2, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=LENGTH, initializer_range=0.1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = kind(config)
    angle = torch.arange(LENGTH)[:, None] * 100.0 ** (-torch.arange(0, 64, 2) / 64)
    model.electra.embeddings.position_embeddings.weight.data = 0.14 * torch.cat([angle.sin(), angle.cos()], 1)
    return model


class Masked(nn.Module):
    """BERT's objective: of 15 % of the tokens 80 % are hidden, 10 % random, 10 % as they are."""

    def __init__(self):
        super().__init__()
        self.model = encoder(ElectraForMaskedLM, 64, 4)
        self.model.generator_lm_head.weight = self.model.electra.embeddings.word_embeddings.weight

    def forward(self, ids):
        chosen = choose(ids > MASK, torch.full((len(ids),), round(0.15 * LENGTH)))
        chance = torch.rand(ids.shape)
        seen = ids.masked_fill(chosen & (chance < 0.8), MASK)
        seen = torch.where(chosen & (chance > 0.9), torch.randint(4, SYMBOLS, ids.shape), seen)
        return cross_entropy(self.model(input_ids=seen).logits, ids.masked_fill(~chosen, IGNORE))


def pretrained(name, rows, seed=0, rate=2e-3):
    """The encoder after `STEPS` of "masked", or of ELECTRA with a generator "quarter" or "equal" in width."""
    torch.manual_seed(seed)
    if name == "masked":
        model, loss = Masked(), lambda m, ids: m(ids)
    else:
        width, heads = {"quarter": (16, 1), "equal": (64, 4)}[name]
        generator, main = encoder(ElectraForMaskedLM, width, heads), encoder(ElectraForPreTraining, 64, 4)
        model, loss = Electra(generator, main, MASK, [PAD, CLS, SEP]), lambda m, ids: m(ids, torch.ones_like(ids))
    train(model, rows, loss, Recipe(steps=STEPS, rate=rate, batch=40, warmup=0.1, seed=seed), progress=False)
    return (model.model if name == "masked" else model.discriminator).electra


@pytest.mark.slow
def test_a_discriminator_finds_misprints_that_a_masked_model_misses_and_a_small_generator_teaches_best():
    pytest.importorskip("accelerate")
    rows, held_out = text()
    found = {name: probe(pretrained(name, rows), held_out) for name in ("quarter", "equal", "masked")}
    print(found)
    assert found["quarter"] > found["masked"] + 0.05 and found["quarter"] > found["equal"] + 0.05, found
