"""A torchvision that was built for another torch than the installed one, and what of it works without its extension.

One that does not fit would break transformers, which uses what it finds; so it lies apart (`make test` puts it into .venv/apart)
and is brought in on demand: behind transformers (with_timm.py), or before it in a process of its own (processed.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

APART = Path(sys.prefix) / "apart"
_KEPT: list[torch.library.Library] = []


def bring_in() -> None:
    if _KEPT:
        return
    sys.path.append(str(APART))
    # its extension does not load, but the operators it registers fake kernels for must exist; nothing calls them
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
