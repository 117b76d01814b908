"""Merging models' weights: several checkpoints of one architecture become one, without training.

Every merger takes models, state dicts or folders of safetensors, and works through them tensor by tensor, so that models larger
than memory can be merged: ``OPCM().merge("base", ["a", "b"], out="merged")``. `load` puts merged weights into a model.
"""

from ._common import Merger, load, read

__all__ = ["Merger", "load", "read"]
