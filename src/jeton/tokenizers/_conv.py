"""Convolutional encoder and decoder in the layout of VQGAN (arXiv:2012.09841): levels of residual blocks, attention at the
lowest."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ConvEncoder(nn.Module):
    """(B, C, H, W) to (B, out, h, w): every level has `blocks` residual blocks of `width` x its multiplier, and all but the last
    halve the sides."""

    def __init__(self, channels: int, width: int, multipliers: tuple[int, ...], blocks: int, out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        now = width
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                layers.append(_Residual(now, width * multiplier))
                now = width * multiplier
            if level < len(multipliers) - 1:
                layers.append(nn.Conv2d(now, now, 3, 2, 1))
        layers += [_Residual(now, now), _Attention(now), _Residual(now, now), _norm(now), nn.SiLU(), nn.Conv2d(now, out, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ConvDecoder(nn.Module):
    """(B, d, h, w) to (B, C, H, W): the encoder's levels in reverse, each with one block more, sides doubled by repetition."""

    def __init__(self, inputs: int, width: int, multipliers: tuple[int, ...], blocks: int, channels: int) -> None:
        super().__init__()
        now = width * multipliers[-1]
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, now, 3, padding=1),
            _Residual(now, now),
            _Attention(now),
            _Residual(now, now),
        ]
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                layers.append(_Residual(now, width * multiplier))
                now = width * multiplier
            if level:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(now, now, 3, padding=1)]
        layers += [_norm(now), nn.SiLU(), nn.Conv2d(now, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32 if channels % 32 == 0 else 8, channels, eps=1e-6)


class _Residual(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _norm(before),
            nn.SiLU(),
            nn.Conv2d(before, after, 3, padding=1),
            _norm(after),
            nn.SiLU(),
            nn.Conv2d(after, after, 3, padding=1),
        )
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


class _Attention(nn.Module):
    """Every cell sees all cells, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = _norm(channels), nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).mT.unflatten(2, x.shape[2:]))
