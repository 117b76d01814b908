"""ReAGent: hand-worked updates, models of which it is known what they look at, and faithfulness."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from jeton.measure import replacement
from jeton.measure.reagent import ReAGent
from jeton.measure.replacement import faithfulness, last_logits

from .. import tiny
from .writer import Writer

VOCABULARY, ANSWER = 200, 5


class LooksAt(nn.Module):
    """Says ANSWER with probability 0.9 where the token at one place is 7, and hardly ever otherwise."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        right = (input_ids[:, self.place] == 7)[:, None]
        chance = torch.where(right, 0.9, 1e-4)
        rest = ((1 - chance) / (VOCABULARY - 1)).expand(-1, VOCABULARY).clone()
        rest[:, ANSWER] = chance[:, 0]
        return SimpleNamespace(logits=rest.log()[:, None].expand(-1, input_ids.shape[1], -1))


def llama(**more):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}
    return tiny.ready(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more)))


def test_hand_worked_updates():
    replaced = torch.tensor([[True, False]])
    found = ReAGent().update(torch.zeros(1, 2), replaced, torch.tensor([[0.5]]))
    torch.testing.assert_close(found, torch.tensor([[1.0986, -1.0986]]), atol=1e-4, rtol=0)
    start = torch.rand(1, 2)
    assert torch.equal(ReAGent().update(start, replaced, torch.zeros(1, 1)), start)
    for drop in (1.0, -1.0):
        assert ReAGent().update(start, replaced, torch.full((1, 1), drop)).isfinite().all()


def test_where_replacing_changes_nothing_scores_stay_as_they_began():
    """The target always has the same probability: importance is the softmax of numbers in [0, 1]."""
    model = LooksAt(0)
    same = ReAGent(replicas=1, steps=20, keep=1, top=1, sampler=lambda ids, mask: nn.functional.one_hot(ids, VOCABULARY).float())
    found = same.explain(model, torch.full((50, 6), 3), torch.full((50,), ANSWER))
    assert found.min() >= 1 / (1 + 5 * math.e) - 1e-6 and found.max() <= math.e / (math.e + 5) + 1e-6
    torch.testing.assert_close(found.sum(1), torch.ones(50))


def test_the_token_that_matters_is_found_and_the_others_are_alike():
    ids = torch.tensor([[1, 2, 3, 7, 4, 6, 8, 9]]).repeat(60, 1)
    system = ReAGent(keep=1, top=1, replicas=3, steps=400, sampler=replacement.uniform(VOCABULARY))
    found = system.explain(LooksAt(3), ids)
    assert (found.argmax(1) == 3).float().mean() >= 0.95
    others = found.mean(0)[[0, 1, 2, 4, 5, 6, 7]]
    assert float(found.mean(0)[3]) > 4 * float(others.max()) and float(others.std() / others.mean()) < 0.3
    elsewhere = system.explain(LooksAt(3), torch.where(ids == 7, 0, ids))  # there the answer hangs on no token
    assert float(elsewhere.mean(0).max()) < 0.5


def test_a_prompt_gives_the_same_alone_and_padded():
    """Nothing of the padding is replaced or counted: with one token that may be replaced, all importance is there."""
    model = llama()
    ids = torch.nn.functional.pad(tiny.words(6, 3), (3, 0))
    mask = torch.nn.functional.pad(torch.ones(1, 6), (3, 0)).bool()
    system = ReAGent(steps=5, replicas=2)
    found = system.explain(model, ids, mask=mask)
    assert not found[0, :3].any() and found[0, 3:].min() > 0 and float(found.sum()) == pytest.approx(1)
    torch.testing.assert_close(last_logits(model, ids, mask), last_logits(model, ids[:, 3:], mask[:, 3:]), atol=1e-4, rtol=1e-4)
    special = sorted(set(ids[0, 3:8].tolist()))
    only = ReAGent(steps=5, special=special).explain(model, ids, mask=mask)
    assert only[0].tolist() == [0.0] * 8 + [1.0]
    with pytest.raises(ValueError, match="no token that may be replaced"):
        ReAGent(special=special + ids[0, 8:].tolist()).explain(model, ids, mask=mask)


def test_the_same_seed_gives_the_same_whatever_the_global_state():
    model, ids = llama(), tiny.words(9, 0)
    torch.manual_seed(1)
    first = ReAGent(steps=20).explain(model, ids)
    torch.manual_seed(2)
    assert torch.equal(first, ReAGent(steps=20).explain(model, ids))
    assert not torch.equal(first, ReAGent(steps=20, seed=1).explain(model, ids))


