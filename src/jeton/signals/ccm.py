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
# where their encoder layers stand, each from (B, C, T, D) to a tuple that begins with the same
LAYERS = {"PatchTSTForPrediction": "model.encoder.layers"}


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


class PrototypeExchange(nn.Module):
    """Variates and prototypes hear each other, at every time step (patch) by itself: x (B, C, T, D), prototypes c (K, D) or
    (B, K, D), members M (C, K) or (B, C, K).

    First each prototype attends to the variates, ``softmax(q kᵀ / sqrt(d)) Mᵀ v`` (times the members, not normalised again);
    then each variate to the new prototypes; ``x = norm(x + heard)`` and ``x = norm(x + mlp(x))``. The new prototypes, averaged
    over time steps, and over the batch where they are common, go to the next layer.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be split into {heads} heads.")
        self.heads = heads
        self.to_prototypes, self.to_variates = (nn.ModuleList(nn.Linear(width, width) for _ in range(4)) for _ in range(2))
        self.norm1, self.norm2, self.drop = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))

    def forward(self, x: Tensor, prototypes: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        if prototypes.shape[-1] != x.shape[-1]:
            raise ValueError(f"prototypes are {prototypes.shape[-1]} wide, but the host's features {x.shape[-1]}.")
        steps = x.transpose(1, 2)  # (B, T, C, D)
        common = prototypes.dim() == 2
        asking = prototypes if common else prototypes[:, None]
        share = member.mT if member.dim() == 2 else member.mT[:, None, None]
        heard = self._attend(self.to_prototypes, asking.expand(*steps.shape[:2], -1, -1), steps, share)
        steps = self.norm1(steps + self.drop(self._attend(self.to_variates, steps, heard)))
        steps = self.norm2(steps + self.drop(self.mlp(steps)))
        return steps.transpose(1, 2).contiguous(), heard.mean((0, 1) if common else 1)

    def _attend(self, maps: nn.ModuleList, queries: Tensor, others: Tensor, share: Tensor | None = None) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for part, x in zip(maps, (queries, others, others), strict=False)
        )
        weight = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        weight = weight if share is None else weight * share
        mixed: Tensor = maps[3]((weight @ v).transpose(-3, -2).flatten(-2))
        return mixed


class _Exchanging(nn.Module):
    """A host's encoder layer with the exchange behind it. `carried`: prototypes and members on their way through the layers."""

    def __init__(self, layer: nn.Module, exchange: PrototypeExchange) -> None:
        super().__init__()
        self.layer, self.exchange = layer, exchange
        self.carried: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        x, *rest = self.layer(*args, **kwargs)
        x, self.carried[0] = self.exchange(x, *self.carried)
        return (x, *rest)


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

    `linears` names the maps, each from (B, C, in): by default the ones of `DLinear`, `TSMixer`, `TimesNet`, PatchTST and
    PatchTSMixer. With `exchange` (PatchTST) a `PrototypeExchange` stands behind every layer of the host's encoder, and prototypes
    are as wide as its features. Called
    with past values (B, L, C) it gives the forecast (B, H, C) and the shares p; ``losses(past, future)`` are mse and `beta` times
    the cluster loss

        -tr(Mᵀ S M) + tr((1 - M Mᵀ) S) + C + mean entropy(p)

    with M = sigmoid((logit p + logistic noise) / `relax`), noise in training alone, and S_ij = exp(-sharpness d_ij² / max d²),
    the similarity of variates i and j, averaged over the batch. K is ceil(0.3 C) by default. In training mode every forward
    moves the prototypes, which are a buffer, by attention over their members.

    As released where the paper leaves a number open (S with `sharpness` 5; the paper: a radial basis function). Unlike released:
    S is between the variates of a sample, and variates are not shuffled. Variates must keep their order within a batch. The
    release makes the weights of PatchTST's exchange and then leaves its lines out, so that its PatchTST has clustered heads
    alone; here that is exchange=False, the default, and what the lines say is exchange=True.
    """

    def __init__(
        self,
        host: nn.Module,
        length: int,
        channels: int,
        clusters: int | None = None,
        linears: tuple[str, ...] | None = None,
        width: int | None = None,
        beta: float = 0.3,
        temperature: float = 0.05,
        relax: float = 0.07,
        sharpness: float = 5.0,
        pooled: bool = True,
        exchange: bool = False,
    ) -> None:
        super().__init__()
        clusters = math.ceil(0.3 * channels) if clusters is None else clusters
        if not 1 <= clusters <= channels:
            raise ValueError(f"{channels} variates can form 1 to {channels} clusters, not {clusters}.")
        self.host, self.channels, self.beta, self.relax, self.sharpness = host, channels, beta, relax, sharpness
        own = self._insert(host) if exchange else 64
        self.assigner = ChannelAssigner(length, clusters, own if width is None else width, temperature, pooled)
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

    @staticmethod
    def _insert(host: nn.Module) -> int:
        """Put an exchange behind each encoder layer of the host; its width."""
        where = LAYERS.get(type(host).__name__)
        if where is None:
            raise ValueError(f"prototypes are exchanged between the layers of {', '.join(LAYERS)}, not of {type(host).__name__}.")
        layers, config = host.get_submodule(where), host.config
        assert isinstance(layers, nn.ModuleList)
        for number, layer in enumerate(layers):
            between = PrototypeExchange(config.d_model, config.num_attention_heads, config.ffn_dim, config.ff_dropout)
            layers[number] = _Exchanging(layer, between)
        width: int = config.d_model
        return width

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
        layers = [module for module in self.host.modules() if isinstance(module, _Exchanging)]
        start = self.assigner.prototypes.clone()  # the buffer moves below, before gradients have gone back
        carried = [start if p.dim() == 2 else start.expand(len(past), -1, -1), member]
        for part in parts:
            part.shares = p
        for layer in layers:
            layer.carried = carried
        try:
            found: Any = self.host(past_values=past)
        finally:
            for part in parts:
                part.shares = None
            for layer in layers:
                layer.carried = []
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
