"""Active neurons, core neurons, and what tokens share with them."""

from __future__ import annotations

import torch

from jeton.ops.neurons import SLAB, core, counts, overlap, positive

GATED = torch.tensor([[[3.0, -1.0, 0.0, 2.0, 1.0], [-1.0, 5.0, 4.0, 0.5, 3.0]]])


def test_positive_activations_are_active():
    assert positive(GATED).long().tolist() == [[[1, 0, 0, 1, 1], [0, 1, 1, 1, 1]]]


def test_only_the_largest_share_of_the_positive_ones_may_count():
    """Three positive: half of them, rounded up, are two; four: two."""
    assert positive(GATED, 0.5).long().tolist() == [[[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]]]
    assert torch.equal(positive(GATED, 0.999), positive(GATED))
    negative = -GATED.abs() - 1
    assert not positive(negative, 0.5).any()


def test_counts_leave_padding_out_and_go_slab_by_slab():
    x = torch.rand(2, 2 * SLAB + 3, 7) > 0.5
    real = torch.rand(2, 2 * SLAB + 3) > 0.3
    assert torch.equal(counts(x), x.sum(1)) and torch.equal(counts(x, real), (x & real[..., None]).sum(1))


def test_core_neurons_are_those_most_tokens_activate():
    count = torch.tensor([[3, 9, 1, 9, 3]])
    assert core(count, 0.4).tolist() == [[1, 3]] and core(count, 0.6).tolist() == [[0, 1, 3]]
    assert core(count, 1.0).tolist() == [[0, 1, 2, 3, 4]] and core(count, 0.01).tolist() == [[1]]


def test_overlap_counts_common_neurons():
    active = positive(GATED)
    chosen = torch.tensor([[True, False, True, True, False]])
    assert overlap(active, chosen).tolist() == [[2, 2]]
