"""`Reduction` is a sparse matrix: everything it does must follow from that matrix."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from jeton.ops.merging import merge
from jeton.place import Place
from jeton.tokens import Entries, Reduction, Tiles, Tokens, gather

B, N, D = 3, 12, 5


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(0))


def drop() -> Reduction:
    return Reduction.keep(torch.tensor([[0, 3, 7, 8], [1, 2, 3, 11], [4, 5, 6, 7]]), N)


def merging() -> Reduction:
    """Neighbours in pairs and one triple; token 5 is dropped."""
    into = torch.tensor([0, 0, 2, 2, 4, -1, 6, 6, 6, 9, 10, 10]).expand(B, -1)
    return merge(into, 6, size=torch.arange(1.0, 1 + B * N).reshape(B, N))


def soft() -> Reduction:
    return Reduction.soft(torch.rand(B, 4, N, generator=torch.Generator().manual_seed(1)).softmax(2))


def ragged() -> Reduction:
    chosen = torch.zeros(B, N, dtype=torch.bool)
    chosen[0, [1, 5]] = True
    chosen[1, [0, 2, 4, 11]] = True
    chosen[2, [6]] = True
    return Reduction.select(chosen)


FORMS = {"drop": drop, "merge": merging, "soft": soft}


@pytest.mark.parametrize("form", FORMS)
def test_applying_equals_the_dense_matrix(form, x):
    reduction = FORMS[form]()
    torch.testing.assert_close(reduction.apply(Tokens(x)).features, reduction.dense @ x, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(reduction.mix(x[:, :, 0]), (reduction.dense @ x)[:, :, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", ["drop", "merge", "soft"])
def test_then_equals_the_product_of_the_matrices(first, second, x):
    one = FORMS[first]()
    k = one.k
    two = {
        "drop": Reduction.keep(torch.tensor([[0, 2]]).expand(B, -1), k),
        "merge": merge(torch.tensor([0, 0, 2, 2, 4, 4][:k]).expand(B, -1), (k + 1) // 2),
        "soft": Reduction.soft(torch.rand(B, 2, k)),
    }[second]
    both = one.then(two)
    torch.testing.assert_close(both.dense, two.dense @ one.dense)
    stepwise = two.apply(one.apply(Tokens(x)))
    torch.testing.assert_close(both.apply(Tokens(x)).features, stepwise.features, atol=1e-5, rtol=1e-5)
    assert torch.equal(both.apply(Tokens(x)).index, stepwise.index)


def test_then_with_an_identity_changes_nothing():
    step = dataclasses.replace(merging(), order=torch.arange(6).flip(0).expand(B, -1))
    assert step.then(Reduction.identity(B, 6)) is step
    assert Reduction.identity(B, N).then(step) is step


@pytest.mark.parametrize("form", ["drop", "merge"])
def test_restoring_and_reducing_again_changes_nothing(form, x):
    reduction = FORMS[form]()
    mean = dataclasses.replace(reduction, weight=merge_mean(reduction)) if reduction.weight is not None else reduction
    once = mean.apply(Tokens(x))
    full = mean.restore(once)
    again = mean.apply(Tokens(full.features))
    torch.testing.assert_close(again.features, once.features)
    assert len(full) == N and torch.equal(full.mask, reduction.assign >= 0)
    assert (full.features[~full.mask] == 0).all()


def merge_mean(reduction: Reduction) -> torch.Tensor:
    count = reduction.size.gather(1, reduction.assign.clamp(min=0))
    return torch.where(reduction.assign >= 0, 1 / count, 0.0)


def test_a_dropped_token_is_never_read(x):
    reduction = merging()
    clean = reduction.apply(Tokens(x)).features
    x = x.clone()
    x[:, 5] = torch.nan
    assert torch.equal(reduction.apply(Tokens(x)).features, clean)


def test_merging_leaves_lone_tokens_bitwise_alone_in_every_dtype(x):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = merging().apply(Tokens(x.to(dtype))).features
        assert out.dtype == dtype
        assert torch.equal(out[:, 2], x.to(dtype)[:, 4])


def test_merging_sums_in_float32_not_in_half():
    x = torch.full((1, 2049, 1), 1.0, dtype=torch.float16)
    x[0, 0] = 2048.0
    into = torch.zeros(1, 2049, dtype=torch.long)
    summed = merge(into, 1, weight=torch.ones(1, 2049)).apply(Tokens(x)).features
    assert summed.item() == 4096.0  # added one by one in float16 it would stay at 2048


def test_the_fast_and_the_general_path_of_mixing_agree(x):
    fast = merging()
    general = dataclasses.replace(fast, mask=torch.ones(B, 6, dtype=torch.bool))
    torch.testing.assert_close(fast.mix(x), general.mix(x))


def test_gradients_of_a_merge_are_those_of_the_matrix(x):
    reduction, cotangent = merging(), torch.randn(B, 6, D)
    leaf = x.clone().requires_grad_()
    (reduction.apply(Tokens(leaf)).features * cotangent).sum().backward()
    torch.testing.assert_close(leaf.grad, reduction.dense.mT @ cotangent)


def test_sizes_add_up_over_merges_and_stay_with_drops(x):
    size = torch.arange(1.0, N + 1).expand(B, -1)
    merged = merging().apply(Tokens(x, size=size))
    assert merged.size[0].tolist() == [3, 7, 5, 24, 10, 23]
    kept = drop().apply(Tokens(x, size=size))
    assert kept.size[0].tolist() == [1, 4, 8, 9]
    assert drop().apply(Tokens(x)).size is None


def test_original_indices_and_places_travel_with_the_tokens(x):
    tokens = Tokens(x, place=Place.grid(B, 3, 4))
    after = Reduction.keep(torch.tensor([[1, 2]]).expand(B, -1), 4).apply(drop().apply(tokens))
    assert after.index[0].tolist() == [3, 7]
    assert after.place.row[0].tolist() == [0, 1] and after.place.col[0].tolist() == [3, 3]


def test_places_gather_the_crop_grid_too():
    place = dataclasses.replace(Place.grid(1, 2, 2), crop_row=torch.tensor([[0, 1, 2, 3]]), units=3)
    some = place.gather(torch.tensor([[1, 3]]))
    assert some.crop_row.tolist() == [[1, 3]] and some.crop_cols is None and some.units == 3


def test_ragged_selection_pads_at_the_end_and_masks(x):
    reduction = ragged()
    assert reduction.k == 4 and reduction.count().tolist() == [2, 4, 1]
    assert reduction.index[1].tolist() == [0, 2, 4, 11]
    after = reduction.apply(Tokens(x))
    assert torch.equal(after.mask, reduction.mask)
    torch.testing.assert_close(after.features[2, 0], x[2, 6])
    assert reduction.assign[2].max() == 0 and reduction.assign[2, 6] == 0


def test_padding_stays_padding_through_a_reduction(x):
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, 7:] = False
    after = drop().apply(Tokens(x, mask=mask))
    assert after.mask[0].tolist() == [True, True, False, False] and after.mask[1:].all()


def test_an_identity_hands_the_same_tokens_on(x):
    tokens = Tokens(x, size=torch.ones(B, N))
    assert Reduction.identity(B, N).apply(tokens) is tokens
    assert Reduction.identity(B, N).is_identity and not drop().is_identity


def test_gather_takes_rows_of_any_rank():
    x = torch.arange(24).reshape(1, 4, 3, 2)
    assert torch.equal(gather(x, torch.tensor([[2, 0]])), x[:, [2, 0]])


def test_wrong_shapes_are_refused_with_a_sentence(x):
    with pytest.raises(ValueError, match=r"Tokens.mask must be \(3, 12\)"):
        Tokens(x, mask=torch.ones(B, N + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="this reduction takes"):
        drop().apply(Tokens(x[:, :5]))
    with pytest.raises(ValueError, match="cannot chain"):
        drop().then(drop())
    with pytest.raises(ValueError, match="restore expects"):
        drop().restore(Tokens(x))


# -- entries -----------------------------------------------------------------------------------------------------------------


def listed():
    """Tokens 0 and 1 make a, tokens 1 and 2 make b, token 3 takes no part; one entry says nothing."""
    row, column = torch.tensor([[0, 0, 1, 1, 0]]), torch.tensor([[0, 1, 1, 2, 3]])
    value = torch.tensor([[0.5, 0.5, 0.25, 0.75, 0.0]])
    assign = torch.tensor([[0, 0, 1, -1]])
    return Reduction(torch.tensor([[0, 2]]), assign, entries=Entries(row, column, value))


def test_a_list_of_entries_says_the_same_as_its_dense_matrix():
    made = listed()
    assert made.dense.tolist() == [[[0.5, 0.5, 0, 0], [0, 0.25, 0.75, 0]]] and not made.is_drop
    x = torch.randn(1, 4, 3)
    dense = Reduction(made.index, made.assign, matrix=made.dense)
    torch.testing.assert_close(made.mix(x), made.dense @ x)
    old = torch.tensor([[1.0, 3.0, 2.0, 5.0]])
    one, two = (each.apply(Tokens(x, size=old)) for each in (made, dense))
    torch.testing.assert_close(one.size, two.size)
    assert one.size.tolist() == [[3.0, 3.0]]  # token 1 is shared two to one
    assert made.mix(x.bfloat16()).dtype == torch.bfloat16


def test_a_list_of_entries_chains_and_picks_rows():
    made = listed()
    x = torch.randn(1, 4, 3)
    half = Reduction.soft(torch.tensor([[[0.5, 0.5]]]))
    torch.testing.assert_close(made.then(half).mix(x), half.mix(made.mix(x)))
    torch.testing.assert_close(Reduction.identity(1, 4).then(made).mix(x), made.mix(x))
    entries = made.entries[torch.tensor([0, 0])]
    both = Reduction(made.index.expand(2, -1), made.assign.expand(2, -1), entries=entries)
    y = torch.randn(2, 4, 3)
    torch.testing.assert_close(both.mix(y), made.dense.expand(2, -1, -1) @ y)


# -- tiles -------------------------------------------------------------------------------------------------------------------


def tiled() -> Reduction:
    """Tokens 0, 1 and 3 make a and c, token 2 makes b, which is the second tile and a smaller one."""
    row, column = torch.tensor([[0, 2], [1, -1]]), torch.tensor([[0, 1, 3], [2, -1, -1]])
    value = torch.zeros(1, 2, 2, 3)
    value[0, 0] = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    value[0, 1, 0, 0] = 1.0
    value[0, 1, 1, 1] = 9.0  # what is no row and no column is never read
    back = value.mT.clone()
    back[0, 0] = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    assign = torch.tensor([[0, 0, 1, 2]])
    return Reduction(torch.tensor([[0, 2, 3]]), assign, tiles=Tiles(row, column, value), back=Tiles(column, row, back))


def test_tiles_say_the_same_as_their_dense_matrix():
    made = tiled()
    assert made.dense.tolist() == [[[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0.25, 0, 0.75]]] and not made.is_drop
    x, old = torch.randn(1, 4, 3), torch.tensor([[1.0, 3.0, 2.0, 5.0]])
    way_back = torch.tensor([[[1.0, 0, 0], [0.5, 0, 0.5], [0, 1, 0], [0, 0, 1]]])
    dense = Reduction(made.index, made.assign, matrix=made.dense, back=way_back)
    one, two = (each.apply(Tokens(x, size=old)) for each in (made, dense))
    torch.testing.assert_close(one.features, made.dense @ x)
    torch.testing.assert_close(one.size, two.size)
    assert one.size.sum() == 11 and made.mix(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(made.restore(one).features, way_back @ one.features)
    for each in (made, dense):
        behind = each.behind(2)
        after = behind.apply(Tokens(torch.cat([torch.ones(1, 2, 3), x], 1), prefix=2))
        torch.testing.assert_close(after.features[:, 2:], one.features)
        torch.testing.assert_close(behind.restore(after).features[:, 2:], way_back @ one.features)


def test_tiles_chain_and_pick_rows():
    made, x = tiled(), torch.randn(1, 4, 3)
    half = Reduction.soft(torch.tensor([[[0.5, 0.5, 0.0]]]))
    torch.testing.assert_close(made.then(half).mix(x), half.mix(made.mix(x)))
    again = made.tiles[torch.tensor([0, 0])]
    torch.testing.assert_close(again.mix(x.expand(2, -1, -1), 3), made.mix(x).expand(2, -1, -1))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_no_index_reaches_into_the_next_row(wrong: int) -> None:
    """x is (2, 3, 1): 3 of the first row would be the first token of the second, -1 of the second the last of the first."""
    x = torch.arange(6.0).view(2, 3, 1)
    assert gather(x, torch.tensor([[2, 0], [1, 1]])).flatten().tolist() == [2, 0, 4, 4]
    with pytest.raises(RuntimeError, match="out of bounds of its row"):
        gather(x, torch.tensor([[0, wrong], [wrong, 0]]))
