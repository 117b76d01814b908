"""How much smaller patches help: one small model trained at several patch sizes, and a law fitted to what came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from ..method import Unsupported
from ..models import Encoder, adapt
from ..ops.flops import block_flops
from ..ops.patchify import resample, resize_positions
from ..registry import register


@dataclass(frozen=True)
class Point:
    """One patch size: tokens (patches) per picture, FLOPs of the blocks for one picture, and the metric of each seed."""

    patch: int
    tokens: int
    flops: float
    metrics: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.metrics) / len(self.metrics)


@dataclass(frozen=True)
class Law:
    """metric = base + slope * log2(tokens) by least squares, with standard errors; r2: the share of the variance it explains.
    Errors are infinite where as many points as parameters were given."""

    base: float
    slope: float
    base_error: float
    slope_error: float
    r2: float

    def __str__(self) -> str:
        return (
            f"metric = {self.base:.4f} (+- {self.base_error:.4f}) + {self.slope:.4f} (+- {self.slope_error:.4f}) x log2(tokens), "
            f"R2 {self.r2:.2f}"
        )


@dataclass(frozen=True)
class Scaling:
    """What a study found."""

    points: tuple[Point, ...]
    law: Law

    @property
    def monotone(self) -> bool:
        """Whether the mean metric rises with every smaller patch."""
        means = [point.mean for point in sorted(self.points, key=lambda point: point.tokens)]
        return all(a < b for a, b in zip(means, means[1:], strict=False))

    def __str__(self) -> str:
        lines = [f"patch {p.patch}: {p.tokens} tokens, {p.flops:.3g} FLOPs, metric {p.mean:.4f} {p.metrics}" for p in self.points]
        verdict = (
            "smaller patches always helped" if self.monotone else "NOT monotone: a smaller patch did worse than a larger one"
        )
        return "\n".join([*lines, str(self.law), verdict])

    def to_dict(self) -> dict[str, Any]:
        points = [{**asdict(point), "mean": point.mean} for point in self.points]
        return {"points": points, "law": asdict(self.law), "monotone": self.monotone}


def fit(tokens: Sequence[float], metrics: Sequence[float]) -> Law:
    """The log-linear law of a metric in the number of tokens."""
    if len(set(tokens)) < 2:
        raise ValueError("a law needs at least two numbers of tokens.")
    x = np.stack([np.ones(len(tokens)), np.log2(np.asarray(tokens, dtype=float))], 1)
    y = np.asarray(metrics, dtype=float)
    coefficients, *_ = np.linalg.lstsq(x, y, rcond=None)
    left = y - x @ coefficients
    free = len(y) - 2
    spread = float(left @ left) / free if free else math.inf
    errors = np.sqrt(spread * np.diag(np.linalg.inv(x.T @ x))) if free else np.full(2, math.inf)
    total = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float(left @ left) / total if total else 1.0
    return Law(float(coefficients[0]), float(coefficients[1]), float(errors[0]), float(errors[1]), r2)


@register(
    title="Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More",
    year=2025,
    source="arXiv:2502.03738",
    family="vit",
    stage="study",
    headline="84.6 % on ImageNet-1K from 50,176 tokens, one for each pixel of 224 x 224, with a base-size model",
    training_free=False,
)
def study(
    make: Callable[[int, int], nn.Module],
    train: Callable[[nn.Module, int, int], None],
    measure: Callable[[nn.Module], float],
    patches: Sequence[int],
    side: int,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Callable[[int, int, float], None] | None = None,
) -> Scaling:
    """Train the same model at several patch sizes, everything else equal, and fit metric = base + slope log2(tokens).

    A study, not a method: the paper finds that smaller patches help down to one pixel (P = 16, 8, 4, 2, 1: 196 to 50,176 tokens
    at 224 pixels), and this asks whether they do on your data. ``make(patch, seed)`` gives a fresh model, ``train(model, patch,
    seed)`` trains it, with equal steps for all, ``measure(model)`` says how good it is. `side`: pixels on a side. `progress` is
    called with patch, seed and metric. The form of the law is ours: the paper shows curves. Its own network is
    `jeton.backbones.adventurer`, linear in tokens; models that are there already are brought to another patch size by
    `repatched`. Raises ValueError for patches that do not fill the picture.
    """
    wrong = [patch for patch in patches if patch < 1 or side % patch]
    if wrong:
        raise ValueError(f"patches of {wrong[0]} pixels do not fill pictures of {side}.")
    points = []
    for patch in patches:
        metrics, flops = [], math.nan
        for seed in seeds:
            model = make(patch, seed)
            flops = flops_of(model, (side // patch) ** 2)
            train(model, patch, seed)
            metrics.append(measure(model))
            if progress is not None:
                progress(patch, seed, metrics[-1])
        points.append(Point(patch, (side // patch) ** 2, flops, tuple(metrics)))
    found = [(point.tokens, metric) for point in points for metric in point.metrics]
    return Scaling(tuple(points), fit(*zip(*found, strict=True)))


def flops_of(model: nn.Module, tokens: int) -> float:
    """FLOPs of an encoder's blocks for one picture of so many patches; not a number for models that jeton does not know."""
    try:
        view = adapt(model)
    except Unsupported:
        return math.nan
    assert isinstance(view, Encoder)
    n, (width, inner, gated) = tokens + view.prefix, view.dims
    return len(view.blocks) * block_flops(n, width, inner, gated=gated)


def repatched(model: PreTrainedModel, patch: int, config: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A copy of a ViT, DeiT, DINOv2, CLIP or SigLIP encoder (or a classifier on one) for patches of another size: the patch
    embedding resampled by the pseudo-inverse of resizing, the position table interpolated, all else as it was. Pictures keep
    their size unless `config`, fields of the new configuration, says otherwise. Raises `Unsupported` where an encoder has no such
    embedding and table."""
    view = adapt(model)
    embedding = next((name for name, part in model.named_modules() if isinstance(part, nn.Conv2d)), None)
    table = next((name for name, _ in model.named_parameters() if "position_embedding" in name), None)
    if not isinstance(view, Encoder) or view.packed or embedding is None or table is None:
        raise Unsupported(f"{type(model).__name__} has no patch convolution with a position table that could be resized.")
    old: Any = view.model.config
    made_from: Any = type(model.config).from_dict({**model.config.to_dict(), "patch_size": patch, **(config or {})})
    made = type(model)(made_from)
    grid = (made_from.image_size // patch,) * 2
    state = model.state_dict()
    kernel = f"{embedding}.weight"
    state[kernel] = resample(state[kernel], patch)
    flat = state[table] if state[table].dim() == 3 else state[table][None]
    moved = resize_positions(flat, grid, front=flat.shape[1] - (old.image_size // view.patch_size) ** 2)
    state[table] = moved if state[table].dim() == 3 else moved[0]
    made.load_state_dict(state)
    made.set_attn_implementation(model.config._attn_implementation)
    made.to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    return made.train(model.training)
