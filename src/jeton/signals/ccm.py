"""Channel clustering for forecasters: variates that behave alike share weights, others do not.

Letters: B samples, L past steps, H future ones, C variates (channels), K clusters, d width of the prototypes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import register

# where transformers' forecasters map a variate's features to its future
LINEARS = {
    "PatchTSTForPrediction": ("head.projection",),
    "PatchTSMixerForPrediction": ("head.base_forecast_block",),
}


class ClusterLinear(nn.Module):
    """One linear map for each cluster, mixed by each variate's share in it: ``y_c = sum_k p_ck (W_k x_c + b_k)``.

    x (B, C, in) and p (C, K), or (B, C, K) for shares of each sample's own, give (B, C, out). With common shares the weights are
    mixed first, which is the same number and costs C maps instead of B C K.
    """

    def __init__(self, inputs: int, outputs: int, clusters: int, bias: bool = True) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(clusters, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(clusters, outputs).uniform_(-bound, bound)) if bias else None
        self.shares: Tensor | None = None

    @classmethod
    def like(cls, linear: nn.Linear, clusters: int) -> ClusterLinear:
        """Every cluster begins as a copy of `linear`."""
        made = cls(linear.in_features, linear.out_features, clusters, linear.bias is not None)
        with torch.no_grad():
            made.weight.copy_(linear.weight)
            if made.bias is not None:
                made.bias.copy_(linear.bias)
        return made

    def forward(self, x: Tensor, shares: Tensor | None = None) -> Tensor:
        p = self.shares if shares is None else shares
        if p is None:
            raise ValueError(
                "ClusterLinear needs each variate's shares in the clusters: pass p, or run it within ChannelClustering."
            )
        if p.shape[-2] != x.shape[-2]:
            raise ValueError(f"there are shares for {p.shape[-2]} variates, but the input has {x.shape[-2]}.")
        if p.dim() == 2:
            y = torch.einsum("bci,coi->bco", x, torch.einsum("ck,koi->coi", p, self.weight))
        else:
            y = torch.einsum("bcko,bck->bco", torch.einsum("bci,koi->bcko", x, self.weight), p)
        return y if self.bias is None else y + p @ self.bias


class ChannelAssigner(nn.Module):
    """How much each variate belongs to each cluster, from its past alone, so that new variates can be assigned too.

    ``e = Linear(L -> d)`` of every variate, cosine with K prototypes, mean over the batch, ``p = softmax(cosine / temperature)``;
    (C, K). With ``pooled=False`` the mean is left out: (B, C, K), and no sample depends on its batch.
    """

    prototypes: Tensor

    def __init__(self, length: int, clusters: int, width: int = 64, temperature: float = 0.05, pooled: bool = True) -> None:
        super().__init__()
        self.embed, self.temperature, self.pooled = nn.Linear(length, width), temperature, pooled
        self.register_buffer("prototypes", torch.empty(clusters, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """p, and the embeddings (B, C, d), of past values (B, L, C)."""
        e = self.embed(past.mT)
        cosine = F.normalize(e, dim=-1) @ F.normalize(self.prototypes, dim=-1).mT
        return ((cosine.mean(0) if self.pooled else cosine) / self.temperature).softmax(-1), e

    @torch.no_grad()
    def move(self, e: Tensor, member: Tensor) -> None:
        """New prototypes: attention of each over the variates, softmax(c eᵀ / sqrt(d)) times its members Mᵀ (not normalised
        again), on the embeddings; mean over the batch."""
        weight = (self.prototypes @ e.mT / math.sqrt(e.shape[-1])).softmax(-1) * member.mT
        self.prototypes.copy_((weight @ e).mean(0))


@register(
    title="From Similarity to Superiority: Channel Clustering for Time Series Forecasting",
    year=2024,
    source="arXiv:2404.01340",
    family="signal",
    stage="forecast",
    training_free=False,
)
class ChannelClustering(nn.Module):
    """Any forecaster, with some of its linear maps replaced by one per cluster of variates; trained with it.

    `linears` names the maps, each from (B, C, in): by default the ones of `DLinear`, `TSMixer`, PatchTST and PatchTSMixer. Called
    with past values (B, L, C) it gives the forecast (B, H, C) and the shares p; ``losses(past, future)`` are mse and `beta` times
    the cluster loss

        -tr(Mᵀ S M) + tr((1 - M Mᵀ) S) + C + mean entropy(p)

    with M = sigmoid((logit p + logistic noise) / `relax`), noise in training alone, and S_ij = exp(-sharpness d_ij² / max d²),
    the similarity of variates i and j, averaged over the batch. K is ceil(0.3 C) by default. In training mode every forward
    moves the prototypes, which are a buffer, by attention over their members.

    As released where the paper leaves a number open (S with `sharpness` 5; the paper: a radial basis function). Unlike released:
    S is between the variates of a sample, and variates are not shuffled. Variates must keep their order within a batch. The paper
    also exchanges prototypes between PatchTST's layers and clusters TimesNet; here a host gets clustered linear maps alone.
    """

    def __init__(
        self,
        host: nn.Module,
        length: int,
        channels: int,
        clusters: int | None = None,
        linears: tuple[str, ...] | None = None,
        width: int = 64,
        beta: float = 0.3,
        temperature: float = 0.05,
        relax: float = 0.07,
        sharpness: float = 5.0,
        pooled: bool = True,
    ) -> None:
        super().__init__()
        clusters = math.ceil(0.3 * channels) if clusters is None else clusters
        if not 1 <= clusters <= channels:
            raise ValueError(f"{channels} variates can form 1 to {channels} clusters, not {clusters}.")
        self.host, self.channels, self.beta, self.relax, self.sharpness = host, channels, beta, relax, sharpness
        self.assigner = ChannelAssigner(length, clusters, width, temperature, pooled)
        names = linears or getattr(host, "linears", None) or LINEARS.get(type(host).__name__)
        if not names:
            raise ValueError(f"say which linear maps of {type(host).__name__} to cluster: linears=('head.projection',).")
        for name in names:
            parent, _, last = name.rpartition(".")
            try:
                linear = host.get_submodule(name)
            except AttributeError as error:
                raise ValueError(f"{type(host).__name__} has no module {name!r} to cluster.") from error
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"{name!r} of {type(host).__name__} is {type(linear).__name__}, not a linear map to cluster.")
            setattr(host.get_submodule(parent), last, ClusterLinear.like(linear, clusters))

    def forward(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """The forecast (B, H, C) and the shares p of past values (B, L, C)."""
        forecast, p, _ = self._run(past)
        return forecast, p

    def losses(self, past: Tensor, future: Tensor) -> dict[str, Tensor]:
        forecast, p, member = self._run(past)
        return {"mse": F.mse_loss(forecast, future), "clusters": self.beta * cluster_loss(p, member, past, self.sharpness)}

    def _run(self, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if past.shape[-1] != self.channels:
            raise ValueError(f"past values must be (B, L, {self.channels}), got {tuple(past.shape)}.")
        p, e = self.assigner(past)
        member = membership(p, self.relax, noise=self.training)
        parts = [module for module in self.host.modules() if isinstance(module, ClusterLinear)]
        for part in parts:
            part.shares = p
        try:
            found: Any = self.host(past_values=past)
        finally:
            for part in parts:
                part.shares = None
        if self.training:
            self.assigner.move(e, member)
        return getattr(found, "prediction_outputs", found), p, member


def membership(p: Tensor, relax: float, noise: bool) -> Tensor:
    """M (..., C, K) in (0, 1): a relaxed Bernoulli draw from each share; without noise its sharpened value."""
    logit = torch.logit(p, eps=1e-6)
    if noise:
        u = torch.rand_like(p).clamp(1e-6, 1 - 1e-6)
        logit = logit + torch.logit(u)
    return (logit / relax).sigmoid()


def channel_similarity(past: Tensor, sharpness: float) -> Tensor:
    """S (C, C) of past values (B, L, C): exp(-sharpness d² / the sample's largest d²), averaged over the batch."""
    squared = torch.cdist(past.mT, past.mT, compute_mode="donot_use_mm_for_euclid_dist").square()
    return (-sharpness * squared / squared.amax((1, 2), keepdim=True).clamp(min=1e-12)).exp().mean(0)


def cluster_loss(p: Tensor, member: Tensor, past: Tensor, sharpness: float = 5.0) -> Tensor:
    """-tr(Mᵀ S M) + tr((1 - M Mᵀ) S) + C + mean entropy(p), averaged over samples where each has its own p and M."""
    together = member @ member.mT
    similar = channel_similarity(past, sharpness)
    apart = ((1 - 2 * together) * similar).sum((-2, -1)).mean()
    return apart + p.shape[-2] + torch.special.entr(p).sum(-1).mean()
