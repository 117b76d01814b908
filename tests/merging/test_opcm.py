"""OPCM: hand-worked projections, invariants of the stream, and real fine-tuned networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jeton.merging._common import Folder, collect
from jeton.merging.opcm import OPCM

D, V = torch.diag(torch.tensor([4.0, 3.0, 1.0])), torch.arange(1.0, 10.0).view(3, 3)
ZERO = {"layer.weight": torch.zeros(3, 3)}


def merged_by_hand(**fields) -> Tensor:
    return OPCM(**fields).merge(ZERO, [{"layer.weight": D}, {"layer.weight": V}])["layer.weight"]


@pytest.mark.parametrize(
    ("fields", "row", "values"),
    [
        ({"alpha": 0.5}, 0, (2.3235, 1.1617, 1.7426)),
        ({"alpha": 0.9}, 2, (4.5732, 5.2265, 6.5332)),
        ({"alpha": 0.5, "zero_diagonal": True}, 0, (3.0780, 1.5390, 2.3085)),
        ({"alpha": 0.9, "zero_diagonal": True}, 2, (5.6716, 6.4818, 0.8102)),
    ],
)
def test_hand_worked_merges(fields, row, values):
    torch.testing.assert_close(merged_by_hand(**fields)[row], torch.tensor(values), atol=1e-4, rtol=0)


def test_hand_worked_projections():
    assert OPCM(alpha=0.5).project(V, D).norm().square() == pytest.approx(358 - 26 - 2 * (5 * 3 + 9 * 1), abs=1e-3)
    expected = torch.tensor([[0.0, 0, 3], [0, 0, 6], [7, 8, 0]])
    torch.testing.assert_close(OPCM(alpha=0.9, zero_diagonal=True).project(V, D), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("zero_diagonal", [False, True])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_the_protected_directions_get_nothing(shape, zero_diagonal):
    generator = torch.Generator().manual_seed(3)
    merged, new = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    r = int((values.cumsum(0) / values.sum() > 0.6).nonzero()[0])
    inside = left.T @ OPCM(alpha=0.6, zero_diagonal=zero_diagonal).project(new, merged) @ right.T
    assert r > 1 and inside[:r, :r].abs().max() < 1e-5
    assert inside[r:, r:].abs().max() > 0.1  # the rest is not touched
    if zero_diagonal:
        assert inside.diagonal().abs().max() < 1e-5
        assert (OPCM(alpha=0.6, zero_diagonal=True).project(new, merged) * merged).sum().abs() < 1e-4
    else:
        assert inside.diagonal()[r:].abs().max() > 0.1


def test_limits_of_alpha_and_of_an_empty_update():
    zero = torch.zeros(3, 3)
    for fields in ({"alpha": 0.5}, {"alpha": 1.0}, {"alpha": 0.5, "zero_diagonal": True}):
        assert torch.equal(OPCM(**fields).project(V, zero), V)
    torch.testing.assert_close(OPCM(alpha=0.0).project(V, D), V)
    for alpha in (1.0, 2.0):  # all of a full-rank update is protected
        assert OPCM(alpha=alpha).project(V, D).abs().max() < 1e-5
    with pytest.raises(ValueError, match="alpha=-1"):
        OPCM(alpha=-1)
    with pytest.raises(ValueError, match="alpha=nan"):
        OPCM(alpha=float("nan"))


def test_the_distance_from_the_base_is_the_running_mean_norm(views):
    stream = OPCM().start(views.base)
    with pytest.raises(ValueError, match="nothing has been merged"):
        stream.merged()
    norms = []
    for model in views.tuned.values():
        stream.add(model)
        norms.append(sum((model[name] - views.base[name]).square().sum() for name in model).sqrt())
        merged = stream.merged()
        distance = sum((merged[name] - views.base[name]).square().sum() for name in merged).sqrt()
        torch.testing.assert_close(distance, sum(norms) / len(norms), rtol=1e-5, atol=0)


def test_scaling_at_every_step_and_undoing_it_gives_the_same(views):
    """The published formulation, step by step: the merged model is rescaled, and the next step undoes it."""
    system, base, models = OPCM(), views.base, list(views.tuned.values())
    merged, scale, norms = models[0], 1.0, []
    for number, model in enumerate(models):
        tau = {name: model[name] - base[name] for name in base}
        norms.append(sum(value.square().sum() for value in tau.values()).sqrt())
        if number == 0:
            continue
        update = {}
        for name in base:
            now = merged[name] - base[name]
            new = system.project(tau[name], now) if tau[name].dim() == 2 else tau[name]
            update[name] = scale * now + new
        scale = sum(value.square().sum() for value in update.values()).sqrt() / (sum(norms) / len(norms))
        merged = {name: base[name] + update[name] / scale for name in base}
    ours = system.merge(base, models)
    for name in base:
        torch.testing.assert_close(ours[name], merged[name], atol=1e-5, rtol=1e-4)


def test_equal_models_stay_on_one_line_with_zero_diagonal():
    generator = torch.Generator().manual_seed(0)
    model = {"layer.weight": torch.randn(6, 4, generator=generator)}
    base = {"layer.weight": torch.zeros(6, 4)}
    merged = OPCM(zero_diagonal=True).merge(base, [model] * 4)["layer.weight"]
    torch.testing.assert_close(merged, model["layer.weight"], atol=1e-5, rtol=1e-5)


def test_it_beats_the_running_average_on_fine_tuned_networks(views):
    merged = views.mean(OPCM().merge(views.base, list(views.tuned.values())))
    assert min(views.accuracy(task, model) for task, model in views.tuned.items()) > 0.85
    assert merged > views.mean(views.added(1 / 3)) + 0.1
    assert merged > views.mean(views.added(1.0)) + 0.1


def test_a_stream_on_disk_goes_on_where_it_was_and_does_not_grow(views, tmp_path):
    in_memory = OPCM().merge(views.base, list(views.tuned.values()))
    sizes = []
    for model in views.tuned.values():
        stream = OPCM().start(views.base, tmp_path)  # made anew each time, as by another process
        stream.add(model)
        sizes.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
    merged = OPCM().start(views.base, tmp_path).merged()
    assert all(torch.equal(merged[name], in_memory[name]) for name in merged)
    assert max(sizes) - min(sizes) < 100
    with pytest.raises(ValueError, match="give another folder"):
        OPCM(alpha=0.9).start(views.base, tmp_path)


def test_folders_are_merged_with_a_few_tensors_in_memory(tmp_path, counted):
    """Of 80 tensors in four checkpoints, of the running sum beside them and of what is written, a handful is held at once."""
    base, *models = ({f"layer.{n}.weight": torch.randn(32, 32) for n in range(20)} for _ in range(4))
    OPCM().merge(counted(base), [counted(model) for model in models], tmp_path / "merged", shard=3 * 4096)
    assert counted.most <= 3 * 4096
    expected, written = OPCM().merge(base, models), Folder(tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 7
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_only_weights_of_linear_layers_are_projected(tmp_path):
    system = OPCM()
    matrix, vector = torch.ones(2, 2), torch.ones(2)
    assert system.projected("model.layers.0.mlp.up_proj.weight", matrix)
    for name, value in (
        ("model.embed_tokens.weight", matrix),
        ("lm_head.weight", matrix),
        ("norm.weight", vector),
        ("table", matrix),
    ):
        assert not system.projected(name, value)


def test_data_type_and_integers_are_the_base_s(tmp_path):
    base = {"layer.weight": torch.zeros(2, 2, dtype=torch.bfloat16), "steps": torch.tensor(3)}
    model = {"layer.weight": torch.ones(2, 2, dtype=torch.bfloat16), "steps": torch.tensor(9)}
    merged = OPCM().merge(base, [model])
    assert merged["layer.weight"].dtype == torch.bfloat16 and merged["steps"] == 3
    collect(merged.items(), tmp_path / "merged")
    assert Folder(tmp_path / "merged")["steps"].dtype == torch.int64
