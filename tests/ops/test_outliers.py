"""The local outlier factor is scikit-learn's, in a batch and under padding."""

from __future__ import annotations

import warnings

import pytest
import torch
from sklearn.neighbors import LocalOutlierFactor

from jeton.ops.outliers import local_outlier_factor, local_outliers

FLAT = torch.linspace(0.001, 0.01, 60, dtype=torch.float64)


@pytest.mark.parametrize("neighbours", [1, 10, 20])
@pytest.mark.parametrize("n", [2, 5, 21, 60, 300])
def test_it_is_that_of_scikit_learn(n, neighbours):
    x = torch.rand(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) ** 4
    factor = local_outlier_factor(x, neighbours)
    for row, found in zip(x, factor, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer samples than neighbours
            known = LocalOutlierFactor(n_neighbors=neighbours).fit(row[:, None].numpy())
        torch.testing.assert_close(found, -torch.from_numpy(known.negative_outlier_factor_), rtol=1e-9, atol=1e-12)
        flagged = torch.from_numpy(known.negative_outlier_factor_ < -1.5)
        assert torch.equal(local_outliers(row[None], neighbours)[0], flagged)


def test_three_peaks_above_a_flat_floor_are_the_outliers():
    x = torch.cat([FLAT, torch.tensor([0.2, 0.3, 0.5])])[None]
    assert local_outliers(x, 20).nonzero()[:, 1].tolist() == [60, 61, 62]


def test_low_outliers_count_unless_only_upper_ones_do():
    x = torch.cat([FLAT, torch.tensor([-0.5])])[None]
    assert local_outliers(x, 20).nonzero()[:, 1].tolist() == [60]
    assert not local_outliers(x, 20, upper_only=True).any()


@pytest.mark.parametrize("n", [1, 2, 50])
def test_constant_scores_have_none(n):
    assert not local_outliers(torch.ones(2, n), 20).any()


def test_padding_changes_nothing():
    x = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) ** 3
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(2)) > 0.4
    factor = local_outlier_factor(x.masked_fill(~mask, 1e4), 10, mask)
    for row in range(2):
        torch.testing.assert_close(factor[row][mask[row]], local_outlier_factor(x[row][mask[row]][None], 10)[0])
    assert not local_outliers(x, 10, mask=mask)[~mask].any()
