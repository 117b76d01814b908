"""Patch embeddings and position tables for patches of another size."""

import pytest
import torch
from torch.nn import functional as F

from jeton.ops.patchify import resample, resize_positions


@pytest.mark.parametrize(("old", "new"), [(4, 8), (3, 7), (8, 16)])
def test_an_enlarged_patch_gives_the_same_product(old, new):
    kernel, patch = torch.randn(5, 3, old, old), torch.randn(6, 3, old, old)
    large = F.interpolate(patch, (new, new), mode="bilinear", align_corners=False)
    before = torch.einsum("dcij,ncij->nd", kernel, patch)
    after = torch.einsum("dcij,ncij->nd", resample(kernel, new), large)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    naive = F.interpolate(kernel, (new, new), mode="bilinear", align_corners=False)
    assert (torch.einsum("dcij,ncij->nd", naive, large) - before).abs().max() > 1


def test_a_kernel_that_sees_a_patch_reduced_becomes_the_one_it_sees_it_with():
    patch, own = torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(1, 3, 4, 4)
    small = F.interpolate(patch, (4, 4), mode="bilinear", align_corners=False, antialias=True)
    (kernel,) = torch.autograd.grad((small * own).sum(), patch)
    torch.testing.assert_close(resample(kernel, 4), own, atol=1e-4, rtol=1e-4)


def test_the_same_size_is_the_same_kernel():
    kernel = torch.randn(2, 1, 4, 4)
    assert resample(kernel, 4) is kernel
    with pytest.raises(ValueError, match="square"):
        resample(torch.randn(2, 1, 4, 3), 8)


def test_special_positions_stay_as_they_are():
    table = torch.randn(1, 2 + 9 + 1, 4)
    new = resize_positions(table, (6, 3), front=2, back=1)
    assert new.shape == (1, 2 + 18 + 1, 4)
    assert (new[:, :2] == table[:, :2]).all() and (new[:, -1] == table[:, -1]).all()
    torch.testing.assert_close(resize_positions(table, (3, 3), 2, 1), table)
    with pytest.raises(ValueError, match="square grid"):
        resize_positions(table, (3, 3), front=1, back=1)
