"""DPC-KNN against its definition, written out."""

from __future__ import annotations

import pytest
import torch

from by_hand import dpc_knn as by_hand
from jeton.ops.clustering import dpc_knn


@pytest.mark.parametrize(("clusters", "neighbours"), [(1, 1), (3, 3), (5, 2), (12, 5)])
def test_it_follows_the_definition(clusters, neighbours):
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(clusters))
    got = dpc_knn(x, clusters, neighbours)
    assert got.tolist() == [by_hand(row, clusters, neighbours) for row in x]
    assert all(len(row.unique()) == clusters for row in got)


def test_it_finds_groups_that_are_there():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(30) % 3
    x = 10 * torch.eye(3)[label] + 0.1 * torch.randn(30, 3, generator=generator)
    into = dpc_knn(x[None], 3, 5)[0]
    assert all(len(into[label == each].unique()) == 1 for each in range(3)) and len(into.unique()) == 3


def test_rows_may_differ_in_length_and_in_numbers_and_padding_is_never_looked_at():
    x = torch.randn(2, 14, 4, generator=torch.Generator().manual_seed(1))
    x[1, 9:] = 1e6
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1, 9:] = False
    numbers = torch.tensor([[4], [2]])
    got = dpc_knn(x, numbers, numbers, mask)
    assert got[0].tolist() == by_hand(x[0], 4, 4) and got[1, :9].tolist() == by_hand(x[1, :9], 2, 2)
    assert (got[1, 9:] == -1).all()
    loud = dpc_knn(x, numbers, numbers)  # the twin: without the mask the padding is a cluster
    assert not torch.equal(loud[1, :9], got[1, :9])


def test_equal_tokens_are_settled_by_index_without_noise():
    state = torch.get_rng_state()
    assert dpc_knn(torch.ones(1, 5, 3), 2, 2).tolist() == [[0, 1, 0, 0, 0]]
    assert torch.equal(state, torch.get_rng_state())


def test_large_hidden_states_do_not_cancel():
    """One huge common coordinate, as language models have: the differences beside it still decide."""
    x = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(2))
    shifted = torch.cat([x, torch.full((1, 20, 1), 4096.0)], 2)
    plain = torch.cat([x, torch.zeros(1, 20, 1)], 2)
    assert torch.equal(dpc_knn(shifted, 4, 4), dpc_knn(plain, 4, 4))
