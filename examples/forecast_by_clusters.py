"""Twelve time series of three kinds: which behave alike is found while a forecaster is trained, and they share weights."""

import torch

from jeton.signals.ccm import ChannelClustering
from jeton.signals.forecasters import DLinear
from jeton.train import Recipe, train

g = torch.Generator().manual_seed(0)
kind = torch.arange(12) % 3
rule = torch.randn(3, 6, 24, generator=g) * 24**-0.5  # each kind has its own future of the same past
pattern = 1.5 * torch.randn(3, 24, generator=g)


def windows(count):
    """Past (24 steps) and future (6 steps) of all twelve series."""
    noise = torch.randn(count, 12, 24, generator=g)
    return list(zip((noise + pattern[kind]).mT, torch.einsum("bcl,chl->bch", noise, rule[kind]).mT))


few, many = windows(24), windows(200)
past, future = (torch.stack(part) for part in zip(*many))
for clusters in (1, 3):
    torch.manual_seed(0)
    model = ChannelClustering(DLinear(24, 6, kernel=7), length=24, channels=12, clusters=clusters)
    recipe = Recipe(steps=150, rate=2e-2, batch=24, decay=0.0, clip=None)
    train(model, few, lambda model, batch: model.losses(*batch), recipe, progress=False)
    with torch.no_grad():
        forecast, shares = model(past)
    print(f"{clusters} clusters: error {(forecast - future).square().mean():.3f}, series in {shares.argmax(-1).tolist()}")
