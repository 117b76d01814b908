"""Schedules over layers: shares that meet a budget, and whole counts."""

from __future__ import annotations

import pytest

from jeton.ops.schedule import falling, fitted, last_share, mean_share, middle_of, whole_counts

PLACES = (9, 18)


def test_the_sigmoid_meets_its_budget():
    """kappa 0.5 from 1 to 0 over 32 layers, a quarter on average."""
    layers = range(32)
    middle = middle_of(layers, 0.5, 0.0, 1.0, 0.25)
    assert middle == pytest.approx(7.4634, abs=5e-5)
    shares = falling(layers, 0.5, 0.0, 1.0, middle)
    assert sum(shares) / 32 == pytest.approx(0.25, abs=1e-6) and shares == sorted(shares, reverse=True)
    assert sum(falling(layers, 0.5, 0.0, 1.0, middle + 0.01)) / 32 != pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("kappa", [0.05, 0.5, 16.0])
@pytest.mark.parametrize("mean", [0.11, 0.4, 0.79])
def test_every_mean_between_the_ends_can_be_met(kappa, mean):
    middle = middle_of(range(2, 28), kappa, 0.1, 0.8, mean)
    assert sum(falling(range(2, 28), kappa, 0.1, 0.8, middle)) / 26 == pytest.approx(mean, abs=1e-9)


@pytest.mark.parametrize("n", [5, 49, 576])
def test_counts_add_up_and_never_grow(n):
    for mean in (0.25, 0.5, 0.9):
        shares = falling(range(30), 0.3, 1 / n, 1.0, middle_of(range(30), 0.3, 1 / n, 1.0, mean))
        counts = whole_counts(shares, n)
        assert sum(counts) == round(mean * n * 30) and counts == sorted(counts, reverse=True)
        assert all(abs(count - share * n) < 1 for count, share in zip(counts, shares, strict=True))
    assert whole_counts([0.5, 0.5, 0.0], 3) == [2, 1, 1]


@pytest.mark.parametrize(
    ("ratios", "mean"),
    [
        ((0.7233201, 0.7487476, 0.487), 0.5008),
        ((0.2651026, 0.9833433, 0.8773258), 0.2507),
        ((0.1166153, 1.0, 0.6011), 0.1000),
    ],
)
def test_the_published_triples_average_to_their_budgets(ratios, mean):
    assert mean_share(ratios, PLACES, 28) == pytest.approx(mean, abs=5e-5)
    assert mean_share(ratios, (10, 18), 28) != pytest.approx(mean, abs=5e-5) or ratios[1] == 1.0


def test_the_last_share_follows_from_the_budget():
    assert last_share(0.25, (0.2651, 0.98334), PLACES, 28) == pytest.approx(0.86997, abs=5e-5)
    assert mean_share((0.4, 0.7, last_share(0.3, (0.4, 0.7), PLACES, 28)), PLACES, 28) == pytest.approx(0.3)
    assert last_share(0.9, (0.2, 0.5), PLACES, 28) == 1.0 and last_share(0.1, (0.9, 0.9), PLACES, 28) < 0


def test_a_curve_that_is_a_sigmoid_is_found_again():
    shares = falling(range(16), 0.5, 0.1, 0.9, 6.0)
    kappa, low, high = fitted(shares)
    assert kappa == 0.5 and low == min(shares) and high == max(shares)
