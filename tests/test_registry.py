"""The registry holds systems of every kind; only methods can be applied."""

from __future__ import annotations

import pytest

import jeton
from jeton import registry
from jeton.measure.systems import describe
from jeton.method import find, get


@pytest.fixture
def a_loss(monkeypatch):
    registry.systems()  # all files are read, so that none is read into the copy
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @registry.register(title="A loss", year=2020, source="nowhere", family="objective", stage="training", id="some-loss")
    def some_loss(logits, margin: float = 0.1):
        """Says how far off the logits are."""

    return some_loss


def test_a_function_gets_a_card_and_is_found(a_loss):
    assert registry.find("some-loss") is a_loss.card and a_loss.card.object is a_loss
    assert [card.id for card in jeton.systems("objective") if card.object is a_loss] == ["some-loss"]
    assert a_loss.card.row()["family"] == "objective"


def test_what_is_no_method_is_not_applied_and_says_how_it_is_used(a_loss):
    assert "some-loss" not in {card.id for card in jeton.methods()}
    for ask in (find, get):
        with pytest.raises(ValueError, match="jeton show some-loss"):
            ask("some-loss")


def test_a_description_shows_parameters_and_import(a_loss):
    text = describe(a_loss.card)
    assert "margin: float = 0.1" in text and "import some_loss" in text and "Says how far off" in text


def test_an_id_is_taken_once(a_loss):
    with pytest.raises(ValueError, match="already taken by some_loss"):
        registry.register(title="B", year=2021, source="x", family="objective", stage="training", id="some-loss")(lambda: None)


def test_an_unknown_system_suggests_the_nearest(a_loss):
    with pytest.raises(ValueError, match="Did you mean some-loss"):
        registry.find("some-los")
