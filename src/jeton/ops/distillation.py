"""What a student learns from a teacher: pure losses over logits, tokens and attention maps, each a scalar in float32.

No gradient reaches the teacher.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def logit_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the distributions that logits (B, C) give at a temperature T, times T², averaged over B."""
    s, t = (x.float() / temperature for x in (student, teacher.detach()))
    return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True) * temperature**2


def token_mse(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared difference of tokens (B, N, D), each token counting `weight` (B, N) times; 0 where all weights are."""
    each = (student.float() - teacher.detach().float()).square().mean(-1)
    if weight is None:
        return each.mean()
    return (each * weight).sum() / weight.sum().clamp(min=1e-6)


def attention_mse(student: Tensor, teacher: Tensor, summed: bool = False) -> Tensor:
    """Squared difference of attention maps (B, H, R, N): the mean over all entries, or `summed` over rows and keys and averaged
    over B and H."""
    each = (student.float() - teacher.detach().float()).square()
    return each.sum((-2, -1)).mean() if summed else each.mean()
