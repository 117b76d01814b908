"""SiT: learned slots in which patches are slimmed, and the way back by which a teacher's features are matched.

Letters: B pictures, N patches, N0 at first, K slots, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..learned import Learned, Shape
from ..method import Budget, Method, Promise, Signals, register
from ..needs import Need, Trained
from ..ops.budget import geometrically
from ..ops.distillation import token_mse
from ..tokens import Reduction, Tokens
from ._common import check_at_blocks, quota, read


@register(
    title="Self-slimmed Vision Transformer",
    year=2022,
    source="arXiv:2111.12624",
    family="vit",
    stage="block",
    training_free=False,
    headline="1.7 times faster at the teacher's accuracy (83.1 % on ImageNet-1K at 4.0 GMACs for 5.5), 3.6 times at 97 % of it",
)
@dataclass(frozen=True)
class SiT(Learned):
    """Behind a few blocks N patches become K slots, each a mixture of all patches with weights of its own:

    W = softmax over patches of (g · slim(x)) (B, K, N), x' = W x, slim = Linear(D/2, K) GELU Linear(D, D/2) LayerNorm, g learned
    from 1. Special tokens stand aside. After stage i (from 1) of the blocks ``int(ratio^i N0)`` slots are left.

    It is trained as it runs, on a model that starts from its teacher's weights: cross entropy + 2 KL of the logits + 2 times
    `Recalibration`, which is owned by the training, not by the method (see the recipe).

    `locations` are the blocks behind which it acts; None means the last ones of each of the first three quarters of the depth.
    The presets are the stages of the LV-ViT models. `keep` sets the number left at last instead, by the same share at each stage.
    `weights` are the trained slots. Their number belongs to the weights, not the number of patches: pictures of other sizes work
    as long as they ask for no more slots than there are; who asks for fewer gets the first ones. Slots have no place in the
    picture: they stand where evenly spaced patches stood, and other patches count as theirs in whom they weigh most.
    """

    site = "block"
    point = "after"
    masking: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "lv-vit-t": {"locations": (0, 1, 2)},
        "lv-vit-xs": {"locations": (0, 1, 2)},
        "lv-vit-s": {"locations": (8, 11, 13)},
        "lv-vit-m": {"locations": (9, 13, 16)},
        "lv-vit-l": {"locations": (9, 13, 16)},
    }
    ratio: float = 0.5
    keep: int | float | None = None
    locations: tuple[int, ...] | None = None
    weights: str | None = None
    stage: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_blocks(self)

    def needs(self) -> dict[str, Need]:
        return {"learned": Trained()}

    def build(self, shape: Shape) -> nn.Module:
        return nn.ModuleList(Slimming(shape.width, slots) for slots in self._slots(shape))

    def fits(self, trained: Shape, shape: Shape) -> bool:
        return super().fits(trained, shape) and len(self._blocks(trained.depth)) == len(self._blocks(shape.depth))

    def taken(self, state: dict[str, Tensor], trained: Shape) -> dict[str, Tensor]:
        """The first slots of weights that have more of them than this budget asks for."""
        state = dict(state)
        for stage, slots in enumerate(self._slots(trained)):
            for name in (f"{stage}.slots.weight", f"{stage}.slots.bias"):
                if name in state:
                    state[name] = state[name][:slots]
        return state

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        b, n, _ = tokens.features.shape
        prefix, mask = tokens.prefix, tokens.mask
        patches = n - prefix
        k = self._plan(patches, 1)[0] if self.keep is None else Budget(self.keep).count(patches)
        if k >= patches and mask is None:
            return Reduction.identity(b, n, tokens.device, prefix)
        scores = read(signals, "learned", "sit", "its trained slots")[self.stage](tokens.features[:, prefix:])
        if scores.shape[-1] < k:
            raise ValueError(
                f"sit is to keep {k} of {patches} patches, but its weights have {scores.shape[-1]} slots here; keep fewer, or "
                "train it for this budget."
            )
        scores = scores[..., :k].transpose(1, 2)
        slot, one = torch.arange(k, device=tokens.device), torch.eye(k, patches, device=tokens.device)
        if mask is None:
            matrix, left, real = scores.softmax(-1), slot.new_tensor(k), slot.new_tensor(patches)
        else:
            real = tokens.count()[:, None] - prefix
            left = quota(signals, k if self.keep is None else self.keep, real)
            seen = mask[:, None, prefix:]
            matrix = torch.where(seen, scores, torch.finfo(scores.dtype).min).softmax(-1) * seen
            matrix = torch.where((left >= real)[..., None], one, matrix) * (slot < left)[..., None]
        # slots have no place: evenly spaced patches represent them, and count as theirs
        made = None if mask is None else slot < left
        index = ((2 * slot + 1) * real // (2 * left).clamp(min=1)).clamp(max=patches - 1).expand(b, -1)
        own = Reduction.keep(index, patches, made).assign
        assign = torch.where(own < 0, matrix.argmax(1).masked_fill(matrix.amax(1) == 0, -1), own)
        return _behind(prefix, Reduction(index, assign, matrix=matrix, mask=made))

    def steps(self, n: int, depth: int) -> list[Method | None]:
        steps: list[Method | None] = [None] * depth
        blocks = self._blocks(depth)
        before = n
        for stage, (block, left) in enumerate(zip(blocks, self._plan(n, len(blocks)), strict=True)):
            steps[block] = replace(self, keep=left, stage=stage) if left < before else None
            before = left
        return steps

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(self._plan(n, len(self._blocks(depth)))[-1])

    def counts(self, n: int, depth: int) -> list[int]:
        """Patches of n that each block hands on."""
        counts = []
        for step in self.steps(n, depth):
            n = n if step is None else step.keep  # type: ignore[attr-defined]
            counts.append(n)
        return counts

    def flops(self, n: int, shape: Shape) -> float:
        total, half = 0.0, shape.width // 2
        for slots in self._plan(n, len(self._blocks(shape.depth))):
            total += 2.0 * n * (shape.width * half + half * slots + shape.width * slots)
            n = slots
        return total

    def _slots(self, shape: Shape) -> list[int]:
        return self._plan(shape.patches, len(self._blocks(shape.depth)))

    def _blocks(self, depth: int) -> list[int]:
        if self.locations is None:
            return sorted({max(1, depth * part // 4) - 1 for part in (1, 2, 3)})
        if max(self.locations) >= depth:
            raise ValueError(
                f"sit(locations={self.locations}) acts behind block {max(self.locations)}, but there are only {depth} blocks; "
                f"use blocks 0 to {depth - 1}, or locations=None."
            )
        return sorted(set(self.locations))

    def _plan(self, n: int, stages: int) -> list[int]:
        """Slots after each stage."""
        if self.keep is not None:
            return geometrically(n, Budget(self.keep).count(n), stages, halving=False)
        share = Fraction(str(self.ratio))
        return [max(1, int(share ** (stage + 1) * n)) for stage in range(stages)]


def _behind(prefix: int, step: Reduction) -> Reduction:
    """A dense reduction of patches as one that leaves special tokens in front as they are."""
    if prefix == 0:
        return step
    assert step.matrix is not None
    index, assign = (
        torch.cat([torch.arange(prefix, device=part.device).expand(len(part), -1), torch.where(part < 0, -1, part + prefix)], 1)
        for part in (step.index, step.assign)
    )
    special = torch.eye(prefix + step.k, prefix + step.n, device=step.matrix.device)[:prefix].expand(len(index), -1, -1)
    matrix = torch.cat([special, F.pad(step.matrix, (prefix, 0))], 1)
    mask = None if step.mask is None else F.pad(step.mask, (prefix, 0), value=True)
    return Reduction(index, assign, matrix=matrix, mask=mask, prefix=prefix)


class Slimming(nn.Module):
    """x (B, N, D) to the scores (B, N, K) of every patch in every slot, in float32."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.inward = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width // 2), nn.GELU())
        self.slots = nn.Linear(width // 2, slots)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.scale * self.slots(self.inward(x.float()))
        return scores


class Expanding(nn.Module):
    """K slots (B, K, D) to N0 patches: y = mix(norm(x)) over tokens, with 4 N0 hidden, and y + mlp(norm(y)) over channels."""

    def __init__(self, slots: int, patches: int, width: int) -> None:
        super().__init__()
        self.norm_tokens, self.norm_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(slots, 4 * patches), nn.GELU(), nn.Linear(4 * patches, patches))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = y + self.channels(self.norm_channels(y))
        return out


class Recalibration(nn.Module):
    """What training adds to a slimmed student: the way back to N0 patches behind every block that has fewer, and the mean over
    blocks of the squared difference to what the teacher has there. It is left behind when the student is saved; kept, `recover`
    gives dense maps of the original grid.

    `counts` are the patches each block hands on (`SiT.counts`).
    """

    def __init__(self, counts: Sequence[int], patches: int, width: int) -> None:
        super().__init__()
        self.back = nn.ModuleDict(
            {str(block): Expanding(slots, patches, width) for block, slots in enumerate(counts) if slots < patches}
        )

    def recover(self, block: int, x: Tensor) -> Tensor:
        """The slots (B, K, D) that a block hands on as a map of patches (B, N0, D)."""
        name = str(block)
        return self.back[name](x) if name in self.back else x

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], prefix: int = 1) -> Tensor:
        """The loss, from what each block of both hands on: (B, prefix + K, D) and (B, prefix + N0, D)."""
        parts = [
            token_mse(self.recover(block, mine[:, prefix:]), theirs[:, prefix:])
            for block, (mine, theirs) in enumerate(zip(student, teacher, strict=True))
        ]
        return torch.stack(parts).mean()
