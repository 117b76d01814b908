"""The trained digits model: it loads with its data, and is as good as its record says."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import jeton
from jeton.demo import digits


def test_it_is_as_good_as_recorded() -> None:
    found = digits.load_digits()
    recorded = json.loads((Path(digits.__file__).parent / "digits_vit" / "training.json").read_text())
    assert abs(digits.accuracy(found.model, found.test) - recorded["held out"]) < 0.004
    assert abs(digits.accuracy(found.model, found.train) - recorded["trained"]) < 0.002


def test_no_image_is_in_both_parts() -> None:
    learned, unseen = digits.splits()
    assert (len(learned), len(unseen)) == (1400, 397)
    both = {tuple(row) for row in learned.pixels.flatten(1).tolist()} & {tuple(row) for row in unseen.pixels.flatten(1).tolist()}
    assert not both
    assert learned.pixels.min() == -1 and learned.pixels.max() == 1


def test_a_quarter_of_the_tokens_is_nearly_enough() -> None:
    found = digits.load_digits()
    for name, least in (("tome", 0.9), ("evit", 0.8)):
        with jeton.apply(found.model, name, keep=0.25):
            assert digits.accuracy(found.model, found.test) > least, name


def test_training_it_again_begins_the_same() -> None:
    first, again = digits.untrained(), digits.untrained()
    batch = digits.splits()[0].pixels[:4], digits.splits()[0].labels[:4]
    torch.testing.assert_close(digits.entropy(first, batch), digits.entropy(again, batch), rtol=0, atol=0)
