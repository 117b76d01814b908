"""GGeM: worked values, its special cases, its gradient, and sizes."""

import pytest
import torch

import jeton
import tiny
from jeton.heads import GGeM
from jeton.tokens import Tokens


def pooled(values, p, groups=1, **more):
    x = torch.tensor(values)
    pool = GGeM(x.shape[-1], groups)
    with torch.no_grad():
        pool.raw.copy_(torch.as_tensor(p, dtype=torch.float64).expand(groups).sub(1e-2).expm1().log().float())
    return pool(x[None], **more)[0]


@pytest.mark.parametrize(("p", "value"), [(1.0, 2.0), (3.0, 2.2894), (20.0, 2.8397)])
def test_worked_values(p, value):
    assert abs(pooled([[1.0], [2.0], [3.0]], p).item() - value) < 1e-4


def test_every_group_has_its_own_exponent():
    torch.testing.assert_close(pooled([[1.0, 4.0], [3.0, 2.0]], [1.0, 2.0], 2), torch.tensor([2.0, 3.1623]), atol=1e-4, rtol=0)


def test_one_group_is_gem_and_p_one_the_clamped_mean():
    x = torch.randn(2, 9, 8)
    gem = x.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)
    torch.testing.assert_close(GGeM(8, 1, p=3.0)(x), gem)
    torch.testing.assert_close(GGeM(8, 4, p=1.0)(x), x.clamp(min=1e-6).mean(1), atol=1e-6, rtol=1e-5)
    assert (GGeM(8, 4, p=3.0)(x) - x.mean(1)).abs().max() > 0.1


def test_the_gradient_of_p_is_right():
    pool = GGeM(6, 3).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    pool(x).sum().backward()
    for group in range(3):
        ends = []
        for step in (1e-2, -1e-2):
            moved = GGeM(6, 3).double()
            with torch.no_grad():
                moved.raw[group] += step
            ends.append(moved(x).sum())
        torch.testing.assert_close(pool.raw.grad[group], (ends[0] - ends[1]) / 2e-2, atol=1e-4, rtol=1e-3)
    assert pool.raw.grad.abs().min() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zeros_and_negatives_give_numbers(dtype):
    x = torch.tensor([[[0.0, -5.0], [0.0, 3.0]]], dtype=dtype, requires_grad=True)
    for p in (0.5, 3.0, 60.0):
        pool = GGeM(2, 2, p=p)
        out = pool(x)
        out.float().sum().backward()
        assert out.dtype == dtype and out.isfinite().all() and x.grad.isfinite().all() and pool.raw.grad.isfinite().all()


def test_equal_tokens_may_be_merged():
    x = torch.rand(1, 4, 6)
    x[:, 3] = x[:, 1]
    pool = GGeM(6, 3)
    size = torch.tensor([[1.0, 2.0, 1.0]])
    torch.testing.assert_close(pool(x), pool(x[:, :3], size=size))
    assert (pool(x) - pool(x[:, :3])).abs().max() > 1e-3
    mask = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(pool(x, mask=mask), pool(x[:, :3]))


def test_it_pools_what_a_run_leaves():
    net = tiny.model("CLIPVisionModel")
    pool = GGeM(32, 4, p=1.0)
    with jeton.apply(net, "tome", r=6) as run, torch.no_grad():
        net(torch.randn(2, 3, 28, 28))
        tokens = run.tokens
    assert isinstance(tokens, Tokens) and tokens.prefix == 1
    patches, size = tokens.features[:, 1:].clamp(min=1e-6), tokens.size[:, 1:, None]
    torch.testing.assert_close(pool(tokens), (patches * size).sum(1) / 49, atol=1e-5, rtol=1e-4)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        GGeM(8, 3)
    with pytest.raises(ValueError, match="between"):
        GGeM(8, 2, p=0.0)
    with pytest.raises(ValueError, match="8 wide"):
        GGeM(8, 2)(torch.rand(1, 3, 6))
