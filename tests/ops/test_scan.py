"""The selective scan: Mamba's own recurrence, and time that passes without input."""

import pytest
import torch
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from jeton.ops.scan import linear_scan, selective_scan


def drawn(b=2, n=13, d=6, s=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, time = torch.randn(b, n, d, generator=g), torch.rand(b, n, d, generator=g)
    return x, time, -torch.rand(d, s, generator=g), *torch.randn(2, b, n, s, generator=g), torch.randn(d, generator=g)


@pytest.mark.parametrize("n", [1, 2, 13, 16, 50])
def test_it_is_mambas_recurrence(n):
    x, time, a, b, c, d = drawn(n=n)
    swap = [part.transpose(1, 2) for part in (x, time, b, c)]
    theirs = mamba_selective_scan(swap[0], swap[1], a, swap[2], swap[3], D=d).transpose(1, 2)
    torch.testing.assert_close(selective_scan(x, time, a, b, c, d), theirs)
    assert n == 1 or not torch.allclose(selective_scan(x, time, 2 * a, b, c, d), theirs, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 3, 7, 11, 40])
def test_chunks_do_not_change_it(chunk):
    decay, drive = -torch.rand(2, 11, 3), torch.randn(2, 11, 3)
    h, states = torch.zeros(2, 3), []
    for t in range(11):
        h = decay[:, t].exp() * h + drive[:, t]
        states.append(h)
    torch.testing.assert_close(linear_scan(decay, drive, chunk), torch.stack(states, 1))


def test_its_gradient_is_right():
    g = torch.Generator().manual_seed(0)
    decay = -torch.rand(2, 7, 3, generator=g, dtype=torch.double)
    drive = torch.randn(2, 7, 3, generator=g, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda a, b: linear_scan(a, b, 3), (decay.requires_grad_(), drive.requires_grad_()))


def test_idle_time_by_hand():
    """A = -1, steps of 1, inputs at places 0 and 3: h = e^-3 x0 + x3; as neighbours, e^-1 x0 + x3."""
    x, one = torch.tensor([[[2.0], [5.0]]]), torch.ones(1, 2, 1)
    idle = torch.tensor([[[0.0], [2.0]]])
    a = torch.tensor([[-1.0]])
    assert selective_scan(x, one, a, one, one, idle=idle)[0, 1, 0].item() == pytest.approx(2 * 2.718281828**-3 + 5)
    assert selective_scan(x, one, a, one, one)[0, 1, 0].item() == pytest.approx(2 * 2.718281828**-1 + 5)


@pytest.mark.parametrize("backward", [False, True])
def test_idle_time_is_a_scan_over_zeros(backward):
    """Kept tokens scattered into a sequence of zeros, which take the time that a zero takes, give the same in both directions."""
    x, time, a, b, c, d = drawn(n=7)
    rest = torch.rand(6)  # the step size of a zero token
    kept = torch.stack([torch.randperm(20)[:7].sort().values for _ in range(2)])

    def spread(part, fill=0.0):
        full = torch.zeros(2, 20, part.shape[-1]) + fill
        return full.scatter(1, kept[..., None].expand_as(part), part)

    whole = [spread(x), spread(time, rest), a, spread(b, torch.randn(4)), spread(c), d]
    few = [x, time, a, b, c, d]
    gaps = torch.nn.functional.pad(kept.diff(dim=1) - 1, (1, 0))
    if backward:
        whole, few = ([part.flip(1) if part.dim() == 3 else part for part in parts] for parts in (whole, few))
        gaps = torch.nn.functional.pad(gaps.flip(1)[:, :-1], (1, 0))
    full = selective_scan(*whole)
    expected = (full.flip(1) if backward else full).gather(1, kept[..., None].expand(-1, -1, 6))
    found = selective_scan(*few, idle=gaps[..., None] * rest)
    found = found.flip(1) if backward else found
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    compact = selective_scan(*few)
    assert not torch.allclose(compact.flip(1) if backward else compact, expected, atol=1e-2)


def test_long_gaps_and_half_precision_stay_finite():
    x, time, a, b, c, d = drawn()
    idle = torch.full_like(time, 1e4)
    for dtype in (torch.bfloat16, torch.float16):
        y = selective_scan(*(part.to(dtype) for part in (x, time, a, b, c, d)), idle=idle)
        assert y.dtype == dtype and y.isfinite().all()
    x.requires_grad_()
    selective_scan(x, time, a, b, c, d, idle).sum().backward()
    assert x.grad.isfinite().all()
