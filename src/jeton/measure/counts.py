"""Parameters and multiply-adds of a model, counted as papers do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Counts:
    """`params` of which `trainable` require gradients; `macs` multiply-adds of one forward."""

    params: int
    trainable: int
    macs: int


def count(model: nn.Module, *inputs: Any, **named: Any) -> Counts:
    """Count a model's parameters, each once, and the multiply-adds of matrix products, convolutions and attention in one forward
    of these inputs; elementwise operations, norms and pooling are not counted. On the meta device it costs no arithmetic:

        with torch.device("meta"):
            counts = count(Model(), torch.zeros(1, 3, 224, 224))
    """
    was = model.training
    model.eval()
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs, **named)
    finally:
        model.train(was)
    params = list(model.parameters())
    trainable = sum(value.numel() for value in params if value.requires_grad)
    return Counts(sum(value.numel() for value in params), trainable, counter.get_total_flops() // 2)
