"""Vim is Mamba in two directions; pruned, its scans know where the tokens that are left stood."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy, silu
from transformers import AutoModelForImageClassification, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from jeton.backbones.vim import Mixer, VimConfig, VimForImageClassification, Walk, read_released
from jeton.backbones.vim_pruning import PrunedVim, PrunedVimConfig, importance
from jeton.recipes import vim_pruning as recipe

SHAPE = {
    "image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 4, "state_size": 4,
    "num_labels": 5,
}  # fmt: skip
FOUR = ("forward", "backward", "down", "up")


def vim(**more):
    torch.manual_seed(0)
    model = VimForImageClassification(VimConfig(**{**SHAPE, **more})).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.out_proj.weight.mul_(4)
        model.head.weight.mul_(20)
    return model


def pixels(batch=3):
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_one_direction_is_transformers_mamba_mixer():
    torch.manual_seed(0)
    config = VimConfig(**{**SHAPE, "directions": ["forward"]})
    mine = Mixer(config)
    theirs = MambaMixer(MambaConfig(hidden_size=16, state_size=4, time_step_rank=1, num_hidden_layers=1), 0)
    state = {name.replace("directions.0.", ""): value for name, value in theirs.state_dict().items()}
    rename = {
        name: name if "proj" in name and "x_" not in name and "dt_" not in name else f"directions.0.{name}" for name in state
    }
    mine.load_state_dict({rename[name]: value for name, value in state.items()})
    x = torch.randn(2, 11, 16)
    torch.testing.assert_close(mine(x, [Walk()])[0], theirs(x))


def test_two_directions_share_the_gate_and_are_averaged():
    mixer, x = vim().layers[0].mixer, torch.randn(2, 11, 16)
    found, scanned = mixer(x, [Walk(), Walk.along(torch.arange(10, -1, -1).expand(2, -1))])
    u, z = mixer.in_proj(x).chunk(2, -1)
    there = mixer.directions[0](u, Walk())
    back = mixer.directions[1](u.flip(1), Walk()).flip(1)
    torch.testing.assert_close(scanned[1], back)
    torch.testing.assert_close(found, mixer.out_proj((there + back) * silu(z)) / 2)


@pytest.mark.parametrize(("size", "params"), [("tiny", 7_148_008), ("small", 25_796_584)])
def test_the_parameters_are_those_of_the_published_vim(size, params):
    with torch.device("meta"):
        model = VimForImageClassification(VimConfig.preset(size, num_labels=1000))
    assert sum(value.numel() for value in model.parameters()) == params


def test_released_weights_are_read_by_their_names():
    model, other = vim(), vim()
    released = {}
    for name, value in model.state_dict().items():
        name = name.replace("patch_embed.", "patch_embed.proj.").replace("directions.0.", "")
        if "directions.1." in name:
            front, part = name.split("directions.1.")
            part, dot, kind = part.partition(".")
            name = front + ("A_b_log" if part == "A_log" else part + "_b") + dot + kind
        released[name] = value
    assert "layers.0.mixer.A_b_log" in released and "layers.0.mixer.conv1d_b.weight" in released
    torch.nn.init.zeros_(other.layers[0].mixer.directions[1].D)
    assert not torch.equal(other(pixels()).logits, model(pixels()).logits)
    read_released(other, released)
    assert torch.equal(other(pixels()).logits, model(pixels()).logits)


def test_the_class_token_stands_in_the_middle():
    model = vim()
    x = model.embed(pixels())
    assert x.shape == (3, 17, 16)
    torch.testing.assert_close(x[:, 8], (model.cls_token[:, 0] + model.pos_embed[:, 8]).expand(3, -1))
    patch = model.patch_embed(pixels())[:, :, 3, 3]
    torch.testing.assert_close(x[:, 16], patch + model.pos_embed[:, 16])


def test_directions_are_orders_of_the_grid():
    model, index = vim(directions=FOUR), torch.arange(17)
    forward, backward, down, up = (model.places(name, index).tolist() for name in FOUR)
    assert forward == list(range(17)) and backward == list(range(16, -1, -1))
    assert down[:5] == [0, 5 - 1, 9, 13, 1] and down[8] == 8 and sorted(down) == forward
    assert up == [16 - place for place in down]


@pytest.mark.parametrize("directions", [FOUR[:2], FOUR])
def test_at_ratio_one_it_is_the_vim_it_came_from(directions):
    model = vim(directions=directions)
    pruned = PrunedVim.of(model, ratio=1.0)
    assert torch.equal(pruned(pixels()).logits, model(pixels()).logits)
    assert not torch.allclose(PrunedVim.of(model, ratio=0.5)(pixels()).logits, model(pixels()).logits, atol=1e-3)


def test_scores_are_clipped_before_they_are_averaged():
    y = torch.tensor([[[-3.0, 1.0, 2.0]]])
    assert importance([y]).item() == 1.0 and y.mean().item() == 0.0
    assert importance([y, torch.tensor([[[4.0, -1.0, -1.0]]])]).item() == pytest.approx(1 + 4 / 3)


def test_the_best_of_every_scan_stay_in_their_order_and_so_does_the_class_token():
    model = PrunedVim.of(vim(), ratio=0.5)
    scanned = [torch.randn(3, 17, 32) for _ in range(2)]
    scanned[0][:, 8] = -100  # the class token would be the last
    index = torch.arange(17).expand(3, -1)
    step = model.reduce(0, scanned, index)
    score = sum(y.clamp(min=0).mean(-1) for y in scanned)
    for b in range(3):
        patches = sorted((t for t in range(17) if t != 8), key=lambda t: -score[b, t])[:8]
        assert step.index[b].tolist() == sorted([*patches, 8])
    after = step.index
    assert torch.equal(after.gather(1, model.class_at(after)[:, None])[:, 0], torch.full((3,), 8))
    assert len(set(model.class_at(after).tolist())) > 1  # it stands elsewhere in each picture
    assert model.reduce(3, scanned, index) is None


def test_counts_are_those_planned_and_kept_tokens_are_originals():
    model = PrunedVim.of(vim(), ratio=0.7)
    assert model.config.layers == [0, 1, 2] and model.config.patches(16) == [16, 12, 9, 7]
    out = model(pixels())
    assert out.counts == [17, 13, 10, 8]
    index = out.reduction.index
    assert (index.diff(dim=1) > 0).all() and (index == 8).any(1).all()
    assert PrunedVimConfig(num_hidden_layers=24).layers == [5, 11, 17]
    assert PrunedVimConfig(num_hidden_layers=24).patches(196)[::6] == [196, 138, 97, 68]


@pytest.mark.parametrize("directions", [FOUR[:2], FOUR])
def test_aligned_pruning_is_the_dense_scan_over_zeros(directions):
    """The whole direction, convolution included: tokens left over scattered into zeros, without input where none is left."""
    model = PrunedVim.of(vim(directions=directions), ratio=0.5)
    index = torch.stack([torch.randperm(17)[:9].sort().values for _ in range(2)])
    x = torch.randn(2, 9, 32)
    reduction = type(model(pixels()).reduction).keep(index, 17)
    walks = model.walks(reduction)
    for name, direction, walk in zip(directions, model.layers[1].mixer.directions, walks):
        with torch.no_grad():
            assert torch.allclose(direction(x, walk), dense(direction, x, model.places(name, index)), atol=1e-5), name
            near = direction(x, Walk(walk.order, walk.back))
            assert not torch.allclose(near, direction(x, walk), atol=1e-3)


def dense(direction, x, places):
    """One step after the other over all 17 places."""
    at = places[..., None].expand(-1, -1, 32)
    full = torch.zeros(2, 17, 32).scatter(1, at, x)
    taps = direction.conv1d.weight[:, 0]
    u = torch.zeros(2, 17, 32) + direction.conv1d.bias
    for lag in range(4):
        u[:, lag:] += taps[:, 3 - lag] * full[:, : 17 - lag]
    u = silu(u)
    rank, b, c = direction.x_proj(u).split([1, 4, 4], -1)
    here = torch.zeros(2, 17, dtype=torch.bool).scatter(1, places, True)[..., None]
    bias = direction.dt_proj.bias
    time = torch.nn.functional.softplus(torch.where(here, direction.dt_proj(rank), bias))
    h, out = torch.zeros(2, 32, 4), []
    for t in range(17):
        h = (time[:, t, :, None] * -direction.A_log.exp()).exp() * h
        h = h + torch.where(here[:, t], time[:, t] * u[:, t], 0)[..., None] * b[:, t, None]
        out.append((h * c[:, t, None]).sum(-1) + direction.D * u[:, t])
    return torch.stack(out, 1).gather(1, at)


def test_a_batch_equals_its_pictures_one_by_one():
    model, x = PrunedVim.of(vim(), ratio=0.5), pixels(4)
    torch.testing.assert_close(model(x).logits, torch.cat([model(one[None]).logits for one in x]), atol=1e-5, rtol=1e-4)


def test_a_map_of_the_grid_comes_back():
    from jeton.tokens import Tokens

    out = PrunedVim.of(vim(), ratio=0.5)(pixels())
    whole = out.reduction.restore(Tokens(out.last_hidden_state))
    assert whole.features.shape == (3, 17, 16) and (whole.mask.sum(1) == out.counts[-1]).all()
    index = out.reduction.index[..., None].expand_as(out.last_hidden_state)
    assert torch.equal(whole.features.gather(1, index), out.last_hidden_state)


def test_it_learns_is_saved_and_comes_back(tmp_path):
    model = PrunedVim.of(vim(), ratio=0.5, align="scan").train()
    out = model(pixels(), labels=torch.tensor([0, 1, 2]))
    torch.testing.assert_close(out.loss, cross_entropy(out.logits, torch.tensor([0, 1, 2])))
    out.loss.backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is PrunedVim and again.config.align == "scan"
    assert torch.equal(again(pixels()).logits, model(pixels()).logits)


def test_bad_settings_are_refused():
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="share of patches"):
            PrunedVimConfig(ratio=wrong)
    with pytest.raises(ValueError, match="ascending"):
        PrunedVimConfig(layers=[3, 1])
    with pytest.raises(ValueError, match="0 to 23"):
        PrunedVimConfig(layers=[24])
    with pytest.raises(ValueError, match="align"):
        PrunedVimConfig(align="conv")
    with pytest.raises(ValueError, match="directions are"):
        VimConfig(directions=["sideways"])
    with pytest.raises(ValueError, match="there are tiny"):
        VimConfig.preset("huge")
    with pytest.raises(ValueError, match="8 x 8 pixels"):
        vim()(torch.zeros(1, 1, 12, 12))


@pytest.mark.slow
def test_aligned_pruning_loses_less_on_digits_than_closing_ranks(tmp_path):
    """Three Vims trained on the digits, pruned as they are, the same tokens."""
    pytest.importorskip("sklearn")
    found = recipe.run(tmp_path, progress=False)
    told = found["accuracy"]
    assert told["all"] > 0.9
    for ratio in recipe.RATIOS:
        assert told[f"{ratio}, aligned"] > told[f"{ratio}, neighbours"], told
    assert told["0.5, fine-tuned"] > told["0.5, aligned"] + 0.2
    assert json.loads((tmp_path / "results.json").read_text())["accuracy"] == told
