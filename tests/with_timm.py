"""timm for tests, where torchvision was built for another torch than the one installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

_LIBRARY: list[torch.library.Library] = []


def timm():
    """timm, or a skipped test. It imports torchvision, which registers kernels for two operators of its own extension; where
    the extension does not load, the operators must exist all the same. Nothing calls them."""
    if find_spec("timm") is None:
        pytest.skip("timm is not installed", allow_module_level=True)
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARY.append(library)
    import timm

    return timm
