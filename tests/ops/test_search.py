"""Searching: bisection, roots, and a black box optimised better than by luck."""

from __future__ import annotations

import math

import pytest
import torch

from jeton.ops.search import Range, least, maximise, root

CUBE = {name: Range(0.0, 1.0) for name in "abc"}


def hill(point):
    """Smooth, with its top of 1 at (0.3, 0.7, 0.55)."""
    return math.exp(-8 * sum((point[name] - at) ** 2 for name, at in zip("abc", (0.3, 0.7, 0.55), strict=True)))


@pytest.mark.parametrize("high", [1, 2, 7, 32])
def test_bisection_finds_the_least_in_few_tests(high):
    for wanted in range(1, high + 1):
        tested = []

        def passes(k, wanted=wanted, tested=tested):
            tested.append(k)
            return k >= wanted

        assert least(passes, 1, high) == wanted
        assert len(tested) <= math.ceil(math.log2(high)) if high > 1 else not tested


def test_roots_are_found_to_the_last_bit_and_ends_where_there_are_none():
    assert root(lambda x: x**3 - 2, 0, 2) == pytest.approx(2 ** (1 / 3), abs=1e-15)
    assert root(lambda x: x + 1, 0, 2) == 0 and root(lambda x: x - 3, 0, 2) == 2


def test_the_optimiser_beats_random_search_of_equal_calls():
    """Ten seeds, forty calls each."""
    tuned, drawn = ([maximise(hill, CUBE, 40, sampler=name, seed=seed)[1] for seed in range(10)] for name in ("tpe", "random"))
    assert sum(a > b for a, b in zip(tuned, drawn, strict=True)) >= 9
    assert sum(tuned) / 10 > sum(drawn) / 10 + 0.05


def test_a_gaussian_process_does_too():
    pytest.importorskip("scipy")
    line = {"x": Range(0.0, 1.0)}
    tuned, drawn = (maximise(lambda at: -((at["x"] - 0.3) ** 2), line, 6, sampler=name, warmup=4)[1] for name in ("gp", "random"))
    assert drawn < tuned and tuned > -1e-2


def test_start_points_come_first_and_stay_in_range():
    seen = []

    def note(point):
        seen.append(point)
        return hill(point)

    best, value = maximise(note, CUBE, 5, start=[{"a": 0.3, "b": 0.7, "c": 0.55}, {"a": -1, "b": 2, "c": 0.5}], sampler="random")
    assert seen[:2] == [{"a": 0.3, "b": 0.7, "c": 0.55}, {"a": 0.0, "b": 1.0, "c": 0.5}] and len(seen) == 5
    assert best == seen[0] and value == 1.0


def test_a_search_repeats_under_its_seed_and_leaves_the_random_state_alone():
    import numpy as np

    before, draws = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (maximise(hill, CUBE, 12, sampler="tpe", seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == draws).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"sampler": "luck"}, "no sampler 'luck'"), ({"calls": 0}, "tries nothing"), ({"space": {}}, "at least one range")],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        maximise(hill, **{"space": CUBE, "calls": 3, **arguments})
    with pytest.raises(ValueError, match="not below"):
        Range(1.0, 0.0)
