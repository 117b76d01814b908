"""ELViT: clusters and reconstruction by hand, its normalisations, inside encoders, and on the trained digits model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import jeton
import tiny
from jeton.method import Undo, get
from jeton.ops.clustering import reconstruction, superpixels
from jeton.ops.grid import fit, fitted
from jeton.place import Place
from jeton.reduce.elvit import ELViT
from jeton.tokens import Tokens


def on_grid(values, height, width):
    x = values.reshape(1, height * width, -1).float()
    return Tokens(x, place=Place.grid(1, height, width))


def test_as_many_centres_as_tokens_change_nothing():
    x = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0)) * 3
    near = torch.ones(2, 12, 12, dtype=torch.bool)
    _, centres = superpixels(x, torch.eye(12).expand(2, -1, -1), near, 100.0, 5)
    torch.testing.assert_close(centres, x, atol=1e-5, rtol=1e-5)
    back = reconstruction(x, centres, 100.0, 1, "sum", torch.ones(2, 12, dtype=torch.bool))
    torch.testing.assert_close(back @ centres, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("tau", "expected"), [(1.0, [0, 10, 20, 30]), (0.01, [4.39, 7.38, 22.62, 25.61])])
def test_centres_by_hand(tau, expected):
    values = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 30]])
    tokens = on_grid(values, 4, 4)
    step = get("elvit", keep=4, tau=tau).reduce(tokens)
    assert step.apply(tokens).features.flatten().tolist() == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(("norm", "factor"), [("sum", 1.0), ("l2", 20**0.5)])
def test_the_two_normalisations_differ_on_a_constant_map(norm, factor):
    tokens = on_grid(torch.full((80, 3), 2.0), 8, 10)
    step = get("elvit", keep=20, norm=norm).reduce(tokens)
    assert step.k == 20
    restored = step.restore(step.apply(tokens)).features
    torch.testing.assert_close(restored, torch.full_like(restored, 2.0 * factor), atol=1e-4, rtol=0)


def test_a_token_belongs_to_centres_near_its_own_cell():
    """Equal tokens far away in a row of cells are not of one cluster."""
    tokens = on_grid(torch.tensor([1.0, 5, 5, 5, 5, 5, 5, 1.0]).repeat_interleave(2), 1, 16)
    tight = get("elvit", keep=8, window=1, tau=1.0).reduce(tokens)
    assert (tight.matrix[0, 0, 4:] == 0).all() and tight.matrix[0].sum(1).tolist() == pytest.approx([1] * 8)
    reach = (get("elvit", keep=8, window=5, tau=1.0).reduce(tokens).matrix[0] > 0).nonzero()
    assert ((reach[:, 0] - reach[:, 1] // 2).abs() <= 2).all() and (reach[:, 0] != reach[:, 1] // 2).any()


def test_only_the_nearest_centres_take_part_with_ties():
    x, centres = torch.zeros(1, 1, 1), torch.tensor([[[1.0], [-1.0], [2.0], [3.0]]])
    real = torch.ones(1, 4, dtype=torch.bool)
    assert reconstruction(x, centres, 0.1, 1, "sum", real).tolist() == [[[0.5, 0.5, 0, 0]]]
    weight = torch.tensor([0.1, 0.1, 0.4]).neg().exp()
    found = reconstruction(x, centres, 0.1, 3, "sum", real)[0, 0]
    assert found.tolist() == pytest.approx([*(weight / weight.sum()).tolist(), 0])
    huge = reconstruction(x + 1e4, centres, 1.0, 2, "sum", real)
    assert huge.isfinite().all() and huge.sum().item() == pytest.approx(1.0)


def test_grids_known_on_the_host_are_those_of_tensors():
    for k in (1, 5, 17, 98, 196):
        for height, width in ((14, 14), (7, 20), (30, 3)):
            tensors = fit(*(torch.tensor(each) for each in (min(k, height * width), height, width)))
            assert fitted(min(k, height * width), height, width) == tuple(int(x) for x in tensors)


def test_where_it_acts():
    steps = get("elvit").steps(196, 32)
    assert [number for number, step in enumerate(steps) if step] == [5, 31] and isinstance(steps[31], Undo)
    steps = get("elvit", after=1, until=3).steps(196, 6)
    assert [number for number, step in enumerate(steps) if step] == [1, 3]
    assert get("elvit", keep=1.0).steps(196, 6) == [None] * 6 and get("elvit").promise(196).count == 196
    for fields in ({"after": 3, "until": 3}, {"after": 5}, {"until": 9}):
        with pytest.raises(ValueError, match="after < until < 6"):
            get("elvit", **fields).steps(196, 6)
    for fields in ({"norm": "max"}, {"window": 4}, {"tau": 0}, {"iterations": 0}):
        with pytest.raises(ValueError):
            get("elvit", **fields)
    with pytest.raises(ValueError, match="no place"):
        get("elvit").reduce(Tokens(torch.randn(1, 9, 4)))


# -- inside encoders -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["SiglipVisionModel", "CLIPVisionModel"])
def test_blocks_between_run_on_the_centres(name):
    """By hand: blocks 0 and 1, clusters, blocks 2 and 3, the map again, block 4."""
    model = tiny.model(name)
    inputs = tiny.inputs_for(model)
    with jeton.apply(model, "elvit", keep=0.25, after=1, until=3, tau=0.05) as run:
        got = model(**inputs).last_hidden_state
        report = run.report()
    inner = getattr(model, "vision_model", model)
    x = inner.embeddings(inputs["pixel_values"])
    x = inner.pre_layrnorm(x) if hasattr(inner, "pre_layrnorm") else x
    prefix = x.shape[1] - 49
    for number, block in enumerate(inner.encoder.layers):
        x = block(x, None)
        if number == 1:
            place = Place.grid(3, 7, 7)
            step = get("elvit", keep=0.25, tau=0.05).reduce(Tokens(x[:, prefix:], place=place))
            x = torch.cat([x[:, :prefix], step.mix(x[:, prefix:])], 1)
        if number == 3:
            x = torch.cat([x[:, :prefix], step.back @ x[:, prefix:]], 1)
    expected = inner.post_layernorm(x) if name == "SiglipVisionModel" else x
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert report.encoder_tokens == tuple(float(count + prefix) for count in (49, 49, 12, 12, 49))
    assert report.flops_share < 0.7


@torch.no_grad()
def test_pictures_of_several_shapes_in_one_batch():
    model = tiny.model("Siglip2VisionModel")
    inputs = tiny.inputs_for(model)
    with jeton.apply(model, "elvit", keep=0.3) as run:
        whole = model(**inputs).last_hidden_state
        assert [image.after for image in run.report().images] == [image.before for image in run.report().images]
        for number in range(3):
            alone = model(**tiny.row(inputs, number)).last_hidden_state
            count = run.report().images[0].after
            torch.testing.assert_close(alone[0, :count], whole[number, :count], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_what_other_methods_took_between_comes_back_too():
    model = tiny.model("SiglipVisionModel")
    with jeton.apply(model, "elvit(keep=0.5, after=0, until=3) | tome(r=2)") as run:
        out = model(**tiny.inputs_for(model)).last_hidden_state
        lengths = run.report().encoder_tokens
    assert lengths[0] == 49 and lengths[1] <= 24 and lengths[3] == lengths[1] - 4
    assert lengths[4] == 47 and out.shape[1] == 45  # what merged between is undone with the clusters; before and after it is not


@torch.no_grad()
def test_pictures_show_the_clusters_while_there_are_any():
    model = tiny.model("SiglipVisionModel")
    with jeton.apply(model, "elvit(keep=0.5, after=1, until=3)") as run:
        model(**tiny.inputs_for(model))
        assert [len(run.assignment(0, block)[0].unique()) for block in range(5)] == [49, 24, 24, 49, 49]


@dataclass(frozen=True)
class Pooled(ELViT):
    """The same place and grid, but cells averaged, and each patch given its cell's value."""

    def reduce(self, tokens, signals=None):
        step = super().reduce(tokens, signals)
        cells = (step.assign[:, None] == torch.arange(step.k)[:, None]).float()
        return replace(step, matrix=cells / cells.sum(2, keepdim=True), back=None)


@torch.no_grad()
def test_digits_are_reconstructed_better_than_pooled():
    digits = pytest.importorskip("jeton.demo.digits").load_digits()
    model, pixels = digits.model.vit, digits.test.pixels[:200]
    whole = model(pixel_values=pixels).last_hidden_state[:, 1:]
    near = {}
    for method in (ELViT(keep=16, after=2, tau=1.0), Pooled(keep=16, after=2)):
        with jeton.apply(model, method):
            found = model(pixel_values=pixels).last_hidden_state[:, 1:]
        near[type(method)] = torch.nn.functional.cosine_similarity(found, whole, dim=-1).mean().item()
    assert near[ELViT] > near[Pooled] + 0.05, near
