"""Drawing ids from logits: guidance and its schedules, temperature, top-k, and how many masked tokens are filled at each step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GUIDANCE = ("const", "linear", "cos", "log", "square", "square_root")


def cfg(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: ``uncond + scale (cond - uncond)``; 1 is no guidance."""
    return uncond + scale * (cond - uncond)


def cfg_schedule(kind: str, scale: float, i: int, n: int) -> float:
    """Guidance at token i of n, between 1 and `scale`, with r = (i + 1) / n.

    linear 1 + (w-1) r; cos 1 + (w-1) sin(π r / 2); log 1 + (w-1) log1p(r (e-1)) / log1p(e-1); square 1 + (w-1) r²; square_root
    1 + (w-1) sqrt(i / n), which alone begins at 1; const w.
    """
    if kind not in GUIDANCE:
        raise ValueError(f"there is no guidance schedule {kind!r}; they are {', '.join(GUIDANCE)}.")
    r = (i + 1) / n
    share = {
        "const": 1.0,
        "linear": r,
        "cos": math.sin(math.pi * r / 2),
        "log": math.log1p(r * (math.e - 1)) / math.log1p(math.e - 1),
        "square": r * r,
        "square_root": math.sqrt(i / n),
    }[kind]
    return 1 + (scale - 1) * share


def sample_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Ids (...) drawn from logits (..., V), and the probability each had after temperature and top-k.

    Temperature 0 takes the largest logit. Of logits equal to the k-th largest all stay.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature must be 0 or more and top_k 1 or more, got {temperature} and {top_k}.")
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1), logits.softmax(-1).amax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -torch.inf)
    p = logits.softmax(-1)
    ids = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
    return ids, p.gather(-1, ids[..., None])[..., 0]


def mask_ratio(kind: str, r: Tensor) -> Tensor:
    """How much is still masked when a share r of the steps is done: cosine cos(π r / 2), arccos 2 acos(r) / π, linear 1 - r."""
    if kind not in ("cosine", "arccos", "linear"):
        raise ValueError(f'a mask schedule is "cosine", "arccos" or "linear", got {kind!r}.')
    if kind == "cosine":
        return (math.pi / 2 * r).cos()
    return 2 / math.pi * r.clamp(0, 1).acos() if kind == "arccos" else 1 - r


def mask_schedule(steps: int, n: int, kind: str = "cosine") -> list[int]:
    """How many of n masked tokens are filled at each of `steps` steps; at least one each, n in all."""
    if not 1 <= steps <= n:
        raise ValueError(f"{n} tokens can be filled in 1 to {n} steps, not {steps}.")
    left, filled = n, []
    ratios = mask_ratio(kind, torch.arange(1, steps + 1, dtype=torch.float64) / steps).tolist()
    for step, ratio in enumerate(ratios):
        rest = steps - step - 1
        after = min(left - 1, max(rest, math.floor(ratio * n + 1e-9))) if rest else 0
        filled.append(left - after)
        left = after
    return filled
