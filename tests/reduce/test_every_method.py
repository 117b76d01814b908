"""What holds for every registered method, on plain tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from jeton.learned import Shape
from jeton.method import get, reducers
from jeton.needs import TextAttention
from jeton.place import Place
from jeton.registry import Card
from jeton.tokens import Tokens
from trained import LEARNED, modules

SIDE = 6
N = SIDE * SIDE
WHOLE = ("shared", "learned")  # signals without an axis of tokens
BUDGETED = [card for card in reducers() if "keep" in {item.name for item in dataclasses.fields(card.object)}]
ROWS_OF_ATTENTION = sorted(
    {name for card in BUDGETED for name, need in card.object().needs().items() if need.heads or isinstance(need, TextAttention)}
)
# whole grids, at most as large as asked; and methods whose budget is what blocks see, since all tokens are there at the end
EXACT = [card for card in BUDGETED if card.id not in ("downsample", "quota") and not card.object.restores]


def ids(card: Card) -> str:
    return card.id


def row(
    card: Card | None = None, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tokens, dict]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, N, 16, generator=generator).to(device, dtype)
    attention = [torch.rand(batch, 4, N, generator=generator).to(device) for _ in range(3)]
    keys = torch.randn(batch, N, 8, generator=generator).to(device, dtype)
    signals = {"attention": attention[0], "early": attention[1], "late": attention[2], "keys": keys, "values": keys + 1}
    signals["variance"] = torch.rand(batch, N, generator=generator).to(device)
    signals["similarity"] = attention[1][:, :1]
    signals["likeness"] = attention[1].mean(1)
    for name in ROWS_OF_ATTENTION:
        signals.setdefault(name, torch.rand(batch, 4, N, generator=generator).to(device))
    signals["neurons"] = (torch.rand(batch, N, 24, generator=generator) > 0.5).to(device)
    signals["shared"] = torch.randint(0, N, (batch, 24), generator=generator).to(device)
    if card is not None and card.id in LEARNED:
        signals["learned"] = modules(card.id, Shape(16, 4, 12, N, 0)).to(device)
    return Tokens(x, place=Place.grid(batch, SIDE, SIDE, device)), signals


def cut(tokens: Tokens, signals: dict, b: int, n: int) -> tuple[Tokens, dict]:
    """Row b alone, with its first n tokens."""
    place = tokens.place.gather(torch.arange(n).expand(len(tokens.features), -1))
    place = dataclasses.replace(
        place,
        **{
            item.name: getattr(place, item.name)[b : b + 1]
            for item in dataclasses.fields(place)
            if isinstance(getattr(place, item.name), torch.Tensor)
        },
    )
    first = {name: s if name == "learned" else s[b : b + 1] for name, s in signals.items()}
    some = {name: s if name in WHOLE else s[:, :n] if s.shape[1] == N else s[:, :, :n] for name, s in first.items()}
    return Tokens(tokens.features[b : b + 1, :n], place=place), some


@pytest.mark.parametrize("card", EXACT, ids=ids)
@pytest.mark.parametrize("keep", [1, 5, 17, 35, 0.3, 0.5])
def test_the_budget_is_met_exactly(card, keep):
    tokens, signals = row(card)
    method = get(card.id, keep=keep)
    step = method.reduce(tokens, signals)
    assert step.k == method.promise(N, 12).count and step.mask is None
    assert len(step.apply(tokens)) == step.k


@pytest.mark.parametrize("card", BUDGETED, ids=ids)
@pytest.mark.parametrize("keep", [1.0, N, N + 50])
def test_keeping_everything_changes_nothing(card, keep):
    tokens, signals = row(card)
    step = get(card.id, keep=keep).reduce(tokens, signals)
    after = step.apply(tokens)
    assert step.is_identity and torch.equal(after.features, tokens.features)


@pytest.mark.parametrize("card", BUDGETED, ids=ids)
def test_kept_tokens_stand_in_their_original_order(card):
    tokens, signals = row(card)
    step = get(card.id, keep=11).reduce(tokens, signals)
    for b in range(2):
        assert (step.index[b][step.real[b]].diff() > 0).all()
    assert torch.equal(step.assign.gather(1, step.index)[step.real], torch.arange(step.k).expand(2, -1)[step.real])


@pytest.mark.parametrize("card", BUDGETED, ids=ids)
def test_features_follow_from_the_matrix(card):
    tokens, signals = row(card)
    step = get(card.id, keep=9).reduce(tokens, signals)
    got, expected = step.apply(tokens).features, step.dense @ tokens.features
    torch.testing.assert_close(got[step.real], expected[step.real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("card", BUDGETED, ids=ids)
def test_a_batch_equals_its_rows_one_by_one(card):
    tokens, signals = row(card, batch=3)
    method = get(card.id, keep=10)
    batch = method.reduce(tokens, signals)
    for b in range(3):
        alone = method.reduce(*cut(tokens, signals, b, N))
        assert torch.equal(batch.index[b], alone.index[0]) and torch.equal(batch.assign[b], alone.assign[0])


@pytest.mark.parametrize("card", BUDGETED, ids=ids)
@pytest.mark.parametrize("keep", [1, 10, 33, 0.3, 1.0])
def test_padding_never_wins_and_changes_nothing(card, keep):
    tokens, signals = row(card)
    n = 30  # five whole rows of the grid
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, n:] = False
    x = tokens.features.clone()
    x[1, n:] = 1e4
    loud = {name: s if name == "learned" else s.clone() for name, s in signals.items()}
    for s in (s for name, s in loud.items() if name not in WHOLE):
        (s[1, n:] if s.shape[1] == N else s[1, :, n:]).fill_(1e4)
    method = get(card.id, keep=keep)
    padded = method.reduce(dataclasses.replace(tokens, features=x, mask=mask), loud)
    alone = method.reduce(*cut(tokens, signals, 1, n))
    index = padded.index[1][padded.real[1]]
    assert torch.equal(index, alone.index[0][alone.real[0]])
    assert torch.equal(padded.assign[1, :n], alone.assign[0]) and (padded.assign[1, n:] == -1).all()
    whole = method.reduce(tokens, signals)
    assert torch.equal(padded.index[0][padded.real[0]], whole.index[0][whole.real[0]])


@pytest.mark.parametrize("card", BUDGETED, ids=ids)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_decided_in_float32(card, dtype):
    tokens, signals = row(card, dtype=dtype)
    step = get(card.id, keep=9).reduce(tokens, signals)
    after = step.apply(tokens)
    assert after.features.dtype == dtype and after.features.isfinite().all()
    wide = {name: s.float() if name != "learned" and s.is_floating_point() else s for name, s in signals.items()}
    same = get(card.id, keep=9).reduce(dataclasses.replace(tokens, features=tokens.features.float()), wide)
    assert torch.equal(step.index, same.index)


@pytest.mark.parametrize("card", BUDGETED, ids=ids)
def test_it_is_deterministic_and_leaves_the_global_random_state_alone(card):
    tokens, signals = row(card)
    before = torch.get_rng_state()
    first = get(card.id, keep=9).reduce(tokens, signals)
    torch.rand(3)
    second = get(card.id, keep=9).reduce(tokens, signals)
    assert torch.equal(first.index, second.index) and torch.equal(first.assign, second.assign)
    torch.set_rng_state(before)


@pytest.mark.parametrize("card", BUDGETED, ids=ids)
@pytest.mark.parametrize("keep", [5, 0.3])
@pytest.mark.parametrize("units", [1, 3])
def test_nothing_waits_for_the_device(card, keep, units):
    """On the meta device there are no values to look at: any .item(), .tolist() or bool(tensor) fails."""
    tokens, signals = row(card, device="meta")
    grid = dict.fromkeys(("crop_row", "crop_col", "crop_rows", "crop_cols"), tokens.place.row)
    tokens = dataclasses.replace(tokens, place=dataclasses.replace(tokens.place, units=units, **grid))
    step = get(card.id, keep=keep).reduce(tokens, signals)
    after = step.apply(tokens)
    assert len(after) == step.k and step.then(get("uniform", keep=2).reduce(after)).k == min(2, step.k)


@pytest.mark.parametrize("card", BUDGETED, ids=ids)
def test_it_compiles_into_one_graph(card):
    tokens, signals = row(card)
    method = get(card.id, keep=9)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step = method.reduce(dataclasses.replace(tokens, features=x), signals)
        return step.index, step.mix(x)

    torch._dynamo.reset()
    index, features = torch.compile(run, backend="eager", fullgraph=True)(tokens.features)
    plain = run(tokens.features)
    assert torch.equal(index, plain[0])
    torch.testing.assert_close(features, plain[1])


@pytest.mark.parametrize("card", BUDGETED, ids=ids)
def test_gradients_reach_the_kept_tokens(card):
    tokens, signals = row(card)
    x = tokens.features.clone().requires_grad_()
    live = dataclasses.replace(tokens, features=x)
    step = get(card.id, keep=9).reduce(live, signals)
    step.apply(live).features[step.real].sum().backward()
    assert x.grad.isfinite().all() and (x.grad.abs().sum(2).gather(1, step.index)[step.real] > 0).all()


@pytest.mark.parametrize("spec", ["tome(keep=9)", "pitome(keep=9)", "tome(r=4)", "pitome"])
def test_merging_conserves_the_weighted_sum(spec):
    tokens, signals = row()
    after = get(spec).reduce(tokens, signals).apply(tokens)
    torch.testing.assert_close((after.size[..., None] * after.features).sum(1), tokens.features.sum(1), atol=1e-4, rtol=0)
    assert (after.size.sum(1) == N).all()


@pytest.mark.parametrize("card", [card for card in BUDGETED if card.stage == "block"], ids=ids)
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_special_tokens_are_kept_bitwise(card, prefix):
    tokens, signals = row(card)
    tokens = dataclasses.replace(tokens, prefix=prefix)
    step = get(card.id, keep=6).reduce(tokens, signals)
    after = step.apply(tokens)
    assert torch.equal(after.features[:, :prefix], tokens.features[:, :prefix])
    assert step.prefix == after.prefix == prefix and (step.k == 6 + prefix or card.object.restores)


@pytest.mark.parametrize("card", [card for card in BUDGETED if card.stage in ("block", "layer")], ids=ids)
@pytest.mark.parametrize("depth", [4, 12])
def test_steps_cover_every_block_and_arrive_where_promised(card, depth):
    method = get(card.id, keep=8)
    tokens, given = row(card)
    steps = method.steps(N, depth)
    assert len(steps) == depth
    for step in steps:
        if step is not None and not card.object.restores:
            n = len(tokens)
            signals = {name: torch.rand(2, 4, n) for name in ("attention", "similarity", *ROWS_OF_ATTENTION)}
            signals |= {name: torch.randn(2, n, 8) for name in ("keys", "values")}
            signals |= {name: torch.rand(2, 4, n) for name, need in step.needs().items() if need.heads}
            signals |= {"importance": torch.rand(2, n), "neurons": torch.rand(2, n, 24) > 0.5}
            signals |= {"shared": torch.randint(0, n, (2, 24)), "learned": given.get("learned")}
            tokens = step.reduce(tokens, signals).apply(tokens)
    assert len(tokens) == method.promise(N, depth).count
    wanted = N if method.restores else 8
    assert len(tokens) <= 8 if method.average else len(tokens) == wanted
