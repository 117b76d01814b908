"""TALL-masks: which weights of a merged model each task needs; Consensus Merging keeps those that several tasks do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..registry import register
from ._common import SHARD, Folder, Merger, Shards, Source, Weights, aligned, cast, change, collect, elect, read, threshold

Score = Callable[[str, dict[str, Tensor]], float]
"""Says how good weights are at a task: (name of the task, state dict) to a number, higher is better."""


@register(
    title="Localizing Task Information for Improved Model Merging and Compression",
    year=2024,
    source="arXiv:2405.07813",
    family="merging",
    stage="weights",
)
@dataclass(frozen=True)
class TallMasks(Merger):
    """Add up the task vectors and find, for each task, the weights of the sum that it needs: one bit a weight brings it back.

    With tau_t = theta_t - theta_0 and tau the sum of all of them, elementwise
    m_t = 1[ |tau_t| > lambda_t |tau - tau_t| ], and theta_0 + m_t tau stands for theta_t. Consensus Merging keeps the weights
    that at least `k` tasks need, theta_0 + alpha 1[sum_t m_t >= k] tau: k = 2 drops what none and what only one task needs; 0 is
    task arithmetic.

    `scales` are the lambda tried for each task; with a `score` the best one is taken, the first of equals. Without, it is
    `scale` (a middle value: ours). `combine="ties"` adds the task vectors up by TIES: of each only the `top` share of largest
    entries, and only those that agree with the elected sign. A stream of tensors goes in and out; masks are packed eight
    weights to a byte.

    ``TallMasks().localize(base, models)`` gives the masks; ``TallMasks().merge(base, models)`` is Consensus Merging.
    """

    k: int = 2
    alpha: float = 0.3
    scale: float = 0.4
    scales: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6)
    combine: str = "sum"
    top: float | None = None

    def __post_init__(self) -> None:
        if self.combine not in ("sum", "ties"):
            raise ValueError(f'combine must be "sum" or "ties", got {self.combine!r}.')
        if self.top is not None and not 0 < self.top <= 1:
            raise ValueError(f"top={self.top} is the share of each task vector that is kept; give a number in (0, 1].")
        if self.k < 0:
            raise ValueError(f"k={self.k} is a number of tasks; give 0 or more.")

    def localize(
        self,
        base: Source,
        models: Mapping[str, Source],
        score: Score | None = None,
        out: str | Path | None = None,
        *,
        shard: int = SHARD,
    ) -> Localized:
        """Masks and merged task vector of named fine-tuned `models`, kept in memory or, with `out`, in that folder."""
        if not models:
            raise ValueError("there is nothing to merge; give at least one fine-tuned model by name.")
        start, tuned = read(base), {task: read(model) for task, model in models.items()}
        names = aligned(start, list(tuned.values()))
        steps = partial(self._steps, start, list(tuned.values()), names)
        scales, single = self._choose(start, tuned, steps, score)
        merged: dict[str, Tensor] = {}
        masks: dict[str, dict[str, Tensor]] = {task: {} for task in tuned}
        with ExitStack() as stack:
            keep: dict[str, Callable[[str, Tensor], Any]] = {task: masks[task].__setitem__ for task in tuned}
            total: Callable[[str, Tensor], Any] = merged.__setitem__
            if out is not None:
                place = Path(out)
                total = stack.enter_context(Shards(place / "merged", size=shard)).add
                keep = {task: stack.enter_context(Shards(place / "masks" / task, size=shard)).add for task in tuned}
            for name, own, tau in steps():
                total(name, tau)
                for number, task in enumerate(tuned):
                    keep[task](name, pack(mask(own[number], tau, scales[task])))
        if out is not None:
            (Path(out) / "tall_masks.json").write_text(json.dumps({"scales": scales, "single": single}), encoding="utf-8")
            return Localized.load(out, base)
        return Localized(base, merged, dict(masks), scales, single)

    def tensors(self, base: Weights, models: Sequence[Weights]) -> Iterator[tuple[str, Tensor]]:
        names = aligned(base, models)
        merged = self._steps(base, models, names)
        for name in base:
            if name not in names:
                yield name, base[name]
        for name, own, tau in merged:
            votes = mask(own, tau, self.scale).sum(0)
            yield name, base[name].float() + self.alpha * (votes >= self.k) * tau

    def _steps(self, base: Weights, models: Sequence[Weights], names: list[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Tensor by tensor: its name, the tasks' changes of it (T, ...), and the merged one (...)."""
        top = self.top if self.top is not None else (0.2 if self.combine == "ties" else 1.0)
        least = [threshold(lambda m=model: (change(m, base, name) for name in names), top) for model in models] if top < 1 else []
        for name in names:
            own = torch.stack([change(model, base, name) for model in models])
            if least:
                floor = torch.tensor(least, device=own.device).view(-1, *[1] * (own.dim() - 1))
                large = torch.where(own.abs() >= floor, own, 0)
            else:
                large = own
            yield name, own, elect(large) if self.combine == "ties" else large.sum(0)

    def _choose(
        self, base: Weights, models: Mapping[str, Weights], steps: Callable[[], Any], score: Score | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """lambda of each task, and the score of each fine-tuned model as it is."""
        if score is None:
            return dict.fromkeys(models, self.scale), {}
        best, single = {}, {}
        for number, (task, model) in enumerate(models.items()):
            single[task] = score(task, dict(model))
            found = {}
            for scale in self.scales:
                weights = dict(base)
                for name, own, tau in steps():
                    weights[name] = (base[name].float() + mask(own[number], tau, scale) * tau).to(base[name].dtype)
                found[scale] = score(task, weights)
            best[task] = max(found, key=lambda scale: found[scale])
        return best, single


@dataclass(frozen=True)
class Localized:
    """Several tasks in one: the merged task vector and each task's packed mask, with lambda and, where a score was given, the
    score of each fine-tuned model."""

    base: Source
    merged: Weights = field(repr=False)
    masks: Mapping[str, Weights] = field(repr=False)
    scales: Mapping[str, float]
    single: Mapping[str, float]

    @classmethod
    def load(cls, path: str | Path, base: Source) -> Localized:
        """What `localize(..., out=path)` wrote."""
        place = Path(path)
        if not (place / "tall_masks.json").exists():
            raise FileNotFoundError(f"{place} was not written by TallMasks.localize: it has no tall_masks.json.")
        kept = json.loads((place / "tall_masks.json").read_text(encoding="utf-8"))
        masks = {task: Folder(place / "masks" / task) for task in kept["scales"]}
        return cls(base, Folder(place / "merged"), masks, kept["scales"], kept["single"])

    def mask(self, task: str, name: str) -> Tensor:
        """The mask of one tensor, as booleans of its shape."""
        if task not in self.masks:
            raise ValueError(f"there is no task {task!r}; there are {', '.join(self.masks)}.")
        return unpack(self.masks[task][name], self.merged[name].shape)

    def restore(self, task: str, out: str | Path | None = None, *, shard: int = SHARD) -> dict[str, Tensor] | Path:
        """The weights of one task, theta_0 + m_t tau."""
        return self._written(lambda name: self.mask(task, name).to(torch.float32), 1.0, out, shard)

    def consensus(
        self,
        k: int = 2,
        alpha: float | Sequence[float] = tuple(n / 10 for n in range(1, 11)),
        score: Score | None = None,
        out: str | Path | None = None,
        *,
        shard: int = SHARD,
    ) -> dict[str, Tensor] | Path:
        """One model for all tasks, theta_0 + alpha 1[sum_t m_t >= k] tau. Of several `alpha` the one with the best mean score,
        each task's divided by that of its fine-tuned model, the first of equals."""
        vote = partial(self._agreed, k)
        if isinstance(alpha, Sequence):
            if score is None or not self.single:
                raise ValueError("several alpha need a score to choose by, here and in localize; or give one alpha, e.g. 0.3.")
            found = {}
            for one in alpha:
                weights = dict(self._tensors(vote, one))
                found[one] = sum(score(task, weights) / self.single[task] for task in self.masks)
            alpha = max(found, key=lambda one: found[one])
        return self._written(vote, alpha, out, shard)

    @cached_property
    def used(self) -> dict[str, float]:
        """The share of weights each task needs."""
        total = sum(self.merged[name].numel() for name in self.merged)
        return {task: sum(int(self.mask(task, name).sum()) for name in self.merged) / total for task in self.masks}

    def _agreed(self, k: int, name: str) -> Tensor:
        votes = sum(self.mask(task, name).int() for task in self.masks)
        return (torch.as_tensor(votes) >= k).to(torch.float32)

    def _tensors(self, chosen: Callable[[str], Tensor], alpha: float) -> Iterator[tuple[str, Tensor]]:
        base = read(self.base)
        return cast(self._summed(base, chosen, alpha), base)

    def _summed(self, base: Weights, chosen: Callable[[str], Tensor], alpha: float) -> Iterator[tuple[str, Tensor]]:
        for name in base:
            start = base[name]
            if name in self.merged:
                start = start.float() + (alpha * chosen(name) * self.merged[name]).to(start.device)
            yield name, start

    def _written(self, chosen: Callable[[str], Tensor], alpha: float, out: str | Path | None, shard: int) -> Any:
        return collect(self._tensors(chosen, alpha), out, self.base, shard)


def mask(own: Tensor, merged: Tensor, scale: float) -> Tensor:
    """|tau_t| > lambda |tau - tau_t|, strictly. own (..., *) any number of tasks, merged (*)."""
    return own.abs() > scale * (merged - own).abs()


def pack(bits: Tensor) -> Tensor:
    """Booleans of any shape as bytes of eight, (P / 8,) rounded up."""
    return torch.from_numpy(np.packbits(bits.detach().flatten().cpu().numpy()))


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """`pack` undone: the first entries, in `shape`."""
    count = int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool)).view(tuple(shape))
