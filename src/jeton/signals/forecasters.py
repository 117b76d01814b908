"""Two small forecasters to put `ccm` into: (B, L, C) past values to (B, H, C) future ones, every variate by the same weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DLinear(nn.Module):
    """A moving average of `kernel` steps is the trend, the rest seasonal; a linear map L -> H each, added.

    Are Transformers Effective for Time Series Forecasting?, 2022, arXiv:2205.13504.
    """

    linears = ("seasonal", "trend")

    def __init__(self, length: int, horizon: int, kernel: int = 25) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"the moving average needs an odd kernel, got {kernel}.")
        self.kernel, self.seasonal, self.trend = kernel, nn.Linear(length, horizon), nn.Linear(length, horizon)

    def forward(self, past_values: Tensor) -> Tensor:
        x, half = past_values.mT, self.kernel // 2
        trend = F.avg_pool1d(F.pad(x, (half, half), mode="replicate"), self.kernel, 1)
        return (self.seasonal(x - trend) + self.trend(trend)).mT


class TSMixer(nn.Module):
    """Blocks of an MLP over time and an MLP over variates, residual, then a linear map L -> H for every variate.

    TSMixer: An All-MLP Architecture for Time Series Forecasting, 2023, arXiv:2303.06053. Normalisation is over time and variates
    of one sample; `dropout` as in the paper's smaller settings.
    """

    def __init__(self, length: int, horizon: int, channels: int, hidden: int = 64, blocks: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Mixing(length, channels, hidden, dropout) for _ in range(blocks))
        self.projection = nn.Linear(length, horizon)
        self.linears = (*(f"blocks.{number}.time" for number in range(blocks)), "projection")

    def forward(self, past_values: Tensor) -> Tensor:
        x = past_values.mT
        for block in self.blocks:
            x = block(x)
        return self.projection(x).mT


class _Mixing(nn.Module):
    """(B, C, L) to (B, C, L)."""

    def __init__(self, length: int, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.before_time, self.before_channels = nn.LayerNorm((channels, length)), nn.LayerNorm((channels, length))
        self.time, self.drop = nn.Linear(length, length), nn.Dropout(dropout)
        self.mix = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, channels), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(F.relu(self.time(self.before_time(x))))
        return x + self.mix(self.before_channels(x).mT).mT
