"""OPCM: merge a stream of models, each update stripped of what the merged one already does."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..registry import register
from ._common import SHARD, Folder, Merger, Source, Weights, aligned, cast, change, collect, norm, read


@register(
    title="Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging",
    year=2025,
    source="arXiv:2501.09522",
    family="merging",
    stage="weights",
)
@dataclass(frozen=True)
class OPCM(Merger):
    """Merge fine-tuned models one after the other in constant memory, each stripped of what lies in the dominant singular
    subspace of what has been merged before.

    For every linear weight, D (o, i) is the sum of updates so far and V (o, i) the new task's, theta_t - theta_0. With
    D = U S Wᵀ and r the number of leading singular values whose share of sum(S) is at most `alpha`, the part of V that maps
    between the r leading right and left directions is taken out,
    V' = V - U_r (U_rᵀ V W_r) W_rᵀ, and D becomes D + V'. All other tensors (biases, norms, embeddings) are added as they are.
    The merged model is theta_0 + D n / |D|, with n the mean global norm of the task vectors seen, so that its distance from the
    base stays that of one fine-tuned model. (The paper scales D at every step and undoes it at the next; only the sum is kept
    here, which is the same.)

    The authors' code means to take out all u_i v_iᵀ as well but does not, since it writes to a copy; a later implementation
    does: `zero_diagonal`. ``alpha`` 0 projects nothing (but the diagonal); 1 and more all of it. `skip` names matrices that are
    no linear layers, or are not to be projected, as a regular expression. Models count in the order in which they come.

    ``OPCM().merge(base, models)`` merges what is there; ``stream = OPCM().start(base)`` and ``stream.add(model)`` go on for as
    long as models come.
    """

    alpha: float = 0.5
    zero_diagonal: bool = False
    skip: str = r"embed|wte|wpe|lm_head|relative_attention_bias|shared"

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha} is the share of singular values that is protected; give a number from 0 to 1.")

    def start(self, base: Source, work: str | Path | None = None) -> Stream:
        """A stream of models to merge. With `work`, a folder, its state lies on disk and goes on from what is there."""
        return Stream(self, base, None if work is None else Path(work))

    def merge(
        self, base: Source, models: Sequence[Source], out: str | Path | None = None, *, shard: int = SHARD
    ) -> dict[str, Tensor] | Path:
        if not models:
            raise ValueError("there is nothing to merge; give at least one fine-tuned model.")
        if out is None:
            return self._all(self.start(base), models).merged()
        place = Path(out).absolute().parent
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as work:  # the running sum, which need not fit into memory
            return self._all(self.start(base, work), models).merged(out, shard=shard)

    def project(self, new: Tensor, merged: Tensor) -> Tensor:
        """V' of V = `new` (o, i) against D = `merged` (o, i)."""
        left, values, right = torch.linalg.svd(merged, full_matrices=False)
        total = values.sum()
        share = (values.cumsum(0) / total.clamp(min=torch.finfo(total.dtype).tiny)).clamp(max=1.0)
        leading = (share <= self.alpha) & (total > 0)
        away = leading[:, None] & leading
        if self.zero_diagonal:
            away = away | (torch.eye(len(values), dtype=torch.bool, device=away.device) & (total > 0))
        inside = left.mT @ new @ right.mT
        return new - left @ (inside * away) @ right

    @staticmethod
    def _all(stream: Stream, models: Sequence[Source]) -> Stream:
        for model in models:
            stream.add(model)
        return stream

    def projected(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is projected: a matrix that is the weight of a linear layer."""
        return tensor.dim() == 2 and name.rpartition(".")[2] == "weight" and re.search(self.skip, name) is None


@dataclass
class Stream:
    """The state of a running merge: the sum of projected updates, the task vectors' norms summed, and how many there were. Its
    size does not depend on how many models have been merged."""

    system: OPCM
    base: Source
    work: Path | None = None
    count: int = 0
    norms: float = 0.0
    update: Weights = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = read(self.base)
        if self.work is not None and (self.work / "state.json").exists():
            kept = json.loads((self.work / "state.json").read_text(encoding="utf-8"))
            if kept["system"] != repr(self.system):
                raise ValueError(f"{self.work} holds a merge by {kept['system']}, not by {self.system!r}; give another folder.")
            self.count, self.norms, self.update = kept["count"], kept["norms"], Folder(self.work / kept["update"])

    @property
    def norm(self) -> float:
        """The mean norm of the task vectors seen: how far the merged model is from the base."""
        return self.norms / self.count

    def add(self, model: Source) -> None:
        """Merge one model more."""
        tuned = read(model)
        names = aligned(self._start, [tuned])
        squares: list[float] = []
        updated = self._updated(tuned, names, squares)
        if self.work is None:
            self.update = dict(updated)
        else:
            place = self.work / f"update-{self.count + 1}"
            shutil.rmtree(place, ignore_errors=True)  # of a run that was broken off
            collect(updated, place)
            self.update = Folder(place)
        self.count += 1
        self.norms += sum(squares) ** 0.5
        if self.work is not None:
            state = {"system": repr(self.system), "count": self.count, "norms": self.norms, "update": place.name}
            (self.work / "state.part").write_text(json.dumps(state), encoding="utf-8")
            (self.work / "state.part").replace(self.work / "state.json")
            shutil.rmtree(self.work / f"update-{self.count - 1}", ignore_errors=True)

    def merged(self, out: str | Path | None = None, *, shard: int = SHARD) -> dict[str, Tensor] | Path:
        """The merged weights so far, as a dict or written to the folder `out`."""
        return collect(cast(self.tensors(), self._start), out, self.base if isinstance(self.base, str | Path) else None, shard)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The merged tensors, one by one."""
        if self.count == 0:
            raise ValueError("nothing has been merged yet; add a model first.")
        long = norm(self.update[name] for name in self.update)
        scale = self.norm / long if long > 0 else 1.0
        for name in self._start:
            start = self._start[name]
            yield name, start.float() + scale * self.update[name].to(start.device) if name in self.update else start

    def _updated(self, tuned: Weights, names: list[str], squares: list[float]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            new = change(tuned, self._start, name)
            squares.append(float(new.double().square().sum()))
            if name in self.update:
                merged = self.update[name].to(new.device)
                new = merged + (self.system.project(new, merged) if self.system.projected(name, new) else new)
            yield name, new
