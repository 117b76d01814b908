"""FasterVLM, FastV and DivPrune against their cards."""

from __future__ import annotations

import pytest
import torch

from jeton.method import get
from jeton.needs import ClassAttention, ReceivedAttention
from jeton.place import Place
from jeton.tokens import Tokens


def test_fastervlm_keeps_the_most_attended_in_spatial_order():
    attention = torch.tensor([[[0.1, 0.4, 0.2, 0.3]]])
    step = get("fastervlm", keep=2).reduce(Tokens(torch.randn(1, 4, 2)), {"attention": attention})
    assert step.index.tolist() == [[1, 3]]
    twin = get("fastervlm", keep=2).reduce(Tokens(torch.randn(1, 4, 2)), {"attention": -attention})
    assert twin.index.tolist() == [[0, 2]]


def test_fastervlm_averages_over_heads():
    attention = torch.tensor([[[0.9, 0.0, 0.05], [0.0, 0.6, 0.4], [0.0, 0.6, 0.4]]])
    step = get("fastervlm", keep=1).reduce(Tokens(torch.randn(1, 3, 2)), {"attention": attention})
    assert step.index.tolist() == [[1]]


def test_fastervlm_asks_for_the_class_token_or_for_what_each_token_receives():
    assert get("fastervlm").needs() == {"attention": ClassAttention(layer=-1)}
    assert get("fastervlm", score="received").needs() == {"attention": ReceivedAttention(layer=-1)}


def test_fastervlm_per_crop_gives_every_crop_its_own_budget(anyres):
    tokens = Tokens(torch.randn(1, 80, 2), place=anyres(2, 2, 4, 4))
    attention = torch.arange(80.0)[None]
    crop = get("fastervlm", keep=3, per="crop").reduce(tokens, {"attention": attention})
    assert crop.index[0][crop.real[0]].tolist() == [base + offset for base in range(0, 80, 16) for offset in (13, 14, 15)]
    image = get("fastervlm", keep=13).reduce(tokens, {"attention": attention})
    assert torch.bincount(tokens.place.unit[0][image.index[0]]).tolist() == [3, 3, 3, 2, 2]


def test_fastv_acts_at_its_layer_only():
    steps = get("fastv").steps(576, 4)
    assert [step is not None for step in steps] == [False, False, True, False]
    assert get("fastv").promise(576).count == 288
    with pytest.raises(ValueError, match="there are 2"):
        get("fastv").steps(576, 2)


def test_fastv_keeps_what_the_last_token_attends_to():
    attention = torch.tensor([[[0.1, 0.2, 0.3, 0.0], [0.3, 0.0, 0.3, 0.0]]])
    step = get("fastv").reduce(Tokens(torch.randn(1, 4, 2)), {"attention": attention})
    assert step.index.tolist() == [[0, 2]] and step.is_drop
    assert get("fastv", keep=1.0).reduce(Tokens(torch.randn(1, 4, 2)), {"attention": attention}).is_identity


def test_divprune_hand_case_and_scale():
    x = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]]])
    assert get("divprune", keep=3).reduce(Tokens(x)).index.tolist() == [[0, 2, 3]]
    x = torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(0))
    scaled = x * torch.rand(2, 60, 1).add(0.1).log2().round().exp2()
    assert torch.equal(get("divprune", keep=9).reduce(Tokens(x)).index, get("divprune", keep=9).reduce(Tokens(scaled)).index)
    shifted = x + 3  # the twin: a shift is not a scale
    assert not torch.equal(get("divprune", keep=9).reduce(Tokens(x)).index, get("divprune", keep=9).reduce(Tokens(shifted)).index)


def test_divprune_keeps_56_of_576_by_default():
    assert get("divprune").promise(576).count == 56


def test_divprune_covers_better_than_random_and_than_one_corner():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 16, generator=generator)
    label = torch.randint(0, 12, (200,), generator=generator)
    x = (centres[label] + 0.1 * torch.randn(200, 16, generator=generator))[None]
    unit = torch.nn.functional.normalize(x[0], dim=-1)

    def uncovered(index: torch.Tensor) -> float:
        return (1 - unit @ unit[index].T).amin(1).max().item()

    spread = uncovered(get("divprune", keep=12).reduce(Tokens(x)).index[0])
    others = [uncovered(get("random", keep=12, seed=seed).reduce(Tokens(x)).index[0]) for seed in range(10)]
    assert spread < min(others)


@pytest.mark.parametrize("name", ["fastervlm", "fastv", "hired", "visionzip"])
def test_a_missing_signal_is_named(name):
    with pytest.raises(ValueError, match=f"{name} reads attention"):
        get(name, keep=2).reduce(Tokens(torch.randn(1, 8, 2), place=Place.grid(1, 2, 4)))
