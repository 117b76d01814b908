"""Fitting what a method measures on pictures before it can be used, such as the thresholds of `dymu`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..method import Method, Unsupported
from ..models import Encoder, adapt
from .run import apply


@torch.no_grad()
def calibrate(model: nn.Module, method: Method, pictures: Iterable[Tensor | Mapping[str, Any]]) -> Method:
    """`method` fitted on batches of pictures: pixel values, or the encoder's inputs by name.

    Only the encoder runs. A method that can be fitted has `calibrating()`: itself while it observes, whose `fitted()` is what
    comes of it.
    """
    if not hasattr(method, "calibrating"):
        raise Unsupported(f"{method.card.id} has nothing to fit on pictures; use it as it is.")
    view, learner = adapt(model), method.calibrating()
    encoder = view if isinstance(view, Encoder) else view.encoder
    with apply(model, learner):
        for batch in pictures:
            encoder.model(**({encoder.argument: batch} if isinstance(batch, Tensor) else batch))
    fitted: Method = learner.fitted()
    return fitted
