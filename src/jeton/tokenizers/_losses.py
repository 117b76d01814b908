"""Losses of tokenizers that draw pictures: features that agree, and an adversary that learns to tell pictures from
reconstructions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Perceptual = Callable[[Tensor, Tensor], Tensor]


class RandomFeatures(nn.Module):
    """mean((f(x) - f(y))²) summed over three strided convolutions with seeded random weights, never trained.

    A stand-in for a perceptual distance where no trained network is at hand: it compares local structure at three scales and
    knows nothing of what people see. Any function of two batches of pictures can take its place (LPIPS, ConvNeXt features).
    """

    def __init__(self, channels: int = 3, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        widths = [channels, width, 2 * width, 4 * width]
        for level, (before, after) in enumerate(zip(widths, widths[1:])):
            weight = torch.randn(after, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
            self.register_buffer(f"weight{level}", weight, persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(())
        for weight in self.buffers():
            x, y = (F.relu(F.conv2d(picture, weight, stride=2, padding=1)) for picture in (x, y))
            total = total + F.mse_loss(x, y)
        return total


class Adversary(nn.Module):
    """A patch discriminator and the losses around it, for one optimizer: both sides learn in the same step.

    Hinge losses mean(relu(1 - D(x))) + mean(relu(1 + D(x̂))) for D on detached reconstructions, -mean(D(x̂)) for the tokenizer with
    D held fixed. LeCam: weight times mean(relu(D(x) - m̂)²) + mean(relu(m - D(x̂))²), m and m̂ running means of D on pictures and
    reconstructions. Nothing acts before step `begin`, counted in calls in training mode.
    """

    step: Tensor
    means: Tensor

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        levels: int = 3,
        begin: int = 20_000,
        weight: float = 0.01,
        lecam: float = 1e-3,
        decay: float = 0.999,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for level in range(levels):
            after = width * min(2**level, 8)
            layers += [nn.Conv2d(channels, after, 4, 2, 1), nn.LeakyReLU(0.2)]
            channels = after
        self.judge = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, 1, 1))
        self.begin, self.weight, self.lecam, self.decay = begin, weight, lecam, decay
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("means", torch.zeros(2))

    def forward(self, images: Tensor, reconstructed: Tensor) -> dict[str, Tensor]:
        on = (self.step >= self.begin).to(images.dtype)
        if self.training:
            self.step += 1
        real, fake = self.judge(images), self.judge(reconstructed.detach())
        fixed = {name: value.detach() for name, value in self.judge.named_parameters()}
        fooled = -functional_call(self.judge, fixed, (reconstructed,)).mean()
        means = self.means.clone()
        lecam = (real - means[1]).relu().square().mean() + (means[0] - fake).relu().square().mean()
        if self.training:
            now = torch.stack([real.mean(), fake.mean()]).detach()
            self.means.lerp_(now, (1 - self.decay) * on)
        learns = (1 - real).relu().mean() + (1 + fake).relu().mean() + self.lecam * lecam
        return {"adversarial": on * self.weight * fooled, "discriminator": on * learns}
