"""ELECTRA: which tokens are chosen, what is replaced, and where gradients go."""

from __future__ import annotations

import math
import pydoc_data.topics

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


# -- on a real corpus ----------------------------------------------------------------------------------------------------


def corpus(length=32):
    """Chunks of words of the language reference that ships with Python, and the number of the topic each comes from."""
    topics = [" ".join(text.split()).split() for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 12_000][:12]
    words = sorted({word for text in topics for word in text})
    counts = dict.fromkeys(words, 0)
    for text in topics:
        for word in text:
            counts[word] += 1
    known = {word: 4 + at for at, word in enumerate(sorted(words, key=lambda w: (-counts[w], w))[:1500])}
    ids = [torch.tensor([known.get(word, 4) for word in text]) for text in topics]
    chunks = [(part, topic) for topic, text in enumerate(ids) for part in text.split(length - 2) if len(part) == length - 2]
    rows = torch.stack([torch.cat([torch.tensor([CLS]), part, torch.tensor([SEP])]) for part, _ in chunks])
    return rows, torch.tensor([topic for _, topic in chunks]), 1504


def probe(encoder, ids, topics):
    """Accuracy of a linear probe on mean hidden states, on every fourth chunk."""
    from sklearn.linear_model import LogisticRegression

    with torch.no_grad():
        states = torch.cat([encoder(input_ids=part).last_hidden_state.mean(1) for part in ids.split(64)])
    held = torch.arange(len(ids)) % 4 == 0
    model = LogisticRegression(max_iter=2000).fit(states[~held].numpy(), topics[~held].numpy())
    return model.score(states[held].numpy(), topics[held].numpy())


@pytest.mark.slow
def test_on_real_text_the_discriminator_learns_more_than_a_masked_language_model_at_equal_steps():
    ids, topics, vocab = corpus()
    recipe = Recipe(steps=600, rate=1e-3, batch=32)

    def config(width):
        return ElectraConfig(
            vocab_size=vocab,
            embedding_size=64,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=max(1, width // 32),
            intermediate_size=4 * width,
            max_position_embeddings=64,
        )

    def pretrained(width):
        torch.manual_seed(0)
        model = Electra(ElectraForMaskedLM(config(width)), ElectraForPreTraining(config(128)), MASK, [PAD, CLS, SEP])
        train(model, ids, lambda m, b: m(b, torch.ones_like(b)), recipe, progress=False)
        return probe(model.discriminator.electra.eval(), ids, topics)

    def masked():
        torch.manual_seed(0)
        model = ElectraForMaskedLM(config(128))

        def loss(net, batch):
            chosen = choose(batch > MASK, torch.full((len(batch),), 5))
            logits = net(input_ids=batch.masked_fill(chosen, MASK)).logits
            return cross_entropy(logits, batch.masked_fill(~chosen, IGNORE))

        train(model, ids, loss, recipe, progress=False)
        return probe(model.electra.eval(), ids, topics)

    quarter, equal, plain = pretrained(32), pretrained(128), masked()
    print(f"discriminator {quarter:.3f}, with an equal generator {equal:.3f}, masked language model {plain:.3f}")
    assert quarter > plain and quarter > equal
