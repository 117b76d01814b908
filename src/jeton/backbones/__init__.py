"""Vision backbones and token mixers: one file per system, named by its id.

What timm or transformers keeps well is wrapped (`_timm.py`), not written again; only what they lack is built here. A wrapped
backbone gives class logits, feature maps at several strides, and the counts its paper published for each size. Networks made for
few tokens (`lookupvit`, `stvit`, `vim_pruning` on `vim`) are transformers models with a configuration of their own.
"""

from __future__ import annotations

from ._timm import Backbone, create

__all__ = ["Backbone", "create"]
