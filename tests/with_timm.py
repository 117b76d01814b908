"""timm for tests, on a torch that no torchvision was built for. timm imports torchvision, which is brought in here after
transformers has looked for it."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec

import pytest
from transformers.utils import is_torchvision_available

from apart import APART, bring_in


def has_timm() -> bool:
    return find_spec("timm") is not None and (is_torchvision_available() or APART.exists())


def timm():
    """timm, or a skipped test."""
    if not has_timm():
        pytest.skip("timm or torchvision is not installed", allow_module_level=True)
    if not is_torchvision_available():
        bring_in()
    import timm

    return timm


if __name__ == "__main__":  # run a module of this name with timm at hand
    timm()
    runpy.run_module(sys.argv[1], run_name="__main__")
