"""Lastde: hand-worked entropies, batches as a plain loop, and text written by a small trained model."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from jeton.measure.lastde import Lastde
from jeton.measure.token_scores import detection, token_scores

from .. import tiny
from .writer import Writer

SERIES = torch.tensor([[1.0, 2, 13, 7, 9, 5, 4]])
LOGP = torch.tensor([[-1.0, -2, -0.5, -3, -1, -0.2, -2.5, -1.5]])


def by_loop(x: torch.Tensor, window: int, eps: int, scales: int) -> float:
    """One series, one scale and one window after the other."""
    entropies = []
    for tau in range(1, scales + 1):
        smooth = [float(x[i : i + tau].mean()) for i in range(len(x) - tau + 1)]
        windows = [torch.tensor(smooth[i : i + window]) for i in range(len(smooth) - window + 1)]
        counts = [0] * eps
        for a, b in zip(windows, windows[1:], strict=False):
            likeness = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
            counts[min(eps - 1, int((likeness + 1) / 2 * eps))] += 1
        shares = [count / sum(counts) for count in counts if count]
        entropies.append(-sum(p * math.log(p) for p in shares) / math.log(eps))
    return float(x.mean()) / float(torch.tensor(entropies).std())


def test_hand_worked_entropies():
    system, count = Lastde(window=3, bins=10 / 7, scales=3), torch.tensor([7])
    entropies = [float(system.diversity(SERIES, count, tau)) for tau in (1, 2, 3)]
    assert entropies == pytest.approx([0.3010, 0, 0], abs=1e-4)
    assert float(system.spread(SERIES, count)) == pytest.approx(0.1738, abs=1e-4)


def test_a_hand_worked_score():
    system = Lastde(window=3, bins=1, scales=3)
    assert [float(system.diversity(LOGP, torch.tensor([8]), tau)) for tau in (1, 2, 3)] == pytest.approx([0.3237, 0, 0], abs=1e-4)
    assert float(system.score(LOGP)) == pytest.approx(-7.8267, abs=1e-3)


@pytest.mark.parametrize("system", [Lastde(), Lastde.closed(), Lastde(window=4, bins=8, scales=15)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_a_plain_loop(system, side):
    generator = torch.Generator().manual_seed(0)
    lengths = [24, 40, 61]
    rows = [-torch.rand(length, generator=generator) * 5 for length in lengths]
    wide = torch.full((3, 61), -99.0)
    mask = torch.zeros(3, 61, dtype=torch.bool)
    for row, x in enumerate(rows):
        part = slice(61 - len(x), None) if side == "left" else slice(len(x))
        wide[row, part], mask[row, part] = x, True
    expected = [by_loop(x, system.window, int(system.bins * len(x)), system.scales) for x in rows]
    torch.testing.assert_close(system.score(wide, mask), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    wrong = [by_loop(x, system.window + 1, int(system.bins * len(x)), system.scales) for x in rows]
    assert not torch.allclose(system.score(wide, mask), torch.tensor(wrong), rtol=1e-2)


def test_flat_series_are_finite_and_short_ones_refused():
    assert Lastde().score(torch.full((1, 30), -2.0)).isfinite().all()
    assert Lastde().score(torch.randn(1, 8)).isfinite().all()
    with pytest.raises(ValueError, match="a text has 7 predicted tokens"):
        Lastde().score(torch.randn(2, 7))
    with pytest.raises(ValueError, match="scales 2"):
        Lastde(scales=1)
    with pytest.raises(ValueError, match="must be \\(B, L\\)"):
        Lastde().score(torch.randn(9))


def test_plus_is_standard_where_the_text_is_a_sample_itself():
    """Texts drawn per position from the same prediction as the alternatives: mean near 0, unit spread."""
    generator = torch.Generator().manual_seed(0)
    one = 2 * torch.randn(60, 30, generator=generator)
    logits, mask = one.expand(200, 60, 30), torch.ones(200, 60, dtype=torch.bool)
    labels = torch.multinomial(one.softmax(-1), 200, replacement=True, generator=generator).T
    system = Lastde(window=4, bins=8, scales=5, samples=30)
    found = system.discrepancy(logits, logits, labels, mask)
    assert abs(float(found.mean())) < 0.25 and 0.8 < float(found.std()) < 1.25
    likeliest = one.argmax(-1).expand(4, 60)  # is no sample
    assert float(system.discrepancy(logits[:4], logits[:4], likeliest, mask[:4]).abs().min()) > 2
    two = torch.stack([one, 60 * torch.randn(60, 30, generator=generator)])  # each is judged by its own alternatives
    drawn = torch.multinomial(two.softmax(-1).flatten(0, 1), 1, generator=generator).view(2, 60)
    assert float(system.discrepancy(two, two, drawn, mask[:2]).abs().max()) < 4


def test_models_of_different_vocabularies_are_cut_to_the_smaller():
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(1, 40, 20, generator=generator), torch.randn(1, 40, 25, generator=generator)
    labels, mask = torch.randint(20, (1, 40), generator=generator), torch.ones(1, 40, dtype=torch.bool)
    system = Lastde(samples=10)
    assert torch.equal(system.discrepancy(large, small, labels, mask), system.discrepancy(large[..., :20], small, labels, mask))
    with pytest.raises(ValueError, match="outside the 20"):
        system.discrepancy(large, small, labels + 5, mask)


def test_token_scores_are_shifted_and_do_not_see_padding():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=100
    )
    model = tiny.ready(transformers.LlamaForCausalLM(config))
    ids = tiny.words(12, 1)
    one = token_scores(model, ids)
    logits = model(ids).logits[0].detach()
    assert float(one.logp[0, 4]) == pytest.approx(float(logits[4].log_softmax(-1)[ids[0, 5]]), abs=1e-5)
    assert int(one.rank[0, 4]) == int((logits[4] > logits[4][ids[0, 5]]).sum()) + 1
    assert float(one.entropy[0, 4]) == pytest.approx(float(torch.distributions.Categorical(logits=logits[4]).entropy()), abs=1e-4)
    for pad in ((5, 0), (0, 5)):
        wide = torch.nn.functional.pad(ids, pad)
        mask = torch.nn.functional.pad(torch.ones_like(ids), pad).bool()
        padded = token_scores(model, wide, mask)
        assert int(padded.mask.sum()) == 11
        torch.testing.assert_close(padded.logp[padded.mask], one.logp[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="at least two tokens"):
        token_scores(model, ids[:, :1])


def test_detection_against_scikit_learn():
    from sklearn.metrics import average_precision_score, roc_auc_score

    generator = torch.Generator().manual_seed(0)
    human, machine = (
        torch.randn(60, generator=generator).round(decimals=1),
        (torch.randn(80, generator=generator) + 1).round(decimals=1),
    )
    found = detection(human, machine)
    truth = [0] * 60 + [1] * 80
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, torch.cat([human, machine])))
    assert found["pr_auc"] == pytest.approx(average_precision_score(truth, torch.cat([human, machine])))
    assert detection(torch.zeros(20), torch.ones(5)) == {"auroc": 1, "pr_auc": 1, "tpr": 1}
    assert detection(torch.ones(20), torch.zeros(5))["tpr"] == 0


@pytest.mark.slow
def test_it_tells_a_trained_model_s_own_text_from_human_text_better_than_likelihood(writer: Writer):
    human, machine = writer.human(100, 128), writer.written(100, 128)
    results = {}
    for name, system in (("lastde", Lastde()), ("lastde++", Lastde.plus(50))):
        scores = [system.detect(writer.model, writer.tokenizer, texts) for texts in (human, machine)]
        results[name] = detection(*scores)["auroc"]
    likely = []
    for texts in (human, machine):
        ids = [torch.tensor([writer.tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in texts]
        assert len(texts) == 100 and min(one.shape[1] for one in ids) >= 100
        likely.append(torch.stack([token_scores(writer.model, one).logp.mean() for one in ids]))
    results["likelihood"] = detection(*likely)["auroc"]
    print(results)
    assert results["lastde"] > results["likelihood"] and results["lastde"] > 0.95
    assert results["lastde++"] > 0.75  # below likelihood on so small a model
