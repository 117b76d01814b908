"""timm for tests, on a torch that no torchvision was built for.

timm imports torchvision. One that does not fit the installed torch would break transformers, which uses what it finds; so it
lies apart (`make test` puts it into .venv/apart) and is brought in here, after transformers has looked.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers.utils import is_torchvision_available

APART = Path(sys.prefix) / "apart"
_KEPT: list[torch.library.Library] = []


def has_timm() -> bool:
    return find_spec("timm") is not None and (is_torchvision_available() or APART.exists())


def timm():
    """timm, or a skipped test."""
    if not has_timm():
        pytest.skip("timm or torchvision is not installed", allow_module_level=True)
    if not is_torchvision_available() and not _KEPT:
        sys.path.append(str(APART))
        # its extension does not load, but the operators it registers fake kernels for must exist; nothing calls them
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    import timm

    return timm


if __name__ == "__main__":  # run a module of this name with timm at hand
    timm()
    runpy.run_module(sys.argv[1], run_name="__main__")
