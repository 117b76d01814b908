"""Names, specs and budgets: what a user writes and what he is told when it is wrong."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from jeton.learned import Learned
from jeton.method import Budget, Sequence, find, get, methods, reducers
from jeton.ops.budget import count
from jeton.tokens import Tokens

KEEPERS = [card.id for card in reducers() if "keep" in {item.name for item in dataclasses.fields(card.object)}]


def test_a_method_is_made_by_name_by_spec_and_by_itself():
    assert get("divprune", keep=16) == get("divprune(keep=16)")
    method = get("tome(r=8)")
    assert get(method) is method and method.r == 8


def test_specs_join_with_a_bar():
    both = get("tome(r=8) | divprune(keep=64)")
    assert isinstance(both, Sequence) and [m.card.id for m in both] == ["tome", "divprune"]
    assert both == get("tome", r=8) | get("divprune", keep=64)
    assert get(both.spec) == both


@pytest.mark.parametrize("spec", ["tome(r=(13, -1.0))", "tome(r=[4, 4, 2])", "evit(locations=(2, 4))", "random(seed=-3)"])
def test_fields_may_be_negative_or_lists(spec):
    assert get(get(spec).spec) == get(spec)


def test_ids_may_be_written_with_spaces_and_hyphens():
    with pytest.raises(ValueError, match="no method 'some-id'"):
        get("some-id(keep=2)")
    assert get("  divprune ( keep = 3 ) ").keep == 3


@pytest.mark.parametrize(("wrong", "right"), [("divprun", "divprune"), ("tom", "tome"), ("fastvlm", "fastervlm")])
def test_a_misspelt_name_suggests_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=f"Did you mean .*{right}"):
        get(wrong)


def test_a_misspelt_field_suggests_the_nearest():
    with pytest.raises(TypeError, match=r"divprune has no field 'kep'. Did you mean keep\?"):
        get("divprune(kep=3)")


@pytest.mark.parametrize("spec", ["divprune(", "divprune(16)", "divprune & tome", "1 + 1", "", "divprune(keep=print())"])
def test_an_unreadable_spec_is_refused(spec):
    with pytest.raises(ValueError, match=r"cannot read the spec|there is no method"):
        get(spec)


@pytest.mark.parametrize("name", KEEPERS)
@pytest.mark.parametrize("keep", [0, -1, -0.5, 0.0, 1.5, math.nan, math.inf])
def test_a_budget_that_means_nothing_is_refused(name, keep):
    with pytest.raises(ValueError, match="keep="):
        get(name, keep=keep)


@pytest.mark.parametrize("name", KEEPERS)
@pytest.mark.parametrize("keep", [True, "x", [4], (3,)])
def test_a_budget_of_the_wrong_type_is_refused(name, keep):
    with pytest.raises(TypeError, match="keep must be a count"):
        get(name, keep=keep)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("tome(r=-1)", "negative"),
        ("tome(r=(1, 2, 3))", "inflect"),
        ("pitome(ratio=0.4)", "at most half"),
        ("pitome(form='x')", "form must be"),
        ("evit(ratio=2)", "ratio"),
        ("evit(ratio=0.0)", "ratio"),
        ("evit(locations=(-1,))", "block numbers"),
        ("fastv(layer=0)", "layer=0"),
        ("fastervlm(per='row')", "per must be"),
        ("fastervlm(score='cls')", "score must be"),
        ("visionzip(dominant=-1)", "dominant"),
        ("visionzip(keep=8, contextual=9)", "do not fit"),
        ("hired(alpha=1.5)", "alpha"),
    ],
)
def test_a_wrong_field_is_refused_when_the_method_is_made(spec, error):
    with pytest.raises(ValueError, match=error):
        get(spec)


@pytest.mark.parametrize("spec", ["tome(r=1.5)", "tome(r=True)", "pitome(ratio=True)", "evit(ratio='x')", "random(seed=0.5)"])
def test_a_field_of_the_wrong_type_is_refused_when_the_method_is_made(spec):
    with pytest.raises(TypeError):
        get(spec)


def test_every_card_is_complete():
    for card in methods():
        assert card.id and card.title and card.source and 2017 <= card.year <= 2026
        assert card.family in ("vit", "vlm", "control")
        assert card.training_free != issubclass(card.object, Learned)
        assert card.stage == card.object.site
        assert find(card.id) is card
        assert card.object.__doc__ and card.row()["id"] == card.id


def test_counts_round_to_the_nearest_and_keep_at_least_one():
    assert [Budget(keep).count(576) for keep in (64, 0.25, 0.098, 1.0, 1000, 0.0001)] == [64, 144, 56, 576, 576, 1]
    assert all(Budget(0.3).count(n) == count(0.3, n) for n in range(1, 50))


def test_a_chain_reduces_and_promises_step_by_step():
    chain = get("uniform(keep=10) | random(keep=0.5)")
    x = torch.randn(2, 30, 4)
    reduction = chain.reduce(Tokens(x))
    assert reduction.k == chain.promise(30).count == 5
    assert set(reduction.index[0].tolist()) <= set(get("uniform(keep=10)").reduce(Tokens(x)).index[0].tolist())
