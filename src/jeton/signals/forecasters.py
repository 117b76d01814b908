"""Small forecasters to put `ccm` into: (B, L, C) past values to (B, H, C) future ones."""

from __future__ import annotations

import torch
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


class TimesNet(nn.Module):
    """A series folded by its periods into pictures, in which convolutions see neighbours in time and one period away.

    Past values of each variate, brought to mean 0 and variance 1, are first continued by a linear map L -> L + H; embedded with
    their neighbours and sinusoidal positions; then `blocks` times: x + sum of the foldings by the `periods` strongest
    frequencies, each two inception convolutions, weighted by softmax of the amplitudes; then mapped back to variates.

    TimesNet: Temporal 2D-Variation Modeling for General Time Series Analysis, 2022, arXiv:2210.02186. As published the
    frequencies are those strongest in the whole batch (one wait for the device a block), the amplitudes each sample's own.
    """

    linears = ("predict",)

    def __init__(
        self,
        length: int,
        horizon: int,
        channels: int,
        width: int = 32,
        hidden: int = 32,
        blocks: int = 2,
        periods: int = 5,
        kernels: int = 6,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.horizon, self.width, self.drop = horizon, width, nn.Dropout(dropout)
        self.predict = nn.Linear(length, length + horizon)
        self.embed = nn.Conv1d(channels, width, 3, padding=1, padding_mode="circular", bias=False)
        self.blocks = nn.ModuleList(_Folding(width, hidden, periods, kernels) for _ in range(blocks))
        self.norm, self.projection = nn.LayerNorm(width), nn.Linear(width, channels)

    def forward(self, past_values: Tensor) -> Tensor:
        mean = past_values.mean(1, keepdim=True).detach()
        x = past_values - mean
        scale = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = self.embed(self.predict((x / scale).mT)).mT
        x = self.drop(x + _positions(x.shape[1], self.width, x))
        for block in self.blocks:
            x = self.norm(block(x))
        return (self.projection(x) * scale + mean)[:, -self.horizon :]


class _Folding(nn.Module):
    """(B, T, D) to the same."""

    def __init__(self, width: int, hidden: int, periods: int, kernels: int) -> None:
        super().__init__()
        self.periods = periods
        self.conv = nn.Sequential(_Inception(width, hidden, kernels), nn.GELU(), _Inception(hidden, width, kernels))

    def forward(self, x: Tensor) -> Tensor:
        amplitude = torch.fft.rfft(x, dim=1).abs().mean(-1)
        strongest = amplitude.mean(0)[1:].topk(min(self.periods, amplitude.shape[1] - 1)).indices + 1
        folded = torch.stack([self._folded(x, x.shape[1] // frequency) for frequency in strongest.tolist()], -1)
        return x + torch.einsum("btdk,bk->btd", folded, amplitude[:, strongest].softmax(-1))

    def _folded(self, x: Tensor, period: int) -> Tensor:
        """One period a row, the end filled with zeros."""
        steps = x.shape[1]
        rows = F.pad(x, (0, 0, 0, -steps % period)).unflatten(1, (-1, period))
        seen: Tensor = self.conv(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return seen.flatten(1, 2)[:, :steps]


class _Inception(nn.Module):
    """The mean of convolutions with kernels of 1, 3, 5, ..."""

    def __init__(self, inputs: int, outputs: int, kernels: int) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(nn.Conv2d(inputs, outputs, 2 * i + 1, padding=i) for i in range(kernels))
        for conv in self.kernels:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([conv(x) for conv in self.kernels]).mean(0)


def _positions(length: int, width: int, like: Tensor) -> Tensor:
    """(length, width) sinusoids: sines at even places, cosines at odd ones."""
    place = torch.arange(length, device=like.device, dtype=torch.float32)[:, None]
    angle = place * 10000 ** (-torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width].to(like.dtype)
