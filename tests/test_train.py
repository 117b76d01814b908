"""The trainer: what it minimizes, that an interrupted run goes on to the same numbers, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

from jeton.train import Recipe, _Order, load, train

pytest.importorskip("accelerate")
RECIPE = Recipe(steps=40, rate=0.05, batch=8, decay=0.0)


class Lines:
    """y = 2 x0 - x1 + 0.5."""

    def __init__(self):
        self.x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        return x, 2 * x[0] - x[1] + 0.5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.head, self.noise = nn.Linear(2, 1), nn.Dropout(0.2)

    def forward(self, x):
        return self.head(x + 0 * self.noise(x)).squeeze(-1)


def squared(model, batch):
    x, y = batch
    return {"squared": (model(x) - y).square().mean()}


def noisy(model, batch):
    """A loss that draws random numbers, so that resuming must put the generator back too."""
    x, y = batch
    return (model(x + 0.1 * torch.randn_like(x)) - y).square().mean()


def weights(model):
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def test_it_finds_the_line():
    model = Net()
    history = train(model, Lines(), squared, Recipe(steps=300, rate=0.05, batch=16, decay=0.0), progress=False)
    assert torch.allclose(weights(model), torch.tensor([2.0, -1.0, 0.5]), atol=0.01)
    assert history.losses["squared"][0] > 100 * history.last()["squared"] and not model.training


def test_data_may_be_a_function_of_the_step():
    seen = []

    def draw(step):
        seen.append(step)
        x = torch.randn(16, 2, generator=torch.Generator().manual_seed(step))
        return x, 2 * x[:, 0] - x[:, 1] + 0.5

    model = Net()
    train(model, draw, squared, Recipe(steps=200, rate=0.05, decay=0.0), progress=False)
    assert seen == list(range(200)) and torch.allclose(weights(model), torch.tensor([2.0, -1.0, 0.5]), atol=0.02)


@pytest.mark.parametrize("average", [None, 0.9])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, average):
    recipe = Recipe(steps=40, rate=0.05, batch=8, average=average)
    whole, cut = Net(), Net()
    told = train(whole, Lines(), noisy, recipe, progress=False)
    calls = 0

    def stops(model, batch):
        nonlocal calls
        calls += 1
        if calls == 27:
            raise KeyboardInterrupt
        return noisy(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train(cut, Lines(), stops, recipe, out=tmp_path, save_every=10, progress=False)
    told_so_far = json.loads((tmp_path / "state" / "run.json").read_text())
    told_so_far["history"]["seconds"] += 1000
    (tmp_path / "state" / "run.json").write_text(json.dumps(told_so_far))
    fresh = Net()
    history = train(fresh, Lines(), noisy, recipe, out=tmp_path, resume=True, progress=False)
    assert history.seconds > 1000  # what was spent before counts
    assert torch.equal(weights(fresh), weights(whole)) and not torch.equal(weights(cut), weights(whole))
    assert history.losses == told.losses and history.steps == told.steps
    assert torch.equal(weights(load(Net(), tmp_path)), weights(whole))
    assert not (tmp_path / "state").exists() and json.loads((tmp_path / "history.json").read_text())["steps"][-1] == 40


def test_an_interrupted_run_is_neither_overwritten_nor_mixed_with_another(tmp_path):
    def stops(model, batch):
        if (tmp_path / "state").exists():
            raise KeyboardInterrupt
        return squared(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train(Net(), Lines(), stops, RECIPE, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="interrupted run"):
        train(Net(), Lines(), squared, RECIPE, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"rate=0\.05, not 0\.1"):
        train(Net(), Lines(), squared, Recipe(steps=40, rate=0.1, batch=8, decay=0.0), out=tmp_path, resume=True, progress=False)


def test_it_does_not_touch_the_global_random_state_nor_depend_on_it():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two = Net(), Net()
    torch.set_rng_state(state)
    train(one, Lines(), noisy, RECIPE, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    train(two, Lines(), noisy, RECIPE, progress=False)
    assert torch.equal(weights(one), weights(two))


def test_rates_hold_for_the_longest_beginning_and_frozen_parameters_stay():
    model = Net()
    before = weights(model)
    train(model, Lines(), squared, Recipe(steps=5, rate=0.1, batch=8, rates={"head.": 1.0, "head.bias": 0.0}), progress=False)
    assert model.head.bias.item() == before[2] and not torch.equal(model.head.weight.flatten(), before[:2])
    model.head.weight.requires_grad_(False)
    kept = model.head.weight.clone()
    train(model, Lines(), squared, RECIPE, progress=False)
    assert torch.equal(model.head.weight, kept) and model.head.bias.item() != before[2]


def test_matrices_decay_and_vectors_do_not():
    model = Net()
    before = weights(model)
    train(model, Lines(), lambda m, batch: 0 * m(batch[0]).sum(), Recipe(steps=3, rate=0.1, batch=8, decay=0.5), progress=False)
    assert (model.head.weight.abs().flatten() < before[:2].abs()).all() and model.head.bias.item() == before[2]


def test_the_average_of_the_weights_is_kept():
    plain, slow = Net(), Net()
    start = weights(plain)
    train(plain, Lines(), squared, Recipe(steps=10, rate=0.05, batch=8), progress=False)
    train(slow, Lines(), squared, Recipe(steps=10, rate=0.05, batch=8, average=0.95), progress=False)
    assert (weights(slow) - start).norm() < 0.8 * (weights(plain) - start).norm()


def test_the_rate_rises_and_falls():
    recipe = Recipe(steps=100, rate=1.0, warmup=0.1, floor=0.1)
    assert [round(recipe.factor(step), 3) for step in (0, 4, 9, 10, 55, 100)] == [0.1, 0.5, 1.0, 1.0, 0.55, 0.1]


def test_every_example_comes_once_an_epoch():
    order = list(_Order(8, 2, seed=0, start=0, stop=8))
    for epoch in (order[:4], order[4:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(8))
    assert order[:4] != order[4:]
    assert list(_Order(8, 2, seed=0, start=3, stop=8)) == order[3:]


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"rate": -1}, {"rate": float("nan")}, {"warmup": 1}, {"precision": "half"}, {"average": 1}, {"batch": 2.5}],
)
def test_a_recipe_that_means_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Recipe(**{"steps": 10, "rate": 0.1, **wrong})


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        train(Net().requires_grad_(False), Lines(), squared, RECIPE, progress=False)
    with pytest.raises(ValueError, match="batch of 100"):
        train(Net(), Lines(), squared, Recipe(steps=1, rate=0.1, batch=100), progress=False)
    with pytest.raises(ValueError, match="'hed'"):
        train(Net(), Lines(), squared, Recipe(steps=1, rate=0.1, batch=8, rates={"hed": 0.1}), progress=False)
    with pytest.raises(FloatingPointError, match="squared is nan by step 1"):
        train(Net(), Lines(), lambda model, batch: {"squared": model(batch[0]).sum() * float("nan")}, RECIPE, progress=False)


def test_bfloat16_trains_too():
    model = Net()
    history = train(model, Lines(), squared, Recipe(steps=60, rate=0.05, batch=16, precision="bfloat16"), progress=False)
    assert history.last()["squared"] < 0.1 * history.losses["squared"][0] and model.head.weight.dtype == torch.float32


def test_a_transformers_model_with_modules_of_its_own_is_read_again(tmp_path):
    """Families whose checkpoints have other names than their modules, with a module more than their class has."""
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )

    def made(seed):
        torch.manual_seed(seed)
        model = transformers.ViTForImageClassification(config)
        model.vit.more = torch.nn.Linear(3, 3)
        return model

    first, second = made(0), made(1)
    batch = torch.randn(4, 3, 8, 8)
    train(
        first,
        lambda step: batch,
        lambda m, x: m(x).logits.square().mean(),
        Recipe(steps=2, rate=1e-2),
        out=tmp_path,
        progress=False,
    )
    load(second, tmp_path)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    with pytest.raises(ValueError, match="another model"):
        load(transformers.ViTForImageClassification(config), tmp_path)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "less")
    with pytest.raises(ValueError, match=r"another model: vit\.more"):
        load(second, tmp_path / "less")