def test_a_replica_stops_where_the_rest_is_not_needed():
    """With all tokens kept the target is there at once: one step is taken, however many are allowed."""
    calls = []

    class Spy(LooksAt):
        def forward(self, input_ids, **more):
            calls.append(len(input_ids))
            return super().forward(input_ids, **more)

    ReAGent(keep=1.0, replicas=4, steps=500, sampler=replacement.uniform(VOCABULARY)).explain(Spy(2), torch.full((2, 5), 7))
    assert calls == [2, 16, 16]


def test_special_tokens_are_never_drawn():
    class Records(LooksAt):
        def forward(self, input_ids, **more):
            seen.append(input_ids)
            return super().forward(input_ids, **more)

    seen, ids = [], torch.tensor([[1, 2, 3, 7]])
    ReAGent(steps=40, replicas=8, keep=1, top=1, special={9}, sampler=replacement.uniform(12)).explain(Records(0), ids)
    assert torch.cat([part.flatten() for part in seen]).unique().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11]


def test_samplers_say_what_may_stand_where():
    ids, mask = tiny.words(7, 0), torch.ones(1, 7, dtype=torch.bool)
    model = llama()
    assert replacement.uniform(9)(ids, mask).shape == (1, 7, 9)
    assert replacement.by_frequency(torch.arange(4))(ids, mask)[0, 3].tolist() == [0, 1, 2, 3]
    classes = torch.arange(100) % 3
    allowed = replacement.by_class(classes)(ids, mask)
    assert all(classes[allowed[0, at].bool()].unique().tolist() == [int(classes[ids[0, at]])] for at in range(7))
    chance = replacement.from_lm(model)(ids, mask)
    torch.testing.assert_close(chance[0, 4], model(ids).logits[0, 3].softmax(-1), atol=1e-5, rtol=1e-4)
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=100
    )
    bert = tiny.ready(transformers.BertForMaskedLM(config))
    guessed = replacement.from_masked_lm(bert, 4)(ids, mask)
    hidden = ids.clone()
    hidden[0, 2] = 4
    torch.testing.assert_close(guessed[0, 2], bert(hidden).logits[0, 2].softmax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("distance", ["hellinger", "released"])
def test_faithfulness_at_its_ends(distance):
    model, ids = llama(), torch.cat([tiny.words(8, 0), tiny.words(8, 1)])
    ones = torch.ones(2, 8)
    for kind in ("soft_ns", "ns"):
        whole = faithfulness(model, ids, ones, kind, share=1.0, distance=distance)
        torch.testing.assert_close(whole, torch.ones(2), atol=1e-4, rtol=0)
    for kind in ("soft_nc", "nc"):
        gone = faithfulness(model, ids, ones, kind, share=1.0, distance=distance)
        torch.testing.assert_close(gone, torch.ones(2), atol=1e-4, rtol=0)  # as far as an input of zeros
    assert faithfulness(model, ids, torch.rand(2, 8), "ns", share=0.25, distance=distance).max() < 1
    for bad, message in (({"kind": "x"}, "kind"), ({"distance": "x"}, "distance"), ({"importance": -ones}, "not negative")):
        with pytest.raises(ValueError, match=message):
            faithfulness(**{"model": model, "ids": ids, "importance": ones, **bad})


def test_bad_arguments_are_refused():
    for fields, message in (({"rate": 0.0}, "rate"), ({"keep": 0}, "keep"), ({"keep": 1.5}, "keep"), ({"steps": 0}, "steps")):
        with pytest.raises(ValueError, match=message):
            ReAGent(**fields)
    with pytest.raises(ValueError, match=r"\(B, L\)"):
        ReAGent().explain(llama(), torch.ones(3, dtype=torch.long))


@pytest.mark.slow
def test_it_explains_a_trained_model_better_than_chance(writer: Writer):
    ids = writer.ids(50, 16)
    found = ReAGent(steps=150, keep=0.3, top=3).explain(writer.model, ids)
    chance = torch.rand(found.shape, generator=torch.Generator().manual_seed(0))
    for kind in ("soft_ns", "soft_nc"):
        better = faithfulness(writer.model, ids, found, kind, draws=20) - faithfulness(writer.model, ids, chance, kind, draws=20)
        t = float(better.mean() / better.std() * 50**0.5)
        print(kind, float(better.mean()), "t =", t)
        assert t > 1.68  # one-sided, p < 0.05 with 49 degrees of freedom
